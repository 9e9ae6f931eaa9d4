"""The tables of texts through a server, and of CLIP's towers."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Table

__all__ = ["TEXTS"]


def _clip(heading: str, template: str, **where: str) -> Column:
    return Column(heading, Cell(template, where))


def _text(heading: str, template: str, label: str) -> Column:
    return Column(heading, Cell(template, {"label": label}, "median"))


TEXTS: Mapping[str, Table] = {
    "clip-cpu": Table(
        Source("clip_engine.csv", {}),
        (
            Key(
                "backend and dtype",
                "way",
                {
                    f"{backend} {dtype}": f"{backend} {dtype}"
                    for backend in ("transformers", "torch", "openvino")
                    for dtype in ("float32", "bfloat16")
                },
            ),
        ),
        (
            _clip("ViT-B/32, image", "{cpu_ms:.1f}", geometry="ViT-B/32", tower="image"),
            _clip("ViT-B/16, image", "{cpu_ms:.1f}", geometry="ViT-B/16", tower="image"),
            _clip("text of 6 to 20 tokens", "{cpu_ms:.1f}", tower="text", longest="20"),
            _clip("smallest cosine of texts", "{cosine_min:.5f}", tower="text", longest="20"),
        ),
    ),
    "clip-gpu": Table(
        Source("clip_gpu.csv", {"device": "NVIDIA H200", "tower": ("image", "text"), "rows": ("1", "256")}),
        (Key("tower", "tower"), Key("tokens of a text", "longest"), Key("in a batch", "rows")),
        (
            _clip("transformers, ms", "{milliseconds:.2f}", way="transformers"),
            _clip("compiled, ms", "{milliseconds:.2f}", way="compiled"),
            _clip("`torch`, ms", "{milliseconds:.2f}", way="torch"),
            _clip("`fused`, ms", "{milliseconds:.2f}", way="fused"),
            _clip("`fused` over the faster transformers", "{ratio_to_fastest_transformers:.2f}", way="fused"),
            _clip("smallest cosine of `fused`", "{cosine_min:.5f}", way="fused"),
        ),
    ),
    "text-load": Table(
        Source("text_load.csv", {"device": "Intel(R) Xeon(R) Processor"}),
        (
            Key("checkpoint", "checkpoint"),
            Key("texts per request", "rows"),
            Key("in flight", "concurrency"),
        ),
        (
            _text("texts/s before", "{texts_per_second:,.0f}", "before"),
            _text("texts/s", "{texts_per_second:,.0f}", "after"),
            _text("tokenize before", "{tokenize_cpu_ms:.3f}", "before"),
            _text("tokenize", "{tokenize_cpu_ms:.3f}", "after"),
            _text("tower before", "{tower_cpu_ms:.3f}", "before"),
            _text("tower", "{tower_cpu_ms:.3f}", "after"),
            _text("Triton", "{triton_cpu_ms:.3f}", "after"),
            _text("p50, ms", "{p50_ms:.1f}", "after"),
        ),
    ),
}

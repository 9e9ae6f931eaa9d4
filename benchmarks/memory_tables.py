"""The tables of memory by process."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table

__all__ = ["MEMORY", "MEMORY_FIGURES"]

_FILE = "memory.csv"
_PROCESSES = {
    "siglip_vision_process": "`siglip_vision_process`: decodes and resizes",
    "siglip_vision_model": "`siglip_vision_model`: image tower",
    "siglip_text_model": "`siglip_text_model`: text tower",
    "siglip_text_tokenize": "`siglip_text_tokenize`",
    "tritonserver": "Triton",
    "launcher": "launcher",
    "siglip_gateway": "gateway",
    "siglip_gateway.doors http": "HTTP door",
    "siglip_gateway.doors grpc": "gRPC door",
    "all": "all",
}
_EMBED = "embed_image embed_text"


def _megabytes(heading: str, **where: str) -> Column:
    return Column(heading, Cell("{pss_mb:,.0f}", where))


MEMORY: Mapping[str, Table | Summary] = {
    "memory": Table(
        Source(_FILE, {"label": "base/16@224", "models": _EMBED, "moment": "load"}),
        (Key("process", "process", _PROCESSES),),
        (
            Column("processes", Cell("{processes:.0f}", {})),
            _megabytes("bfloat16, MB", settings="dtype=bfloat16"),
            _megabytes("float32, MB", settings="dtype=float32"),
            _megabytes("float32 with `--preprocess pil`, MB", settings="dtype=float32 preprocess=pil"),
        ),
    ),
    "memory-all": Table(
        Source(_FILE, {"models": "all", "process": "all"}),
        (Key("checkpoint", "label", {"siglip-tiny": "siglip-tiny", "base/16@224": "base/16@224"}),),
        (
            Column("processes", Cell("{processes:.0f}", {})),
            _megabytes("at rest, MB", moment="rest"),
            _megabytes("after load, MB", moment="load"),
        ),
    ),
}

MEMORY_FIGURES: Mapping[str, tuple[Source, Cell]] = {
    "memory-tiny": (
        Source(_FILE, {"label": "siglip-tiny", "models": "all", "process": "all", "moment": "load"}),
        Cell("{pss_mb:,.0f}", {}),
    ),
}

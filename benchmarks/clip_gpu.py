"""CLIP's towers on a GPU: ours fused and in torch, and transformers plain and compiled.

Random weights at published geometries, bfloat16. A call takes pixels or ids in main memory, which is pinned,
and ends with embeddings there. All ways of a table alternate. Cosines are against transformers in float32.

Each batch of texts is one pass, cut to its longest text. A recorded pass is as long as the next recorded
length. `heatmap` explains one image by `--prompts` vectors and is compared with the embedding of that image
by the same runner.

    python -m benchmarks.clip_gpu --output benchmarks/results/clip_gpu.csv

`--device cpu --geometry tiny` is a trial without a GPU. Its times mean nothing, and it needs
`TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, logging

from benchmarks.clip_engine import CONTEXT, END, GEOMETRIES, SIDE, draw_texts, random_clip, save
from benchmarks.cpu_engine import in_turns
from benchmarks.random_towers import make_pixels
from benchmarks.records import about, cosine, publish
from siglip_serve.checkpoint.config import load_config
from siglip_serve.engine.fused.runners import FusedText, FusedVision
from siglip_serve.engine.passes import Runner, in_passes
from siglip_serve.engine.texts import shorten
from siglip_serve.engine.torch.runners import TorchText, TorchVision
from siglip_serve.heatmaps.attribution import ClipExplainer, on_host
from siglip_serve.towers.clip import load_text, load_vision

PACKAGES = ["torch", "triton", "transformers", "numpy"]
WAYS = ["transformers", "compiled", "torch", "fused"]
DTYPE = torch.bfloat16
Embed = Callable[[NDArray[Any]], NDArray[np.float32]]
Row = dict[str, str]


class Bench:
    """A random checkpoint, and the ways to embed with it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.path = options, folder
        self.device = torch.device(options.device)
        save(random_clip(options.geometry, options.activation), folder)
        self.config = load_config(folder)

    def images(self, way: str, dtype: torch.dtype = DTYPE) -> Embed:
        """A way to embed pixels."""
        image = self.config.image
        if way == "torch":
            return self._ours(TorchVision(load_vision(self.path), image, self.device, dtype))
        if way == "fused":
            return self._ours(FusedVision(load_vision(self.path), image, self.device, dtype))
        tower = self._theirs(CLIPVisionModelWithProjection, way, dtype)
        mean, std = (torch.tensor(values, device=self.device) for values in (image.mean, image.std))

        def embed(pixels: NDArray[Any]) -> NDArray[np.float32]:
            x = torch.from_numpy(pixels).to(self.device, non_blocking=True)
            x = ((x * image.rescale - mean) / std).permute(0, 3, 1, 2).to(dtype)
            return _array(tower(pixel_values=x).image_embeds)

        return torch.inference_mode()(embed)

    def texts(self, way: str, dtype: torch.dtype = DTYPE) -> Embed:
        """A way to embed ids. transformers gets no mask, as texts padded on the right need none."""
        if way == "torch":
            return self._ours_texts(TorchText(load_text(self.path), self.device, dtype), None)
        if way == "fused":
            runner = FusedText(load_text(self.path), self.device, dtype)
            return self._ours_texts(runner, runner.lengths)
        tower = self._theirs(CLIPTextModelWithProjection, way, dtype)

        def embed(ids: NDArray[Any]) -> NDArray[np.float32]:
            ids = ids[:, : int((ids == END).argmax(1).max()) + 1]
            return _array(tower(input_ids=torch.from_numpy(ids).to(self.device)).text_embeds)

        return torch.inference_mode()(embed)

    def heatmaps(self, way: str, pixels: NDArray[np.uint8]) -> dict[str, Callable[[], object]]:
        """The embedding of one image by a way, and its heatmaps."""
        tower = load_vision(self.path)
        explainer = ClipExplainer(tower)
        runner = (TorchVision if way == "torch" else FusedVision)(
            tower, self.config.image, self.device, DTYPE, max_rows=1
        )
        vectors = torch.randn(self.options.prompts, tower.config.embedding_size)
        vectors /= vectors.norm(dim=1, keepdim=True)

        def explain() -> None:
            on_host(runner.explain(explainer, pixels, vectors))

        forward = partial(self._ours(runner), pixels)
        return {"forward": forward, "heatmap": explain}

    def _theirs(self, kind: Any, way: str, dtype: torch.dtype) -> Any:
        tower = kind.from_pretrained(self.path, dtype=dtype).eval().to(self.device)
        if way == "compiled":
            return torch.compile(tower, mode=self.options.mode, dynamic=False)
        return tower

    def _ours(self, runner: Runner) -> Embed:
        def embed(rows: NDArray[Any]) -> NDArray[np.float32]:
            batch = in_passes(rows, runner.max_rows, lambda part: runner(part, ["EMBEDDING"]))
            return batch.outputs["EMBEDDING"]

        return embed

    def _ours_texts(self, runner: Runner, lengths: list[int] | None) -> Embed:
        embed = self._ours(runner)
        return lambda ids: embed(shorten(self.config.text, ids, lengths))


def _array(embedding: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = embedding.float().cpu().numpy()
    return found


def compare(
    shared: Row, ways: Mapping[str, Embed], reference: Embed, inputs: NDArray[Any], seconds: float
) -> list[Row]:
    """One row for each way."""
    exact = reference(inputs)
    near = {name: float(cosine(way(inputs), exact).min()) for name, way in ways.items()}
    times = in_turns({name: partial(way, inputs) for name, way in ways.items()}, seconds)
    middle = {name: statistics.median(wall for wall, _ in found) for name, found in times.items()}
    theirs = [middle[name] for name in ("transformers", "compiled") if name in ways]
    return [
        {
            **shared,
            "rows": str(len(inputs)),
            "way": name,
            "per_second": f"{len(inputs) / middle[name]:.1f}",
            "milliseconds": f"{middle[name] * 1000:.3f}",
            "best_milliseconds": f"{min(found)[0] * 1000:.3f}",
            "ratio_to_fastest_transformers": f"{min(theirs) / middle[name]:.3f}" if theirs else "",
            "over_forward": "",
            "cosine_min": f"{near[name]:.7f}",
        }
        for name, found in times.items()
    ]


def explained(shared: Row, bench: Bench, way: str, pixels: NDArray[np.uint8], seconds: float) -> Row:
    """The row of a heatmap, whose time is compared with a pass of the same round."""
    times = in_turns(bench.heatmaps(way, pixels), seconds)
    walls = {name: [wall for wall, _ in found] for name, found in times.items()}
    middle = statistics.median(walls["heatmap"])
    ratios = [a / b for a, b in zip(walls["heatmap"], walls["forward"], strict=True)]
    return {
        **shared,
        "rows": "1",
        "way": way,
        "per_second": f"{1 / middle:.1f}",
        "milliseconds": f"{middle * 1000:.3f}",
        "best_milliseconds": f"{min(walls['heatmap']) * 1000:.3f}",
        "ratio_to_fastest_transformers": "",
        "over_forward": f"{statistics.median(ratios):.3f}",
        "cosine_min": "",
    }


def measure(bench: Bench) -> list[Row]:
    """All tables."""
    options = bench.options
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else None
    shared = {
        **about(PACKAGES, name),
        "geometry": options.geometry,
        "activation": options.activation,
        "dtype": "bfloat16",
        "prompts": "",
        "tower": "image",
        "longest": "",
    }
    pinned = torch.from_numpy(make_pixels(max(options.rows), SIDE))
    pixels = (pinned.pin_memory() if name else pinned).numpy()
    table: list[Row] = []
    if "image" in options.tower:
        ways = {way: bench.images(way) for way in options.ways}
        reference = bench.images("transformers", torch.float32)
        for rows in options.rows:
            table += compare(shared, ways, reference, pixels[:rows], options.seconds)
    if "text" in options.tower:
        ways = {way: bench.texts(way) for way in options.ways}
        reference = bench.texts("transformers", torch.float32)
        for longest in options.longest:
            columns = {**shared, "tower": "text", "longest": str(longest)}
            for rows in options.rows:
                ids = draw_texts(longest, rows)
                table += compare(columns, ways, reference, ids, options.seconds)
    if "heatmap" in options.tower:
        columns = {**shared, "tower": "heatmap", "prompts": str(options.prompts)}
        table += [
            explained(columns, bench, way, pixels[:1], options.seconds)
            for way in options.ways
            if way in ("torch", "fused")
        ]
    return table


def main() -> None:
    """Measure, print, and add to the CSV if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    towers = ["image", "text", "heatmap"]
    add("--geometry", choices=GEOMETRIES, default="ViT-L/14", help="default %(default)s")
    add("--activation", choices=["quick_gelu", "gelu"], default="quick_gelu", help="default %(default)s")
    add("--device", default="cuda:0", help="default %(default)s")
    add("--tower", choices=towers, nargs="+", default=towers, help="default all")
    add("--ways", choices=WAYS, nargs="+", default=WAYS, help="default all")
    add("--mode", default="max-autotune", help="of torch.compile, default %(default)s")
    add("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="of a batch, default 1 8 64 256")
    add("--longest", type=int, nargs="+", default=[16, CONTEXT], help="tokens of texts, default 16 77")
    add("--prompts", type=int, default=4, help="of a heatmap, default %(default)s")
    add("--seconds", type=float, default=10, help="time for each table, default %(default)s")
    add("--output", type=Path, help="CSV file to add to")
    options = parser.parse_args()
    logging.set_verbosity_error()  # each tower ignores the other's weights
    with tempfile.TemporaryDirectory(prefix="clip-gpu-") as folder:
        table = measure(Bench(options, Path(folder)))
    publish(table, PACKAGES, options.output)


if __name__ == "__main__":
    main()

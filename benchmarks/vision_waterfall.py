"""Measure what each optimisation of the fused runner gains on a GPU: one lever per row, added to those above.

The last two rows are the runners that the engine serves with. The one before has the same kernels, but torch
chooses its products. The rows before that are `benchmarks.levers`.
Weights are random at published geometries, or those of a checkpoint. `images_per_second` counts from pixels
in main memory to embeddings in main memory, over several passes in a row. `device_images_per_second` counts
the tower alone, replayed on rows in the GPU's memory. The cosine is to the plain tower in float32. `--scale`
multiplies the random weights, which makes them harder to compute in few bits.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.inputs import GEOMETRIES
from benchmarks.levers import LeveredVision, Levers
from benchmarks.random_towers import fill, make_pixels
from benchmarks.records import about, cosine, write_csv
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ImageConfig, VisionConfig
from siglip_serve.engine.fused import products
from siglip_serve.engine.fused.runners import FusedVision
from siglip_serve.engine.passes import in_passes
from siglip_serve.engine.torch.runners import TorchVision
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.towers.siglip import VisionTower, load_vision

AnyFused = LeveredVision | FusedVision
AnyRunner = TorchVision | AnyFused
Step = Levers | Literal["torch", "unchosen", "fused", "float8"]

_OFF = Levers(kernels=False, gelu=False, attention="torch", fold=False, graphs=False)
_STEPS: dict[str, Step] = {
    "torch as it is": "torch",
    "fused QKV, torch's own attention": _OFF,
    "cuDNN attention": (cudnn := replace(_OFF, attention="cudnn")),
    "GELU in the product": (gelu := replace(cudnn, gelu=True)),
    "LayerNorm kernel, residual in the product": (kernels := replace(gelu, kernels=True)),
    "folded patch embedding and pooling query": (fold := replace(kernels, fold=True)),
    "CUDA graphs": replace(fold, graphs=True),
    "attention kernel": "unchosen",
    "chosen products": "fused",
    "float8": "float8",
}


def make_tower(options: argparse.Namespace) -> tuple[VisionTower, ImageConfig]:
    """Make a fresh tower on the CPU, with the same weights every time."""
    if options.checkpoint:
        return load_vision(options.checkpoint), load_config(options.checkpoint).image
    tower, image = _random_tower(options.geometry, options.scale)
    return copy.deepcopy(tower), image


@cache
def _random_tower(geometry: str, scale: float) -> tuple[VisionTower, ImageConfig]:
    vision = VisionConfig(**GEOMETRIES[geometry], layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh")
    torch.manual_seed(0)
    tower = VisionTower(vision).eval().requires_grad_(False)
    fill(tower, scale)
    return tower, ImageConfig(vision.image_size, "bicubic", 1 / 255, (0.5,) * 3, (0.5,) * 3)


def load_pixels(folder: Path, image: ImageConfig) -> NDArray[np.uint8]:
    """Read the images of a folder, at least one, as the server prepares them for the tower."""
    preprocess = Preprocessor(image, "pil")
    return np.stack([preprocess(file.read_bytes()) for file in sorted(folder.iterdir())])


def host_seconds(runner: AnyRunner, pixels: NDArray[np.uint8], rows: int, seconds: float) -> float:
    """Measure the median seconds of a pass, when four passes follow each other; of one row, a single pass."""
    passes = 4 if rows > 1 else 1
    many = np.concatenate([pixels] * passes)

    def run() -> None:
        in_passes(many, rows, lambda part: runner(part, ["EMBEDDING"]))

    return _median_seconds(run, seconds) / passes


def device_seconds(runner: AnyFused, rows: int, seconds: float) -> float:
    """Measure the median seconds of a pass over rows in the device's memory."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run = torch.inference_mode()(runner.replays.replay_of(rows))
    run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4000)
    return median(times)


def _median_seconds(run: Callable[[], None], seconds: float) -> float:
    run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def make_runner(options: argparse.Namespace, step: Step, dtype: torch.dtype) -> AnyRunner:
    """Make the runner of a step with a fresh tower."""
    tower, image = make_tower(options)
    device, rows = torch.device("cuda"), max(options.rows)
    if isinstance(step, Levers):
        return LeveredVision(tower, image, device, dtype, step, rows)
    if step == "torch":
        return TorchVision(tower, image, device, dtype)
    # Without trials, torch chooses the products.
    trials = patch.object(products, "tried", nullcontext) if step == "unchosen" else nullcontext()
    with trials:
        return FusedVision(tower, image, device, dtype, step == "float8", rows)


def run_all(runner: AnyRunner, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute the embeddings of all rows."""
    batch = in_passes(pixels, runner.max_rows, lambda part: runner(part, ["EMBEDDING"]))
    return batch.outputs["EMBEDDING"].astype(np.float64)


def measure(
    options: argparse.Namespace,
    name: str,
    step: Step,
    pixels: NDArray[np.uint8],
    fidelity: tuple[NDArray[np.uint8], NDArray[np.float64]],
) -> Iterator[dict[str, str]]:
    """Measure a step; one row of the table for each number of rows of a pass."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    runner = make_runner(options, step, torch.bfloat16)
    start = time.perf_counter() - begin
    judged, expected = fidelity
    got = run_all(runner, judged)
    near = cosine(got, expected)
    for rows in options.rows:
        host = host_seconds(runner, pixels[:rows], rows, options.seconds)
        alone = None if isinstance(runner, TorchVision) else device_seconds(runner, rows, options.seconds)
        yield {
            **about(["torch", "triton", "numpy"], torch.cuda.get_device_name()),
            "geometry": str(options.checkpoint or options.geometry),
            "scale": "" if options.checkpoint else str(options.scale),
            "dtype": "float8" if step == "float8" else "bfloat16",
            "rows": str(rows),
            "step": name,
            "images_per_second": f"{rows / host:.1f}",
            "milliseconds": f"{host * 1000:.3f}",
            "device_images_per_second": f"{rows / alone:.1f}" if alone else "",
            "device_milliseconds": f"{alone * 1000:.3f}" if alone else "",
            "cosine_min": f"{near.min():.7f}",
            "cosine_mean": f"{near.mean():.7f}",
            "peak_memory_mb": f"{torch.cuda.max_memory_allocated() / 2**20:.0f}",
            "start_seconds": f"{start:.1f}",
        }


def main() -> None:
    """Measure, print, and append to a CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="base/16@224")
    parser.add_argument("--checkpoint", type=Path, help="a directory, instead of random weights")
    parser.add_argument(
        "--pictures", type=Path, help="folder of images for the cosine, instead of drawn ones"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the random weights, default 1")
    parser.add_argument("--rows", type=int, nargs="+", default=[64], help="rows of a pass, default 64")
    parser.add_argument("--seconds", type=float, default=2, help="time per figure, default %(default)s")
    parser.add_argument("--only", nargs="+", help="measure steps whose name has one of these words")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    image = make_tower(options)[1]
    # More than two passes, so that rows are copied while others are computed.
    pixels = make_pixels(max(64, 2 * max(options.rows) + 1), image.size)
    judged = load_pixels(options.pictures, image) if options.pictures else pixels
    expected = run_all(make_runner(options, "torch", torch.float32), judged)
    for name, step in tqdm(_STEPS.items(), disable=None):
        if options.only and not any(word in name for word in options.only):
            continue
        for row in measure(options, name, step, pixels, (judged, expected)):
            tqdm.write(" ".join(f"{value:>12}" for value in list(row.values())[-11:]))
            if options.output:
                write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()

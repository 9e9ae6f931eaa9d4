"""Our vision tower against transformers' in the same dtype: images per second, and how far apart they are.

Random weights at a published geometry. Both alternate, so that a busy machine slows both alike. The
fidelity columns compare with transformers in float32: the pooled embedding and all patch tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from benchmarks.inputs import GEOMETRIES
from benchmarks.records import about, write_csv
from siglip_serve.checkpoint.model_config import ImageConfig, VisionConfig
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.towers.siglip import VisionTower


def reference(geometry: str) -> SiglipVisionModel:
    """transformers' model with random weights."""
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**GEOMETRIES[geometry])).eval()


def engine(model: SiglipVisionModel, plan: Plan) -> VisionEngine:
    """Our engine with the same weights."""
    names = VisionConfig.__dataclass_fields__
    config = VisionConfig(**{name: getattr(model.config, name) for name in names})
    tower = VisionTower(config)
    state = {name.removeprefix("vision_model."): value.clone() for name, value in model.state_dict().items()}
    tower.load_state_dict(state)
    image = ImageConfig(config.image_size, "bicubic", 1 / 255, (0.5,) * 3, (0.5,) * 3)
    return VisionEngine(tower.eval().requires_grad_(False), image, plan)


def in_turns(ways: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Median seconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 3:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def scaled_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute error over the reference's largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def measure(options: argparse.Namespace, dtype_name: Dtype) -> dict[str, str]:
    """One row of the table."""
    dtype, device = getattr(torch, dtype_name), options.device
    model = reference(options.geometry)
    size = model.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (options.rows, size, size, 3), dtype=np.uint8)
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2) * (1 / 255) - 0.5) / 0.5
    model.to(device)
    exact = model(inputs.to(device))
    ours = engine(model, Plan(device, dtype_name, options.backend))
    model.to(dtype)
    got = ours(pixels, ["EMBEDDING", "PATCH_EMBEDDINGS"]).outputs
    pooled = torch.from_numpy(got["EMBEDDING"]).to(device)
    tokens = torch.from_numpy(got["PATCH_EMBEDDINGS"]).to(device)
    times = in_turns(
        {
            "ours": lambda: ours(pixels),
            "transformers": lambda: model(inputs.to(device, dtype)).pooler_output.float().cpu(),
        },
        options.seconds,
        device,
    )
    name = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        **about(["torch", "transformers", "numpy"], name),
        "geometry": options.geometry,
        "dtype": dtype_name,
        "backend": ours.plan.backend,
        "rows": str(options.rows),
        "threads": str(torch.get_num_threads()),
        "images_per_second": f"{options.rows / times['ours']:.2f}",
        "transformers_images_per_second": f"{options.rows / times['transformers']:.2f}",
        "ratio": f"{times['transformers'] / times['ours']:.2f}",
        "cosine_min": f"{torch.cosine_similarity(pooled, exact.pooler_output).min():.7f}",
        "pooled_error": f"{scaled_error(pooled, exact.pooler_output):.1e}",
        "tokens_error": f"{scaled_error(tokens, exact.last_hidden_state):.1e}",
    }


def main() -> None:
    """Measure, print, and write CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="base/16@224")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--backend", choices=get_args(Backend), default="auto")
    parser.add_argument("--rows", type=int, default=8, help="images in one batch, default %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="time for each dtype, default %(default)s")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    for dtype in options.dtypes:
        row = measure(options, dtype)
        print({key: row[key] for key in list(row)[-9:]}, flush=True)
        if options.output:
            write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()

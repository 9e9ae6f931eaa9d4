"""Ways to embed pictures with NaFlex on a GPU, and with the tower for squares that has the same weights.

Where all pictures are squares (`--largest-aspect 1`), both towers compute the same from as many tokens.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.naflex_ways import MOST, PATCH, SIDE, WIDTHS, Setup, Way, aspects, padding
from benchmarks.random_towers import fill, make_pixels
from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig, NaflexVisionConfig
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import NaflexEngine, VisionEngine
from siglip_serve.engine.fused import ragged
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.plan import Plan
from siglip_serve.images.patches import patch_grid
from siglip_serve.towers.naflex import NaflexVisionTower
from siglip_serve.towers.siglip import VisionTower

__all__ = ["prepare"]

DEVICE = "cuda:0"
CHOICES: tuple[tuple[Backend, Dtype], ...] = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("fused", "bfloat16"),
    ("fused", "float16"),
    ("fused", "float8"),
)
_TIMES = 20
_HEADS = ((12, 64), (16, 72))  # and their depths, of base and so400m


def prepare(width: str, options: argparse.Namespace) -> Setup:
    """All ways for towers of a width, with random weights. Exits if the attention kernel is wrong."""
    check_attention()
    config = NaflexVisionConfig(
        **WIDTHS[width],
        image_size=SIDE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    )
    torch.backends.cudnn.allow_tf32 = False  # by default convolutions in float32 are rounded to it
    torch.manual_seed(0)
    naflex = NaflexVisionTower(config).eval().requires_grad_(False)
    fill(naflex)
    square = _square_of(naflex)
    plain = ImageConfig(SIDE, "bilinear", 1 / 255, (0.5,) * 3, (0.5,) * 3)
    image = NaflexImageConfig(**vars(plain), patch_size=PATCH, max_patches=MOST)
    squares = make_pixels(options.pictures, SIDE)
    rows = _patches_of(squares, image, options.largest_aspect)
    ways = []
    for backend, dtype in CHOICES:
        ours = NaflexEngine(copy.deepcopy(naflex), image, Plan(DEVICE, dtype, backend))
        runner = ours.runner
        share = padding(rows.counts, options.batch, runner.max_rows)
        if not runner.grouped:
            share = 1 - float(rows.counts.mean()) / MOST
        timer = _timer(runner)
        ways.append(Way("naflex", backend, ours.plan.dtype, partial(_ask, ours, rows), share, timer))
    for backend, dtype in CHOICES:
        fixed = VisionEngine(copy.deepcopy(square), plain, Plan(DEVICE, dtype, backend))
        asked = partial(_ask, fixed, squares)
        ways.append(Way("square", backend, fixed.plan.dtype, asked, 0.0, _timer(fixed.runner)))
    return Setup(ways)


def check_attention() -> None:
    """Compare the attention kernel with torch's in float32 at random lengths; exit if it is wrong."""
    worst = 0.0
    for tokens, (heads, depth), dtype in product((1, 100, 256, 600), _HEADS, (torch.bfloat16, torch.float16)):
        lengths = torch.randint(1, tokens + 1, (5,), device=DEVICE, dtype=torch.int32)
        real = torch.arange(tokens, device=DEVICE) < lengths[:, None]
        qkv = torch.randn(5 * tokens, 3 * heads * depth, device=DEVICE).to(dtype)
        got = ragged.attend(qkv, lengths, heads)
        q, k, v = qkv.float().view(5, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4)
        exact = F.scaled_dot_product_attention(q, k, v, real[:, None, None]).transpose(1, 2).flatten(2)
        difference = got.view(5, tokens, -1).float()[real] - exact[real]
        error = float(difference.norm() / exact[real].norm()) / torch.finfo(dtype).eps
        worst = max(worst, error)
        if not (error < 1 and got.isfinite().all()):
            sys.exit(f"attention of {tokens} tokens, depth {depth}, {dtype}: error of {error:.2f} steps")
    print(f"attention: error of at most {worst:.2f} rounding steps", flush=True)


def _square_of(naflex: NaflexVisionTower) -> VisionTower:
    """The tower for squares with the weights of a NaFlex tower."""
    state = naflex.state_dict()
    name = "embeddings.patch_embedding.weight"
    state[name] = state[name].unflatten(1, (PATCH, PATCH, 3)).permute(0, 3, 1, 2).contiguous()
    tower = VisionTower(naflex.config).eval().requires_grad_(False)
    tower.load_state_dict(state)
    return tower


def _patches_of(squares: NDArray[np.uint8], image: NaflexImageConfig, largest: float) -> PatchRows:
    """Take the first patches of each square, as many as the grid of an aspect ratio has."""
    count, side = len(squares), SIDE // PATCH
    cut = squares.reshape(count, side, PATCH, side, PATCH, 3).swapaxes(2, 3).reshape(count, MOST, -1)
    sizes = [(round(400 * one**-0.5), round(400 * one**0.5)) for one in aspects(count, largest)]
    return PatchRows(np.ascontiguousarray(cut), np.array([patch_grid(image, *size) for size in sizes]))


def _ask(ours: NaflexEngine | VisionEngine, rows: Any, part: slice) -> NDArray[np.float32]:
    return ours(rows[part]).outputs["EMBEDDING"]


def _timer(runner: Any) -> partial[float] | None:
    """The timer of a runner whose passes are recorded, else None."""
    return partial(_device_seconds, runner) if hasattr(runner, "replays") else None


@torch.inference_mode()
def _device_seconds(runner: Any) -> float:
    """Median seconds per picture of full passes over rows in the device's memory."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run = runner.replays.replay_of(runner.max_rows)
    run()
    times = []
    for _ in range(_TIMES):
        start.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4000 / runner.max_rows)
    return median(times)

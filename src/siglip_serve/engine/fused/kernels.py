"""GPU kernels in Triton's language, for computations that torch has no single fast operation for.

Each kernel is one pass over memory. A program holds one row of activations, in two blocks whose lengths are
powers of two. A row of 4304 takes blocks of 4096 and 256, since one of 8192 would leave almost half of the
lanes idle. Importing this module needs the package triton. `TRITON_INTERPRET=1` runs the kernels on a CPU.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from siglip_serve.towers.clip_rules import QUICK_GELU

__all__ = [
    "FLOAT8",
    "ON_GPU",
    "Branch",
    "activate",
    "activation_of",
    "cut_patches",
    "gelu_quantize",
    "is_fast",
    "largest_norm_scale",
    "layer_norm",
    "normalize_quantize",
]

FLOAT8 = torch.float8_e4m3fn
Branch = tuple[Tensor, Tensor]

_LARGEST = torch.finfo(FLOAT8).max
_SMALLEST_AMAX = 1e-12  # a row of zeros has a scale too
_HALF_SLOPE = tl.constexpr(QUICK_GELU / 2)
_ELEMENTS = 4096  # that a program of `activate` computes
ON_GPU = not os.environ.get("TRITON_INTERPRET")


def largest_norm_scale(width: int) -> float:
    """Return the largest factor of normalised rows in float8: their entries are at most sqrt(width)."""
    return _LARGEST / math.sqrt(width)


def layer_norm(x: Tensor, offset: Tensor, norm: nn.LayerNorm, branch: Branch | None = None) -> Tensor:
    """Compute LayerNorm(x + offset), after x += branch.

    Args:
        x: [M, W], 16 bits. It is overwritten if there is a branch.
        offset: [W] float32.
        norm: weight and bias in float32.
        branch: [M, W], 16 bits, and [M] float32, a factor per row.

    Returns:
        [M, W] of x's dtype.
    """
    return _normalize(x, offset, norm.eps, branch, norm)


def normalize_quantize(x: Tensor, offset: Tensor, eps: float, branch: Branch | None = None) -> Tensor:
    """Compute `layer_norm` without weight and bias, times `largest_norm_scale(W)`, as float8 [M, W]."""
    return _normalize(x, offset, eps, branch, None)


def _normalize(
    x: Tensor, offset: Tensor, eps: float, branch: Branch | None, affine: nn.LayerNorm | None
) -> Tensor:
    rows, width = x.shape
    out = torch.empty_like(x, dtype=x.dtype if affine else FLOAT8)
    weight, bias = (affine.weight, affine.bias) if affine else (offset, offset)
    added, row_scale = branch or (x, offset)
    scale = 1.0 if affine else largest_norm_scale(width)
    first, second = _parts(width)
    _norm[(rows,)](
        x, added, row_scale, offset, weight, bias, out, eps, scale, width,
        branch is not None, affine is not None, first, second, num_warps=1,
    )  # fmt: skip
    return out


def gelu_quantize(x: Tensor, scale: Tensor) -> Branch:
    """Compute gelu(x * scale) in the tanh form, scaled row by row to float8.

    Args:
        x: [M, W] float8.
        scale: float32 scalar.

    Returns:
        [M, W] float8, and [M] float32, the factor of each row.
    """
    rows, width = x.shape
    out = torch.empty_like(x, dtype=FLOAT8)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    first, second = _parts(width)
    _gelu_quantize[(rows,)](
        x, scale, out, scales, _LARGEST, _SMALLEST_AMAX, width, ON_GPU, first, second,
        num_warps=4,
    )  # fmt: skip
    return out, scales


def activate(x: Tensor, activation: str) -> Tensor:
    """Compute an activation in place, and in float32.

    Args:
        x: contiguous, 16 bits.
        activation: its name in `towers.siglip.ACTIVATIONS`.

    Returns:
        x.
    """
    count = x.numel()
    _activate[(triton.cdiv(count, _ELEMENTS),)](
        x, count, activation, is_fast(x.dtype), _ELEMENTS, num_warps=4
    )
    return x


def is_fast(dtype: torch.dtype) -> bool:
    """Return True if activations that are rounded to a type may be computed by the GPU's approximate tanh."""
    return ON_GPU and dtype is not torch.float16


def cut_patches(pixels: Tensor, patch: int, centre: Tensor, out: Tensor) -> None:
    """Cut images into patches, one row of numbers each, and subtract the middle of each channel.

    Args:
        pixels: [n, S, S, 3] uint8. Pixels beyond the last whole patch are not seen.
        patch: pixels per side.
        centre: [3] float32, whole numbers.
        out: [n * T, K], where the rows are written. K is at least patch * patch * 3. The rest of a row
            becomes zeros. T is (S // patch)^2 or more. Each image then begins with rows of zeros.
    """
    size, width = pixels.shape[1], out.shape[1]
    grid = size // patch
    before = len(out) // len(pixels) - grid * grid
    _cut_patches[(len(out),)](
        pixels, centre, out, size, grid, width, before, patch, triton.next_power_of_2(width), num_warps=4
    )


def _parts(width: int) -> tuple[int, int]:
    """Return two powers of two that together cover `width`, the second 0 if one is enough."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return first, 1 << (rest - 1).bit_length() if rest else 0


@triton.jit
def _load(pointer, start, block: tl.constexpr, width):
    """Load `block` values from `start` as float32, zero beyond `width`."""
    column = start + tl.arange(0, block)
    return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, values, start, block: tl.constexpr, width):
    column = start + tl.arange(0, block)
    tl.store(pointer + column, values.to(pointer.dtype.element_ty), mask=column < width)


@triton.jit
def _stream(x, branch, row_scale, offset, start, width, BRANCH: tl.constexpr, block: tl.constexpr):
    """Load a part of the residual stream with its offset, after a branch was added to it in memory."""
    values = _load(x, start, block, width)
    if BRANCH:
        values += _load(branch, start, block, width) * row_scale
        _store(x, values, start, block, width)
    return values + _load(offset, start, block, width)


@triton.jit
def _centred(values, mean, start, block: tl.constexpr, width):
    column = start + tl.arange(0, block)
    return tl.where(column < width, values - mean, 0.0)


@triton.jit
def _finish(values, weight, bias, out, start, width, AFFINE: tl.constexpr, block: tl.constexpr):
    if AFFINE:
        values = values * _load(weight, start, block, width) + _load(bias, start, block, width)
    _store(out, values, start, block, width)


@triton.jit
def _norm(
    x, branch, row_scales, offset, weight, bias, out, eps, scale, width,
    BRANCH: tl.constexpr, AFFINE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    row_scale = tl.load(row_scales + tl.program_id(0)) if BRANCH else 0.0
    a = _stream(x + row, branch + row, row_scale, offset, 0, width, BRANCH, FIRST)
    total = tl.sum(a)
    if SECOND:
        b = _stream(x + row, branch + row, row_scale, offset, FIRST, width, BRANCH, SECOND)
        total += tl.sum(b)
    mean = total / width
    a = _centred(a, mean, 0, FIRST, width)
    squares = tl.sum(a * a)
    if SECOND:
        b = _centred(b, mean, FIRST, SECOND, width)
        squares += tl.sum(b * b)
    factor = tl.rsqrt(squares / width + eps) * scale
    _finish(a * factor, weight, bias, out + row, 0, width, AFFINE, FIRST)
    if SECOND:
        _finish(b * factor, weight, bias, out + row, FIRST, width, AFFINE, SECOND)


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    """With FAST it is one instruction of GPUs, exact to 2^-11, which is finer than rounding to bfloat16."""
    if FAST:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        t = 2 * tl.sigmoid(2 * x) - 1
    return t


@triton.jit
def activation_of(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """Compute one of `towers.siglip.ACTIVATIONS` of float32, or nothing for an empty name."""
    half = 0.5 * x
    if ACTIVATION == "gelu_pytorch_tanh":
        x = half + half * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x), FAST)
    elif ACTIVATION == "quick_gelu":  # a sigmoid is half of 1 + tanh
        x = half + half * _tanh(x * _HALF_SLOPE, FAST)
    elif ACTIVATION == "gelu":
        x = half * (1 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _gelu_quantize(
    x, scale, out, scales, largest, smallest_amax, width,
    FAST: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    scale = tl.load(scale)
    a = activation_of(_load(x + row, 0, FIRST, width) * scale, "gelu_pytorch_tanh", FAST)
    amax = tl.max(tl.abs(a))
    if SECOND:
        b = activation_of(_load(x + row, FIRST, SECOND, width) * scale, "gelu_pytorch_tanh", FAST)
        amax = tl.maximum(amax, tl.max(tl.abs(b)))
    amax = tl.maximum(amax, smallest_amax)
    tl.store(scales + tl.program_id(0), amax / largest)
    factor = largest / amax
    _store(out + row, a * factor, 0, FIRST, width)
    if SECOND:
        _store(out + row, b * factor, FIRST, SECOND, width)


@triton.jit
def _activate(x, count, ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + place, activation_of(values, ACTIVATION, FAST).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _cut_patches(
    pixels, centre, out, size, grid, width, BEFORE: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    line, place = column // (3 * PATCH), column % (3 * PATCH)  # line in the patch, and place in the line
    tokens = grid * grid + BEFORE
    image, patch = row // tokens, row % tokens - BEFORE
    down, across = patch // grid, patch % grid
    source = ((image.to(tl.int64) * size + down * PATCH + line) * size + across * PATCH) * 3 + place
    inside = column < tl.where(patch < 0, 0, 3 * PATCH * PATCH)
    values = tl.load(pixels + source, mask=inside, other=0).to(tl.float32) - tl.load(centre + place % 3)
    values = tl.where(inside, values, 0.0)
    tl.store(out + row.to(tl.int64) * width + column, values.to(out.dtype.element_ty), mask=column < width)

"""GPU kernels that turn planes of JPEGs into RGB, with libjpeg's whole-number arithmetic, and resize it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_serve.images.jpeg import PlainFrame

__all__ = ["resample", "to_rgb"]

_BLOCK = 1024
_THREADS = 256


def to_rgb(
    planes: Tensor, frame: PlainFrame, place: tuple[int, int, int, int], unwritten: int
) -> tuple[Tensor, Tensor]:
    """Planes of n pictures of one size become pixels.

    Args:
        planes: [n, bytes] uint8, one picture per row, its brightness first.
        frame: of all pictures.
        place: bytes from one row of brightness to the next, the same of colour, and where in a picture's
            bytes its two planes of colour begin.
        unwritten: what the memory held before.

    Returns:
        [n, 3, height, width] uint8; and [n] int32, 1 where all planes of the picture were written to
        their ends, else 0.
    """
    height, width, sampling = frame
    down, across = sampling == "4:2:0", sampling in ("4:2:0", "4:2:2")
    out = torch.empty(len(planes), 3, height, width, dtype=torch.uint8, device=planes.device)
    written = torch.empty(len(planes), dtype=torch.int32, device=planes.device)
    _to_rgb[(triton.cdiv(height * width, _BLOCK), len(planes))](
        planes, out, written, planes.stride(0), height, width,
        -(-height // (1 + down)), -(-width // (1 + across)), *place,
        sampling == "gray", across, down, unwritten, _BLOCK,
    )  # fmt: skip
    return out, written


def resample(pixels: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of neighbours along one axis, in float32, rounded and clipped.

    Each result weighs few of a line's pixels. A product with a matrix of all weights would multiply mostly by
    zeros, and would need the picture in float32. A sum has the same order in any batch.

    Args:
        pixels: [outer, length, inner] uint8, contiguous.
        starts: [count] int32, the first pixel that each result weighs. `taps - 1` more follow it.
        weights: [taps, count] float32.

    Returns:
        [outer, count, inner] uint8, of fewer than 2^31 elements.
    """
    outer, length, inner = pixels.shape
    taps, count = weights.shape
    out = torch.empty(outer, count, inner, dtype=torch.uint8, device=pixels.device)
    # One result per thread: neighbours read neighbouring bytes.
    _resample[(triton.cdiv(out.numel(), _THREADS),)](
        pixels, starts, weights, out, out.numel(), length, inner, count, taps,
        _THREADS, num_warps=_THREADS // 32,
    )  # fmt: skip
    return out


@triton.jit
def _column_sums(plane, row, other, column, pitch, inside, DOWN: tl.constexpr):
    near = tl.load(plane + row * pitch + column, mask=inside, other=0).to(tl.int32)
    if DOWN:
        return 3 * near + tl.load(plane + other * pitch + column, mask=inside, other=0).to(tl.int32)
    return near


@triton.jit
def _full_size(plane, y, x, height, width, pitch, inside, ACROSS: tl.constexpr, DOWN: tl.constexpr):
    """A colour plane at the picture's places: three quarters of the nearest sample, one of the next."""
    row, other, column = y, y, x
    if DOWN:
        row = y // 2
        other = tl.minimum(tl.maximum(row + 2 * (y % 2) - 1, 0), height - 1)
    if ACROSS:
        column = x // 2
        beside = tl.minimum(tl.maximum(column + 2 * (x % 2) - 1, 0), width - 1)
        near = _column_sums(plane, row, other, column, pitch, inside, DOWN)
        far = _column_sums(plane, row, other, beside, pitch, inside, DOWN)
        if DOWN:
            return (3 * near + far + 8 - x % 2) >> 4
        return (3 * near + far + 1 + x % 2) >> 2
    return _column_sums(plane, row, other, column, pitch, inside, False)


@triton.jit
def _changed(plane, y, x, pitch, last, ACROSS: tl.constexpr, DOWN: tl.constexpr, UNWRITTEN: tl.constexpr):
    """Number of the last samples that a decoder has written."""
    row, column = y, x
    if DOWN:
        row = y // 2
    if ACROSS:
        column = x // 2
    samples = tl.load(plane + row * pitch + column, mask=last, other=UNWRITTEN).to(tl.int32)
    return tl.sum((samples != UNWRITTEN).to(tl.int32), axis=0)


@triton.jit
def _store(pointer, values, inside):
    tl.store(pointer, tl.minimum(tl.maximum(values, 0), 255).to(tl.uint8), mask=inside)


# Not compiled anew for every kind of size: a request would wait for that.
@triton.jit(
    do_not_specialize=[
        "stride", "height", "width", "chroma_height", "chroma_width", "pitch", "chroma_pitch", "blue", "red"
    ]
)  # fmt: skip
def _to_rgb(
    planes, out, written, stride, height, width, chroma_height, chroma_width, pitch, chroma_pitch, blue, red,
    GRAY: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, UNWRITTEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    picture = tl.program_id(1).to(tl.int64)
    pixels = height * width
    inside = place < pixels
    down, across = place // width, place % width
    luma = planes + picture * stride
    first = out + picture * 3 * pixels
    y = tl.load(luma + down * pitch + across, mask=inside, other=0).to(tl.int32)
    if GRAY:
        _store(first + place, y, inside)
        _store(first + pixels + place, y, inside)
        _store(first + 2 * pixels + place, y, inside)
    else:
        cb = _full_size(
            luma + blue, down, across, chroma_height, chroma_width, chroma_pitch, inside, ACROSS, DOWN
        )
        cr = _full_size(
            luma + red, down, across, chroma_height, chroma_width, chroma_pitch, inside, ACROSS, DOWN
        )
        cb, cr = cb - 128, cr - 128
        # 1.402, 0.34414, 0.71414 and 1.772, times 2^16
        _store(first + place, y + ((91881 * cr + 32768) >> 16), inside)
        _store(first + pixels + place, y + ((32768 - 22554 * cb - 46802 * cr) >> 16), inside)
        _store(first + 2 * pixels + place, y + ((116130 * cb + 32768) >> 16), inside)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        last = inside & (place >= pixels - 16)
        whole = _changed(luma, down, across, pitch, last, False, False, UNWRITTEN) > 0
        if not GRAY:
            whole &= _changed(luma + blue, down, across, chroma_pitch, last, ACROSS, DOWN, UNWRITTEN) > 0
            whole &= _changed(luma + red, down, across, chroma_pitch, last, ACROSS, DOWN, UNWRITTEN) > 0
        tl.store(written + picture, whole.to(tl.int32))


@triton.jit(do_not_specialize=["total", "length", "inner", "count", "taps"])
def _resample(pixels, starts, weights, out, total, length, inner, count, taps, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    line, within = place // inner, place % inner
    outer, result = line // count, line % count
    first = tl.load(starts + result, mask=inside, other=0)
    pixel = pixels + (outer.to(tl.int64) * length + first) * inner + within
    weight = weights + result
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(taps):
        value = tl.load(pixel, mask=inside, other=0).to(tl.float32)
        sums += value * tl.load(weight, mask=inside, other=0.0)
        pixel += inner
        weight += count
    rounded = tl.minimum(tl.maximum(tl.floor(sums + 0.5), 0.0), 255.0)
    tl.store(out + place, rounded.to(tl.uint8), mask=inside)

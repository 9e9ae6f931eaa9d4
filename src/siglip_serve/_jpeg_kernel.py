"""A GPU kernel that turns the planes of a JPEG into RGB, with the whole-number arithmetic of libjpeg."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["to_rgb"]

_BLOCK = 1024


def to_rgb(planes: Tensor, height: int, width: int, chroma: tuple[int, int], sampling: str) -> Tensor:
    """Planes one after the other, without gaps, become pixels.

    Args:
        planes: [n, bytes] uint8.
        height, width: of the pictures.
        chroma: height and width of the colour planes.
        sampling: `gray`, `4:4:4`, `4:2:2` or `4:2:0`.

    Returns:
        [n, 3, height, width] float32, whole numbers from 0 to 255.
    """
    out = torch.empty(len(planes), 3, height, width, dtype=torch.float32, device=planes.device)
    _to_rgb[(triton.cdiv(height * width, _BLOCK), len(planes))](
        planes, out, planes.shape[1], height, width, chroma[0], chroma[1],
        sampling == "gray", sampling in ("4:2:0", "4:2:2"), sampling == "4:2:0", _BLOCK,
    )  # fmt: skip
    return out


@triton.jit
def _column_sums(plane, row, other, column, width, inside, DOWN: tl.constexpr):
    near = tl.load(plane + row * width + column, mask=inside, other=0).to(tl.int32)
    if DOWN:
        return 3 * near + tl.load(plane + other * width + column, mask=inside, other=0).to(tl.int32)
    return near


@triton.jit
def _full_size(plane, y, x, height, width, inside, ACROSS: tl.constexpr, DOWN: tl.constexpr):
    """A colour plane at the picture's places: three quarters of the nearest sample, one of the next."""
    row, other, column = y, y, x
    if DOWN:
        row = y // 2
        other = tl.minimum(tl.maximum(row + 2 * (y % 2) - 1, 0), height - 1)
    if ACROSS:
        column = x // 2
        beside = tl.minimum(tl.maximum(column + 2 * (x % 2) - 1, 0), width - 1)
        near = _column_sums(plane, row, other, column, width, inside, DOWN)
        far = _column_sums(plane, row, other, beside, width, inside, DOWN)
        if DOWN:
            return (3 * near + far + 8 - x % 2) >> 4
        return (3 * near + far + 1 + x % 2) >> 2
    return _column_sums(plane, row, other, column, width, inside, False)


@triton.jit
def _store(pointer, values, inside):
    tl.store(pointer, tl.minimum(tl.maximum(values, 0), 255).to(tl.float32), mask=inside)


# Not compiled anew for every kind of size: somebody would wait for that.
@triton.jit(do_not_specialize=["size", "height", "width", "chroma_height", "chroma_width"])
def _to_rgb(
    planes, out, size, height, width, chroma_height, chroma_width,
    GRAY: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixels = height * width
    inside = place < pixels
    luma = planes + tl.program_id(1).to(tl.int64) * size
    red = out + tl.program_id(1).to(tl.int64) * 3 * pixels
    y = tl.load(luma + place, mask=inside, other=0).to(tl.int32)
    if GRAY:
        _store(red + place, y, inside)
        _store(red + pixels + place, y, inside)
        _store(red + 2 * pixels + place, y, inside)
    else:
        down, across = place // width, place % width
        blue_plane = luma + pixels
        red_plane = blue_plane + chroma_height * chroma_width
        cb = _full_size(blue_plane, down, across, chroma_height, chroma_width, inside, ACROSS, DOWN) - 128
        cr = _full_size(red_plane, down, across, chroma_height, chroma_width, inside, ACROSS, DOWN) - 128
        # 1.402, 0.34414, 0.71414 and 1.772, times 2^16
        _store(red + place, y + ((91881 * cr + 32768) >> 16), inside)
        _store(red + pixels + place, y + ((32768 - 22554 * cb - 46802 * cr) >> 16), inside)
        _store(red + 2 * pixels + place, y + ((116130 * cb + 32768) >> 16), inside)

"""Kernels for images of different numbers of patches, which lie in rows of one length (NaFlex).

The first tokens of a row, one for each patch of its image, are real. Attention reads no keys behind them.
The kernels are written in Triton's language, as those of `kernels.py` are.

Shapes: n images, T tokens of a row, H heads, d their depth, P side of a patch, G side of the learned grid.

Source of the attention's order of work: "FlashAttention-2" (Dao, 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend", "place_patches"]

_QUERIES, _KEYS = 128, 64  # of a tile
_LEAST_DEPTH = 16  # of a product of tiles


def attend(qkv: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """Self-attention to the first tokens of each row.

    Args:
        qkv: [n * T, 3 * H * d], contiguous; queries, keys and values, head by head.
        lengths: [n] int32 on the device, tokens of each row that are real, 1 to T.
        heads: H.

    Returns:
        [n * T, H * d] of the same dtype. What belongs to other tokens is finite, without meaning.
    """
    rows = len(lengths)
    tokens, width = len(qkv) // rows, qkv.shape[1] // 3
    out = torch.empty(len(qkv), width, dtype=qkv.dtype, device=qkv.device)
    depth = width // heads
    first, second = _depths(depth)
    # Exponentials are powers of two.
    _attend[(triton.cdiv(tokens, _QUERIES), rows * heads)](
        qkv, lengths, out, math.log2(math.e) * depth**-0.5, tokens, heads,
        depth, first, second, _QUERIES, _KEYS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def place_patches(patches: Tensor, grids: Tensor, learned: int, centre: Tensor, out: Tensor) -> None:
    """Write patches as floats, each followed by the shares of the learned positions in its own.

    The shares are those of `towers.naflex.NaflexEmbeddings`: bilinear with antialias.

    Args:
        patches: [n, T, 3 P P] uint8, contiguous.
        grids: [n, 2] int64, rows and columns of each image, at least 1.
        learned: G.
        centre: [3] float32, whole numbers that are subtracted from the channels.
        out: [n * T, K], where the rows are written. K is at least 3 P P + G G. The rest of a row becomes
            zeros, and so does the row of a token that is not real.
    """
    _, tokens, pixels = patches.shape
    _place[(len(out),)](
        patches, grids, centre, out, tokens, pixels, out.shape[1], learned,
        triton.next_power_of_2(learned), triton.next_power_of_2(out.shape[1]), num_warps=4,
    )  # fmt: skip


def _depths(depth: int) -> tuple[int, int]:
    """Return two powers of two, 16 or more, that together cover a head; the second is 0 if one is enough."""
    first = max(_LEAST_DEPTH, 1 << (depth.bit_length() - 1))
    rest = depth - first
    return first, max(_LEAST_DEPTH, triton.next_power_of_2(rest)) if rest > 0 else 0


@triton.jit
def _tile(pointer, token, column, length, depth, step):
    """Load values [token, column] of a head, zero behind `length` tokens and behind its depth."""
    inside = (token < length)[:, None] & (column < depth)[None, :]
    return tl.load(pointer + token.to(tl.int64)[:, None] * step + column[None, :], mask=inside, other=0.0)


@triton.jit
def _keep(pointer, values, token, column, tokens, depth, step):
    inside = (token < tokens)[:, None] & (column < depth)[None, :]
    place = pointer + token.to(tl.int64)[:, None] * step + column[None, :]
    tl.store(place, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    qkv, lengths, out, scale, tokens, heads,
    DEPTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    start = tl.program_id(0) * QUERIES
    length = tl.load(lengths + row)
    width = heads * DEPTH
    step = 3 * width
    query = qkv + row.to(tl.int64) * tokens * step + head * DEPTH
    key, value = query + width, query + 2 * width
    token, low = start + tl.arange(0, QUERIES), tl.arange(0, FIRST)
    q = _tile(query, token, low, tokens, DEPTH, step)
    mixed = tl.zeros([QUERIES, FIRST], tl.float32)
    if SECOND:
        high = FIRST + tl.arange(0, SECOND)
        q_high = _tile(query, token, high, tokens, DEPTH, step)
        mixed_high = tl.zeros([QUERIES, SECOND], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    # A tile of no real query stays zero. NaN there would spread through the pooling, whose weight is zero.
    for first in range(0, tl.where(start < length, length, 0), KEYS):
        other = first + tl.arange(0, KEYS)
        scores = tl.dot(q, tl.trans(_tile(key, other, low, length, DEPTH, step)))
        if SECOND:
            scores += tl.dot(q_high, tl.trans(_tile(key, other, high, length, DEPTH, step)))
        scores = tl.where((other < length)[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(shares, 1)
        shares = shares.to(q.dtype)
        mixed = mixed * keep[:, None] + tl.dot(shares, _tile(value, other, low, length, DEPTH, step))
        if SECOND:
            part = _tile(value, other, high, length, DEPTH, step)
            mixed_high = mixed_high * keep[:, None] + tl.dot(shares, part)
        top = new_top
    factor = 1 / tl.where(total > 0, total, 1.0)[:, None]
    result = out + row.to(tl.int64) * tokens * width + head * DEPTH
    _keep(result, mixed * factor, token, low, tokens, DEPTH, width)
    if SECOND:
        _keep(result, mixed_high * factor, token, high, tokens, DEPTH, width)


@triton.jit
def _shares(index, count, learned, place):
    """Weigh a learned place of one axis for place `index` of `count`, not normalised."""
    scale = 1.0 * learned / count
    centre = (index + 0.5) * scale - 0.5
    return tl.maximum(1 - tl.abs(place - centre) / tl.maximum(scale, 1.0), 0.0)


@triton.jit
def _total(index, count, learned, SIDE: tl.constexpr):
    place = tl.arange(0, SIDE)
    return tl.sum(tl.where(place < learned, _shares(index, count, learned, place), 0.0))


@triton.jit
def _place(
    patches, grids, centre, out, tokens, pixels, width, learned, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    image, index = token // tokens, token % tokens
    rows, columns = tl.load(grids + 2 * image).to(tl.int32), tl.load(grids + 2 * image + 1).to(tl.int32)
    column = tl.arange(0, BLOCK)
    pixel = column < pixels
    values = tl.load(patches + token.to(tl.int64) * pixels + column, mask=pixel, other=0).to(tl.float32)
    values -= tl.load(centre + column % 3)
    down, across = tl.minimum(index // columns, rows - 1), index % columns
    place = column - pixels
    shares = _shares(down, rows, learned, place // learned) * _shares(
        across, columns, learned, place % learned
    )
    shares /= _total(down, rows, learned, SIDE) * _total(across, columns, learned, SIDE)
    shares = tl.where(place < learned * learned, shares, 0.0)
    values = tl.where(index < rows * columns, tl.where(pixel, values, shares), 0.0)
    tl.store(out + token.to(tl.int64) * width + column, values.to(out.dtype.element_ty), mask=column < width)

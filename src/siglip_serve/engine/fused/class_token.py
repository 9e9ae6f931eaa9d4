"""A kernel in Triton's language for heatmaps of CLIP: all layers at once, so that none is copied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["taken"]

_TOKENS = 32  # that a program reads at once
_VECTORS = 32  # of one launch, since each has a row of memory for every head of every layer


def taken(qkv: Tensor, seen: Tensor, heads: int) -> Tensor:
    """Compute what the class token of one image took from each token in all layers, as vectors see it.

    Args:
        qkv: [L, T, 3 * W], contiguous, queries, keys and values of L layers, head by head.
        seen: [L, P, W] float32, how vectors see the mixed values of each layer.
        heads: of a layer.

    Returns:
        [1, P, T] float32.
    """
    layers, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    depth = width // heads
    found = torch.empty(seen.shape[1], tokens, dtype=torch.float32, device=qkv.device)
    for some, rows in zip(seen.split(_VECTORS, 1), found.split(_VECTORS), strict=True):
        parts = torch.empty(layers * heads, *rows.shape, dtype=torch.float32, device=qkv.device)
        _taken[(layers * heads,)](
            qkv, some.contiguous(), parts, tokens, width, heads, len(rows), depth, depth**-0.5,
            _TOKENS, triton.next_power_of_2(depth), num_warps=4,
        )  # fmt: skip
        torch.sum(parts, 0, out=rows)
    return found[None]


@triton.jit
def _scores(key, query, first, tokens, line, scale, inside, column, TOKENS: tl.constexpr):
    """Return how much the class token looks at some tokens, and minus infinity behind the last."""
    token = first + tl.arange(0, TOKENS)
    places = token[:, None] * line + column[None]
    keys = tl.load(key + places, mask=(token < tokens)[:, None] & inside[None], other=0.0).to(tl.float32)
    return tl.where(token < tokens, tl.sum(keys * query[None], 1) * scale, float("-inf"))


@triton.jit
def _taken(
    qkv, seen, parts, tokens, width, heads, vectors, depth, scale, TOKENS: tl.constexpr, DEPTH: tl.constexpr
):
    """One head of one layer: its attention at the class token, times its values as each vector sees them."""
    item = tl.program_id(0)
    layer, head = item // heads, item % heads
    line = 3 * width
    query = qkv + layer.to(tl.int64) * tokens * line + head * depth
    key, value = query + width, query + 2 * width
    column = tl.arange(0, DEPTH)
    inside = column < depth
    q = tl.load(query + column, mask=inside, other=0.0).to(tl.float32)

    largest, total = float("-inf"), 0.0
    for first in range(0, tokens, TOKENS):
        scores = _scores(key, q, first, tokens, line, scale, inside, column, TOKENS)
        larger = tl.maximum(largest, tl.max(scores))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger))
        largest = larger

    for first in range(0, tokens, TOKENS):
        scores = _scores(key, q, first, tokens, line, scale, inside, column, TOKENS)
        weights = tl.exp(scores - largest) / total
        token = first + tl.arange(0, TOKENS)
        places = token[:, None] * line + column[None]
        values = tl.load(value + places, mask=(token < tokens)[:, None] & inside[None], other=0.0)
        weighted = values.to(tl.float32) * weights[:, None]
        for vector in range(vectors):
            form = tl.load(
                seen + (layer * vectors + vector) * width + head * depth + column, mask=inside, other=0.0
            )
            found = tl.sum(weighted * form[None], 1)
            tl.store(parts + (item * vectors + vector) * tokens + token, found, mask=token < tokens)

"""Matrix products that compute an activation before they write, in Triton's language, on Hopper GPUs.

cuBLASLt has the tanh form of the GELU, and no library has CLIP's activation, which would take another pass
over memory. Importing this module needs the package triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_serve.engine.fused.cublaslt import Kind
from siglip_serve.engine.fused.kernels import activation_of, is_fast

__all__ = ["is_supported", "product"]

_CAPABILITY = (9, 0)  # where it was measured
_TILE = 128, 256, 64  # rows and columns of the result, and terms of the sums that are read at once
_GROUP = 4  # tiles of rows that share what the cache holds of w
_WARPS, _STAGES = 8, 3


def is_supported(kind: Kind, device: int) -> bool:
    """Return True if `product` computes a kind of product on a GPU."""
    # The Tensor Memory Accelerator takes rows that begin at multiples of 16 bytes.
    aligned = kind.k % 8 == 0 and kind.n % 8 == 0
    takes = bool(kind.activation) and kind.inputs.itemsize == 2 and aligned
    return takes and torch.cuda.get_device_capability(device) == _CAPABILITY


def product(x: Tensor, w: Tensor, out: Tensor, bias: Tensor, activation: str) -> None:
    """Compute activation(x w + bias), in float32 up to the result.

    Args:
        x: [M, K], contiguous, 16 bits.
        w: [K, N] of the same dtype, column by column.
        out: [M, N] of the same dtype, which is written.
        bias: [N] of the same dtype.
        activation: its name in `towers.siglip.ACTIVATIONS`, or empty.
    """
    rows, columns, terms = _TILE
    tiles = triton.cdiv(x.shape[0], rows) * triton.cdiv(w.shape[1], columns)
    programs = min(tiles, _processors(x.device))
    _product[(programs,)](
        TensorDescriptor.from_tensor(x, [rows, terms]),
        TensorDescriptor.from_tensor(w.t(), [columns, terms]),
        TensorDescriptor.from_tensor(out, [rows, columns // 2]),
        bias, *out.shape, x.shape[1], programs, activation, is_fast(x.dtype), rows, columns, terms, _GROUP,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


def _processors(device: torch.device) -> int:
    """Return how many programs of this kernel a GPU runs at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _place(tile, rows_of_tiles, columns_of_tiles, GROUP: tl.constexpr):
    """Return the row and the column of a tile. Tiles that run at the same time are near each other."""
    group = tile // (GROUP * columns_of_tiles)
    rows = tl.minimum(rows_of_tiles - group * GROUP, GROUP)
    place = tile % (GROUP * columns_of_tiles)
    return group * GROUP + place % rows, place // rows


@triton.jit
def _epilogue(sums, bias, column, n, ACTIVATION: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the bias of some columns to sums [rows, COLUMNS], and compute the activation."""
    columns = column + tl.arange(0, COLUMNS)
    sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None]
    return activation_of(sums, ACTIVATION, FAST)


@triton.jit
def _product(
    x, w, out, bias, m, n, k, programs, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    # The next tile is read while this one is written, as if both were iterations of one loop.
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        row, column = _place(tile, down, across, GROUP)
        row, column = row * ROWS, column * COLUMNS
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for term in range(0, k, TERMS):
            sums = tl.dot(x.load([row, term]), w.load([column, term]).T, sums)
        # The left and the right half, one after the other: a whole tile finds no room in shared memory.
        halves = tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        left = _epilogue(left, bias, column, n, ACTIVATION, FAST, COLUMNS // 2)
        out.store([row, column], left.to(out.dtype))
        column += COLUMNS // 2
        right = _epilogue(right, bias, column, n, ACTIVATION, FAST, COLUMNS // 2)
        out.store([row, column], right.to(out.dtype))

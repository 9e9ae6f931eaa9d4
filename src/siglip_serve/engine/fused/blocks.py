"""Transformer blocks on NVIDIA GPUs: few, large operations on [M, W] rows.

They compute what the blocks of `towers/siglip.py` do, which are CLIP's too, with fewer passes over memory:

- Attention reads queries, keys and values where one product has written them. It runs by a kernel of our own
  where there is one for the GPU and the shape, else by cuDNN.
- LayerNorm is one pass. The last product of a branch adds to the residual stream directly. Its bias, and all
  biases before it, are added where the next LayerNorm reads the stream.
- The activation is computed by the matrix product that feeds it, before the result is written. Small passes
  leave that to cuBLAS, which has only the tanh form of the GELU. Others are one more pass there, in place.

`benchmarks/vision_waterfall.py` measures how much each of these gains.

Shapes: M rows of all images or texts together, T tokens of one, W width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip_serve.engine.fused import attention, kernels, products, ragged
from siglip_serve.towers.siglip import Block

__all__ = [
    "Blocks",
    "Layer",
    "Stack",
    "attend",
    "attend_by_cudnn",
    "attend_by_torch",
    "columns",
    "round_matrices",
]


# By speed; the later ones take what the earlier ones refuse.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Stack(Protocol):
    """Blocks, and the LayerNorm behind them, that run as one.

    With `lengths`, [rows] int32 on the device, attention reads each row up to its length.
    """

    def __call__(self, x: Tensor, rows: int, lengths: Tensor | None = None) -> Tensor:
        """Tokens [M, W] of `rows` images or texts -> normalised tokens [M, W]. x is overwritten."""

    def stream(self, x: Tensor, rows: int, count: int, lengths: Tensor | None = None) -> Tensor:
        """Tokens [M, W] -> the residual stream behind the first `count` blocks, [M, W] float32.

        x is overwritten.
        """


class Blocks:
    """A stack with products in 16 bits.

    Args:
        layers: on the device, with LayerNorms and biases in float32.
        final: the LayerNorm behind them, float32.
        dtype: bfloat16 or float16.
    """

    def __init__(self, layers: Sequence[Block], final: nn.LayerNorm, dtype: torch.dtype) -> None:
        self._final = final
        self._layers: list[Layer] = []
        self._offset = torch.zeros_like(final.weight)
        for block in layers:
            self._layers.append(Layer(block, dtype, self._offset))
            self._offset = self._layers[-1].offset_after

    def __call__(self, x: Tensor, rows: int, lengths: Tensor | None = None) -> Tensor:
        """Run all blocks. See `Stack`."""
        for layer in self._layers:
            x = self._run(layer, x, rows, lengths)
        return kernels.layer_norm(x, self._offset, self._final)

    def stream(self, x: Tensor, rows: int, count: int, lengths: Tensor | None = None) -> Tensor:
        """Run the first `count` blocks. See `Stack`."""
        for layer in self._layers[:count]:
            x = self._run(layer, x, rows, lengths)
        return x.float() + (self._layers[count].offset1 if count < len(self._layers) else self._offset)

    def pick(self, x: Tensor, rows: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Run all blocks for one token of each row. The last block computes no more than that needs.

        Args:
            x: tokens [M, W]. It is overwritten.
            rows: images or texts.
            places: [rows] int64 on the device, the rows of x that are wanted.

        Returns:
            The stream before the last block, [M, W], for `finish`, and the normalised tokens [rows, W].
        """
        for layer in self._layers[:-1]:
            x = self._run(layer, x, rows)
        picked = self._run(self._layers[-1], x, rows, places=places)
        return x, kernels.layer_norm(picked, self._offset, self._final)

    def finish(self, x: Tensor, rows: int) -> Tensor:
        """Run the last block for all tokens: [M, W] of `pick` -> the residual stream behind it, float32.

        x is overwritten.
        """
        return self._run(self._layers[-1], x, rows).float() + self._offset

    def trace(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Run all blocks on tokens [M, W] of `rows` images, and keep what attention reads. x is overwritten.

        Returns:
            Queries, keys and values of L blocks, [L, M, 3 * W], and the residual stream behind the last,
            [M, W] float32.
        """
        qkv = x.new_empty(len(self._layers), len(x), 3 * x.shape[1])
        for layer, kept in zip(self._layers, qkv, strict=True):
            x = self._run(layer, x, rows, kept=kept)
        return qkv, x.float() + self._offset

    def _run(
        self,
        layer: Layer,
        x: Tensor,
        rows: int,
        lengths: Tensor | None = None,
        places: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Run a block on x [M, W] in place, or with `places` on a copy of these rows of x.

        What attention reads, [M, 3 * W], is written to `kept`.
        """
        y = attend(layer.project(x, kept), rows, layer.heads, lengths, layer.causal)
        if places is not None:
            x, y = x[places], y[places]
        products.add_product(x, y, layer.w_out)
        return products.add_product(x, layer.expand(x), layer.w_fc2)


class Layer:
    """Weights of one block as the products take them: [in, out], 16 bits.

    Args:
        block: on the device.
        dtype: bfloat16 or float16.
        offset: [W] float32, what the residual stream lacks before the block: the biases so far.

    Attributes:
        offset1, offset2, offset_after: [W] float32, what the stream lacks before each half of the block, and
            behind it.
    """

    def __init__(self, block: Block, dtype: torch.dtype, offset: Tensor) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.heads, self.causal = attention.heads, attention.causal
        self.activation = mlp.activation
        self.norm1, self.norm2 = block.layer_norm1, block.layer_norm2
        self.w_qkv, self.b_qkv = columns(attention.qkv_proj, dtype)
        self.w_out, _ = columns(attention.out_proj, dtype)
        self.w_fc1, self.b_fc1 = columns(mlp.fc1, dtype)
        self.w_fc2, _ = columns(mlp.fc2, dtype)
        self.offset1 = offset
        self.offset2 = offset + attention.out_proj.bias
        self.offset_after = self.offset2 + mlp.fc2.bias

    def project(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Residual stream [M, W] -> queries, keys and values [M, 3 * W], written to `out` if it is given"""
        h = kernels.layer_norm(x, self.offset1, self.norm1)
        return products.linear(h, self.w_qkv, self.b_qkv, out=out)

    def expand(self, x: Tensor) -> Tensor:
        """Residual stream [M, W] behind the attention -> the middle of the MLP, [M, hidden]"""
        h = kernels.layer_norm(x, self.offset2, self.norm2)
        return products.linear(h, self.w_fc1, self.b_fc1, self.activation)


def attend(qkv: Tensor, rows: int, heads: int, lengths: Tensor | None = None, causal: bool = False) -> Tensor:
    """Self-attention by the fastest kernel that there is for the GPU and the shape.

    Args:
        qkv: [rows * T, 3 * W], queries, keys and values, head by head.
        rows: images or texts.
        heads: of depth W / heads.
        lengths: [rows] int32 on the device, how many of a row's first tokens are attended to; None: all.
        causal: no token attends to a later one. Not with `lengths`.

    Returns:
        [rows * T, W] of the same dtype.
    """
    if lengths is not None:
        return ragged.attend(qkv, lengths, heads)
    if not causal and attention.is_supported(qkv, rows, heads):
        return attention.attend(qkv, rows, heads)
    return attend_by_cudnn(qkv, rows, heads, causal)


def attend_by_cudnn(qkv: Tensor, rows: int, heads: int, causal: bool = False) -> Tensor:
    """Self-attention by cuDNN, or by torch's next kernel that takes the shape. Arguments as for `attend`."""
    with sdpa_kernel(_ATTENTION, set_priority=True):
        return attend_by_torch(qkv, rows, heads, causal)


def attend_by_torch(qkv: Tensor, rows: int, heads: int, causal: bool = False) -> Tensor:
    """Self-attention by torch's choice of a kernel, on views of qkv. Arguments as for `attend`."""
    q, k, v = _heads(qkv, rows, heads)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [rows, H, T, W/H]
    return y.transpose(1, 2).reshape(len(qkv), -1)


def _heads(qkv: Tensor, rows: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[rows * T, 3 * W] -> views of queries, keys and values, each [rows, H, T, W/H]"""
    q, k, v = qkv.view(rows, -1, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
    return q, k, v


def columns(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weight [in, out] and bias [out] of a layer in `dtype`."""
    return linear.weight.detach().to(dtype).t(), linear.bias.detach().to(dtype)


def round_matrices(layers: Sequence[Block], dtype: torch.dtype) -> None:
    """Round the matrices of blocks in place. A stack that is then made of them shares their memory."""
    for layer in layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            linear.weight.data = linear.weight.data.to(dtype)

"""Transformer blocks on NVIDIA GPUs: few, large operations on [M, W] rows.

What is done differently from `siglip.py` is listed in `Levers`; each can be turned off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip_serve.engine.fused import attention, kernels
from siglip_serve.towers.siglip import Block

__all__ = ["Blocks", "Levers", "Stack", "attend", "columns"]


# By speed; the later ones take what the earlier ones refuse.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Levers:
    """What makes the fused runner fast.

    Attributes:
        kernels: LayerNorm in one pass of our own. The last product of a branch adds to the residual stream by
            itself; its bias, and all biases before it, are added where the next LayerNorm reads the stream.
        gelu: computed by the matrix product that feeds it, before it is written.
        attention: by torch's choice, by cuDNN, or by a kernel of our own where there is one for the GPU and
            the shape, else by cuDNN.
        fold: pixels are normalised by the weights of the patch embedding, which is a matrix product; and the
            pooling head multiplies its constant query into its key projection, so that it projects no token.
        graphs: a CUDA graph for every batch size, so that launches cost nothing.
        float8: three of the four products of a block take 8-bit operands; see `float8.py`.
    """

    kernels: bool = True
    gelu: bool = True
    attention: Literal["torch", "cudnn", "own"] = "own"
    fold: bool = True
    graphs: bool = True
    float8: bool = False


class Stack(Protocol):
    """Blocks, and the LayerNorm behind them, that run as one."""

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """Tokens [M, W] of `rows` images or texts -> normalised tokens [M, W]; x is overwritten."""

    def stream(self, x: Tensor, rows: int, count: int) -> Tensor:
        """The residual stream behind the first `count` blocks, [M, W] float32; x is overwritten."""


class Blocks:
    """A stack with 16-bit products; bfloat16 or float16."""

    def __init__(
        self, layers: Sequence[Block], final: nn.LayerNorm, dtype: torch.dtype, levers: Levers
    ) -> None:
        self.levers, self.final = levers, final
        self.layers = [_Layer(layer, dtype) for layer in layers]
        self.offset = torch.zeros_like(final.weight)
        if levers.kernels:
            for layer in self.layers:
                self.offset = layer.defer_biases(self.offset)

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """As `Stack`."""
        for layer in self.layers:
            x = self._run(layer, x, rows)
        return self._normalize(x, self.offset, self.final)

    def stream(self, x: Tensor, rows: int, count: int) -> Tensor:
        """As `Stack`."""
        for layer in self.layers[:count]:
            x = self._run(layer, x, rows)
        return x.float() + (self.layers[count].offset1 if count < len(self.layers) else self.offset)

    def _run(self, layer: _Layer, x: Tensor, rows: int) -> Tensor:
        h = self._normalize(x, layer.offset1, layer.norm1)
        y = attend(torch.addmm(layer.b_qkv, h, layer.w_qkv), rows, layer.heads, self.levers)
        x = self._add(x, y, layer.w_out, layer.b_out)
        h = self._normalize(x, layer.offset2, layer.norm2)
        if self.levers.gelu:
            z = torch._addmm_activation(layer.b_fc1, h, layer.w_fc1, use_gelu=True)
        else:
            z = F.gelu(torch.addmm(layer.b_fc1, h, layer.w_fc1), approximate="tanh")
        return self._add(x, z, layer.w_fc2, layer.b_fc2)

    def _normalize(self, x: Tensor, offset: Tensor, norm: nn.LayerNorm) -> Tensor:
        if self.levers.kernels:
            return kernels.layer_norm(x, offset, norm)
        return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    def _add(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.levers.kernels:
            return x.addmm_(y, weight)
        return x + torch.addmm(bias, y, weight)


class _Layer:
    """The weights of one block as the products take them: [in, out], 16 bits."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.heads = attention.heads
        self.norm1, self.norm2 = block.layer_norm1, block.layer_norm2
        self.w_qkv, self.b_qkv = columns(attention.qkv_proj, dtype)
        self.w_out, self.b_out = columns(attention.out_proj, dtype)
        self.w_fc1, self.b_fc1 = columns(mlp.fc1, dtype)
        self.w_fc2, self.b_fc2 = columns(mlp.fc2, dtype)
        self._biases = attention.out_proj.bias, mlp.fc2.bias
        self.offset1 = self.offset2 = torch.zeros_like(block.layer_norm1.weight)

    def defer_biases(self, offset: Tensor) -> Tensor:
        """Take what the stream lacks before this block, [W] float32; returns what it lacks after it."""
        self.offset1 = offset
        self.offset2 = offset + self._biases[0]
        return self.offset2 + self._biases[1]


def attend(qkv: Tensor, rows: int, heads: int, levers: Levers) -> Tensor:
    """Self-attention of [rows * T, 3 * W] -> [rows * T, W], without a copy of either."""
    if levers.attention == "own" and attention.is_supported(qkv, rows, heads):
        return attention.attend(qkv, rows, heads)
    q, k, v = qkv.view(rows, -1, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
    if levers.attention == "torch":
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(_ATTENTION, set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v)  # [rows, H, T, W/H]
    return y.transpose(1, 2).reshape(len(qkv), -1)


def columns(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight [in, out] and bias [out] of `dtype`."""
    return linear.weight.detach().to(dtype).t(), linear.bias.detach().to(dtype)

"""Transformer blocks with 8-bit products (e4m3), bfloat16 in between.

LayerNorm's output needs no measured scale, since it is bounded. Its weight and bias become part of the next
product. The MLP's middle is written in 8 bits before the GELU, with a scale measured on drawn pictures.
Behind the GELU it has a scale per row, which is applied where the row's product is added to the residual
stream. Attention's output projection stays bfloat16: it is a twelfth of the work, and quantising its input
costs as much as it would gain.

The rounding of a weight is the same for all tokens, so its effects add up in the embedding, where those of
the activations average out. Weights are therefore rounded column by column. Each column compensates, as far
as it can, for what the rounding of the columns before it does to the layer's products.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al.,
2022, arXiv 2210.17323), here on pictures that are drawn, not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.engine.fused import kernels, products
from siglip_serve.engine.fused.blocks import attend, columns
from siglip_serve.towers.siglip import Block

__all__ = ["Float8Blocks", "draw_pictures", "round_weight"]

_LARGEST = torch.finfo(kernels.FLOAT8).max
_HEADROOM = 8  # the MLP's middle may be larger than on the drawn pictures by this factor
_DAMPING = 0.05
_COLUMNS_AT_ONCE = 128


class Float8Blocks:
    """A `Stack` with 8-bit products.

    Args:
        layers: at least one, float32.
        final: the LayerNorm behind them, float32.
        tokens: [B, T, W] float32, the input of the first layer for typical pictures.
    """

    def __init__(self, layers: Sequence[Block], final: nn.LayerNorm, tokens: Tensor) -> None:
        self._final = final
        self._offset = torch.zeros_like(final.weight)
        self._layers: list[_Layer] = []
        for block in layers:
            layer, tokens = _quantize(block, tokens, self._offset)
            self._layers.append(layer)
            self._offset = layer.offset_after
        self._one = torch.ones((), device=final.weight.device)
        self._norm_scale = self._one / kernels.largest_norm_scale(len(final.weight))

    def __call__(self, x: Tensor, rows: int, lengths: Tensor | None = None) -> Tensor:
        """Run all blocks. See `Stack`."""
        branch = self._run(x, rows, len(self._layers), lengths)
        return kernels.layer_norm(x, self._offset, self._final, branch)

    def stream(self, x: Tensor, rows: int, count: int, lengths: Tensor | None = None) -> Tensor:
        """Run the first `count` blocks. See `Stack`."""
        branch = self._run(x, rows, count, lengths)
        offset = self._layers[count].offset1 if count < len(self._layers) else self._offset
        return x.float() + offset + (branch[0] * branch[1][:, None] if branch else 0)

    def _run(self, x: Tensor, rows: int, count: int, lengths: Tensor | None) -> kernels.Branch | None:
        """Run the first `count` blocks. x is overwritten, and lacks the branch of the last block."""
        branch: kernels.Branch | None = None
        for layer in self._layers[:count]:
            h = kernels.normalize_quantize(x, layer.offset1, layer.eps, branch)
            qkv = _multiply(h, layer.qkv, self._norm_scale, torch.bfloat16)
            products.add_product(x, attend(qkv, rows, layer.heads, lengths), layer.w_out)
            h = kernels.normalize_quantize(x, layer.offset2, layer.eps)
            z = _multiply(h, layer.fc1, self._norm_scale, kernels.FLOAT8)
            z, row_scale = kernels.gelu_quantize(z, layer.middle_scale)
            branch = _multiply(z, layer.fc2, self._one, torch.bfloat16), row_scale
        return branch


@dataclass(frozen=True)
class _Layer:
    """Weights of one block. The offsets are what the stream lacks before each half, and behind the block."""

    heads: int
    eps: float
    qkv: _Weight
    w_out: Tensor
    fc1: _Weight
    middle_scale: Tensor
    fc2: _Weight
    offset1: Tensor
    offset2: Tensor
    offset_after: Tensor


def _quantize(block: Block, tokens: Tensor, offset: Tensor) -> tuple[_Layer, Tensor]:
    """Round a block's weights for tokens [B, T, W] such as these, and return the exact block's tokens."""
    attention, mlp = block.self_attn, block.mlp
    qkv = _Weight(attention.qkv_proj, _normalized(tokens, block.layer_norm1), block.layer_norm1)
    tokens = tokens + attention(block.layer_norm1(tokens))
    middle = mlp.fc1(block.layer_norm2(tokens))
    middle_scale = middle.abs().max() * _HEADROOM / _LARGEST
    fc1 = _Weight(mlp.fc1, _normalized(tokens, block.layer_norm2), block.layer_norm2)
    fc1.divide_by(middle_scale)
    middle = F.gelu(middle, approximate="tanh")
    fc2 = _Weight(mlp.fc2, middle.flatten(0, 1))
    fc2.bias = None  # comes with the next offset
    offset2 = offset + attention.out_proj.bias
    layer = _Layer(
        heads=attention.heads,
        eps=block.layer_norm1.eps,
        qkv=qkv,
        w_out=columns(attention.out_proj, torch.bfloat16)[0],
        fc1=fc1,
        middle_scale=middle_scale,
        fc2=fc2,
        offset1=offset,
        offset2=offset2,
        offset_after=offset2 + mlp.fc2.bias,
    )
    return layer, tokens + mlp.fc2(middle)


class _Weight:
    """A linear layer in float8, with the LayerNorm before it.

    Attributes:
        values: [in, out] float8, column-major as the products need it.
        scale: float32 scalar that all values are multiplied by.
        bias: [out] bfloat16.
    """

    def __init__(self, linear: nn.Linear, inputs: Tensor, norm: nn.LayerNorm | None = None) -> None:
        weight, bias = linear.weight.detach(), linear.bias.detach()
        if norm is not None:
            bias = bias + weight @ norm.bias
            weight = weight * norm.weight
        self.scale = weight.abs().max().clamp(min=1e-12) / _LARGEST
        self.values = round_weight(weight / self.scale, inputs.T @ inputs).t()
        self.bias: Tensor | None = bias.to(torch.bfloat16)

    def divide_by(self, scale: Tensor) -> None:
        """Make the product come out divided by `scale`."""
        if self.bias is not None:
            self.bias = (self.bias / scale).to(torch.bfloat16)
        self.scale = self.scale / scale


def round_weight(weight: Tensor, gram: Tensor) -> Tensor:
    """Round a weight to float8 such that its products with typical inputs change least.

    Args:
        weight: [out, in] float32, within the range of float8.
        gram: [in, in] float32, inner products of the features of typical inputs.

    Returns:
        [out, in] float8.
    """
    weight = weight.clone()
    rounded = torch.empty_like(weight, dtype=kernels.FLOAT8)
    gram = gram.double()
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    # The shares of a column's error that later columns take over.
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    factor = factor / factor.diagonal()[:, None]
    for start in range(0, weight.shape[1], _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, weight.shape[1])
        part, errors = weight[:, start:end], torch.empty_like(weight[:, start:end])
        for column in range(end - start):
            exact = part[:, column]
            rounded[:, start + column] = exact.clamp(-_LARGEST, _LARGEST)
            errors[:, column] = exact - rounded[:, start + column].float()
            part.addr_(errors[:, column], factor[start + column, start:end], alpha=-1)
        weight[:, end:] -= errors @ factor[start:end, end:]
    return rounded


def _normalized(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """[B, T, W] -> [B * T, W] without the norm's weight and bias."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps).flatten(0, 1)


def _multiply(x: Tensor, weight: _Weight, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply x [M, K] float8 by a weight, with one scale per matrix."""
    return products.scaled_product(x, weight.values, (x_scale, weight.scale), weight.bias, dtype)


def draw_pictures(rows: int, size: int) -> NDArray[np.uint8]:
    """Draw pictures [rows, size, size, 3] uint8: soft or plain grounds, discs, rectangles, grain.

    They are the same every time.
    """
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    pictures = np.empty((rows, size, size, 3), dtype=np.uint8)
    for row in range(rows):
        coarse = random.normal(128, 70, (1, 3, 5, 5)) if row % 2 else random.uniform(0, 255, (1, 3, 1, 1))
        ground = F.interpolate(torch.from_numpy(coarse), size=(size, size), mode="bicubic")
        picture = ground[0].permute(1, 2, 0).numpy()
        for _ in range(random.integers(1, 12)):
            center, half = random.uniform(0, 1, 2), random.uniform(0.03, 0.35, 2)
            down, across = np.abs(y - center[0]) / half[0], np.abs(x - center[1]) / half[1]
            disc = random.random() < 0.5
            inside = down**2 + across**2 < 1 if disc else np.maximum(down, across) < 1
            picture[inside] = random.uniform(0, 255, 3)
        grain = random.normal(0, random.choice([0, 6, 15]), (size, size, 1))
        pictures[row] = np.clip(picture + grain, 0, 255)
    return pictures

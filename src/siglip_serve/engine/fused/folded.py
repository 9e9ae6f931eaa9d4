"""Both ends of a vision tower on a GPU, with everything constant multiplied into the weights at load.

Shapes: n images, S side, p side of a patch, T tokens of an image, W width, H heads,
G side of the grid on which NaFlex learned its positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.engine.fused import kernels, products, ragged
from siglip_serve.towers.clip import ClipVisionEmbeddings
from siglip_serve.towers.naflex import NaflexEmbeddings
from siglip_serve.towers.siglip import AttentionPooling, VisionEmbeddings

__all__ = ["FoldedPatchEmbedding", "FoldedPatches", "FoldedPooling"]

_ALIGNMENT = 8  # elements: rows of a matrix product begin at multiples of 16 bytes


class FoldedPatchEmbedding:
    """Patch embedding as one matrix product, whose weights also normalise the pixels.

    CLIP's class token is the first row of each image. Its pixels are zeros, so the product adds nothing.

    Args:
        embeddings: on the device, float32.
        image: the checkpoint's normalisation.
        dtype: arithmetic of the product and of the tokens.
    """

    def __init__(
        self, embeddings: VisionEmbeddings | ClipVisionEmbeddings, image: ImageConfig, dtype: torch.dtype
    ) -> None:
        conv, positions = embeddings.patch_embedding, embeddings.position_embedding.weight.detach()
        self._dtype = dtype
        self._patch = conv.kernel_size[0]
        self._centre, factor, shift = _normalization(image, positions.device)
        weight = conv.weight.detach().permute(0, 2, 3, 1)  # [W, p, p, 3]
        bias = (weight * shift).sum((1, 2, 3)) + (0 if conv.bias is None else conv.bias.detach())
        added = positions + bias
        if isinstance(embeddings, ClipVisionEmbeddings):
            added[0] = positions[0] + embeddings.class_embedding.detach()
        self._positions = added.to(dtype)
        weight = (weight * factor).flatten(1)  # [W, p * p * 3]
        self._weight = F.pad(weight, (0, -weight.shape[1] % _ALIGNMENT)).to(dtype).t()

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [n, S, S, 3] -> tokens [n * T, W], positions included"""
        x = self._positions.repeat(len(pixels), 1)
        patches = torch.empty(len(x), len(self._weight), dtype=self._dtype, device=pixels.device)
        kernels.cut_patches(pixels, self._patch, self._centre, patches)
        return products.add_product(x, patches, self._weight)


class FoldedPatches:
    """NaFlex's patch embedding: one product normalises the patches and resizes the learned positions.

    Each row of it is a patch, followed by the shares of the learned positions in the patch's own.
    Arguments as for `FoldedPatchEmbedding`.
    """

    def __init__(self, embeddings: NaflexEmbeddings, image: ImageConfig, dtype: torch.dtype) -> None:
        linear, positions = embeddings.patch_embedding, embeddings.position_embedding.weight.detach()
        self._grid = embeddings.grid_size
        self._centre, factor, shift = _normalization(image, positions.device)
        weight = linear.weight.detach().unflatten(1, (-1, 3))  # [W, p * p, 3]
        self._bias = (linear.bias.detach() + (weight * shift).sum((1, 2))).to(dtype)
        weight = torch.cat([(weight * factor).flatten(1), positions.t()], dim=1)  # [W, p * p * 3 + G * G]
        self._weight = F.pad(weight, (0, -weight.shape[1] % _ALIGNMENT)).to(dtype).t()

    def __call__(self, patches: Tensor, grids: Tensor) -> Tensor:
        """uint8 patches [n, T, 3 p p] of grids [n, 2] -> tokens [n * T, W], any finite ones for padding"""
        rows = len(patches) * patches.shape[1]
        x = torch.empty(rows, len(self._weight), dtype=self._weight.dtype, device=patches.device)
        ragged.place_patches(patches, grids, self._grid, self._centre, x)
        return products.linear(x, self._weight, self._bias)


class FoldedPooling:
    """The MAP head. Its query is constant, so the scores of all heads are one product with the tokens.

    Args:
        head: on the device, float32.
        dtype: arithmetic, except that of the softmax, which is float32.
    """

    def __init__(self, head: AttentionPooling, dtype: torch.dtype) -> None:
        attention = head.attention
        heads, depth = attention.num_heads, attention.head_dim
        w_q, w_k, w_v = (w.detach() for w in attention.in_proj_weight.chunk(3))
        b_q, _, b_v = (b.detach() for b in attention.in_proj_bias.chunk(3))  # b_k is the same for all tokens
        query = F.linear(head.probe.detach()[0, 0], w_q, b_q).view(heads, depth) * depth**-0.5
        keys = torch.einsum("hd,hdw->wh", query, w_k.view(heads, depth, -1))
        self._keys = keys.to(dtype)  # [W, H]
        self._values = w_v.view(heads, depth, -1).transpose(1, 2).to(dtype)  # [H, W, W/H]
        self._bias = b_v.view(heads, 1, depth).to(dtype)
        self._out = attention.out_proj.to(dtype)
        self._norm = head.layernorm.to(dtype)
        self._mlp = head.mlp.to(dtype)

    def __call__(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """[n, T, W] -> [n, W], not normalised; `real`, bool [n, T], is False where tokens are not seen"""
        scores = (tokens @ self._keys).transpose(1, 2)  # [n, H, T]
        if real is not None:
            scores = scores.masked_fill(~real[:, None], -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(tokens.dtype)
        pooled = (weights @ tokens).transpose(0, 1)  # [H, n, W]
        values = torch.baddbmm(self._bias, pooled, self._values)  # [H, n, W/H]
        x = self._out(values.transpose(0, 1).flatten(1))  # [n, W]
        return x + self._mlp(self._norm(x))


def _normalization(image: ImageConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return c, f and s, [3] float32, such that (x - c) * f + s normalises bytes x of each channel."""
    mean, std = (torch.tensor(values, device=device) for values in (image.mean, image.std))
    # Whole numbers up to 255 are exact in 16 bits, and small once the middle is subtracted.
    centre = (mean / image.rescale).round()
    return centre, image.rescale / std, (centre * image.rescale - mean) / std

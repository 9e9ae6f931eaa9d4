"""CLIP's image tower on a GPU.

The embedding comes from the class token alone. Behind its attention, the last block is computed for this
token only, and the rest of it just when patches are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.engine.fused import kernels
from siglip_serve.engine.fused.blocks import Blocks, round_matrices
from siglip_serve.engine.fused.class_token import taken
from siglip_serve.engine.fused.folded import FoldedPatchEmbedding
from siglip_serve.heatmaps.attribution import ClipExplainer, Explanation
from siglip_serve.towers.clip import ClipVisionTower

__all__ = ["ClipImages"]


class ClipImages:
    """The tower, as `FusedVision` records it.

    Args:
        tower: on the device, float32. It is taken over. Its matrices are rounded, for the explainer too.
        image: the checkpoint's normalisation.
        dtype: bfloat16 or float16.
    """

    def __init__(self, tower: ClipVisionTower, image: ImageConfig, dtype: torch.dtype) -> None:
        layers = tower.encoder.blocks
        round_matrices(layers, dtype)
        self._tokens, self._heads = tower.context, tower.config.num_attention_heads
        self._embed = FoldedPatchEmbedding(tower.embeddings, image, dtype)
        self._norm = tower.pre_layrnorm
        self._nothing = torch.zeros_like(self._norm.weight)
        self._blocks = Blocks(layers, tower.post_layernorm, dtype)
        self._projection = tower.projection.to(dtype)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[n, S, S, 3] uint8 -> tokens before the last block [n, 1 + T, W], embedding [n, P] float32"""
        rows, tokens = len(pixels), self._tokens
        places = torch.arange(0, rows * tokens, tokens, device=pixels.device)
        x, picked = self._blocks.pick(self._first(pixels), rows, places)
        return x.view(rows, tokens, -1), self._projection(picked).float()

    def patches(self, tokens: Tensor) -> Tensor:
        """Tokens [n, 1 + T, W] of `forward`, which are overwritten -> those of patches [n, T, W] float32"""
        x = self._blocks.finish(tokens.flatten(0, 1), len(tokens))
        return x.view(tokens.shape)[:, 1:].contiguous()

    def trace(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[1, S, S, 3] uint8 -> [1, L, 1 + T, 3 * W], what attention reads, and the tokens [1, 1 + T, W]"""
        qkv, x = self._blocks.trace(self._first(pixels), len(pixels))
        return qkv[None], x[None]

    def explain(
        self, explainer: ClipExplainer, trace: Sequence[Tensor], prepared: Sequence[Tensor]
    ) -> Explanation[Tensor]:
        """Explain the image of a trace. See `Traced`."""
        qkv, x = trace
        form, seen, constant = prepared
        maps = taken(qkv[0], seen, self._heads)
        return explainer.conclude(x, maps, form, constant)

    def _first(self, pixels: Tensor) -> Tensor:
        """[n, S, S, 3] uint8 -> the input of the first block [n * (1 + T), W]"""
        return kernels.layer_norm(self._embed(pixels), self._nothing, self._norm)

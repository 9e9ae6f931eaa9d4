"""The image tower of SigLIP 2 NaFlex in plain PyTorch: images of any aspect ratio, each with its own patches.

Blocks and pooling head are SigLIP's, and so is the text tower (`towers.siglip`). Patches come cut out of
the image. The learned positions are a square grid, which is resized to the grid of each image. Images of one
batch are padded to the longest. A mask keeps the padding out of attention and pooling.

Parameters keep the Hugging Face names, except that the query, key and value projections of a block are one
`qkv_proj`. The result equals transformers' `Siglip2Model`.

Shapes: B images, T patches of the longest image, P side of a patch, G side of the learned grid, D hidden
size.

Source: "SigLIP 2" (Tschannen et al., 2025, arXiv 2502.14786), section 2.4.2, after "Patch n' Pack: NaViT"
(Dehghani et al., 2023, arXiv 2307.06304).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import NaflexVisionConfig
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.siglip import AttentionPooling, Encoder, TowerTrace, trace_blocks
from siglip_serve.towers.weights import load_strictly, without_values

__all__ = ["NaflexVisionTower", "load_vision", "padding_mask"]


class NaflexEmbeddings(nn.Module):
    """Patches become tokens with positions that are resized to the grid of their image."""

    def __init__(self, config: NaflexVisionConfig) -> None:
        super().__init__()
        self.grid_size = config.grid_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid_size**2, config.hidden_size)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """[B, T, 3 P P] of grids [B, 2] -> [B, T, D]"""
        return self.patch_embedding(patches) + self.positions(grids, patches.shape[1])

    def positions(self, grids: Tensor, tokens: int) -> Tensor:
        """Rows and columns [B, 2] int64 -> positions [B, T, D] of T `tokens`, any positions for padding"""
        place = torch.arange(tokens, device=grids.device)
        rows, columns = place // grids[:, 1:], place % grids[:, 1:]  # [B, T]
        down = self._weights(rows, grids[:, :1])  # [B, T, G]
        across = self._weights(columns, grids[:, 1:])
        weights = (down[..., None] * across[..., None, :]).flatten(2)  # [B, T, G G]
        learned = self.position_embedding.weight
        return (weights @ learned.float()).to(learned.dtype)

    def _weights(self, index: Tensor, count: Tensor) -> Tensor:
        """Weigh the learned places of one axis for places `index` [B, T] of `count` [B, 1]: [B, T, G], sum 1.

        Bilinear with antialias: a triangle around the centre, which widens where the grid shrinks.
        """
        scale = self.grid_size / count.float()
        centre = (index.clamp(max=count - 1) + 0.5) * scale - 0.5
        learned = torch.arange(self.grid_size, device=index.device)
        distance = (learned - centre[..., None]).abs() / scale.clamp(min=1)[..., None]
        weights = (1 - distance).clamp(min=0)
        return weights / weights.sum(-1, keepdim=True)


class NaflexVisionTower(nn.Module):
    """Normalised patches -> patch tokens; `head` pools tokens into the image embedding."""

    def __init__(self, config: NaflexVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = NaflexEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = AttentionPooling(config)

    def forward(self, patches: Tensor, grids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the reference's `last_hidden_state`.

        Args:
            patches: [B, T, 3 P P], floating point, normalised as the checkpoint asks, row by row of each
                grid, padded with anything.
            grids: [B, 2] int64, rows and columns of each image.
            mask: [B, 1, 1, T] as of `padding_mask`; None: no image is padded.

        Returns:
            [B, T, D] patch tokens, without meaning where the patches are padding. `head` pools them into the
            reference's `pooler_output` [B, D].
        """
        x = self.embeddings(patches, grids)
        x = self.encoder(x, mask)
        return self.post_layernorm(x)

    def trace(self, patches: Tensor, grids: Tensor, blocks: int) -> TowerTrace:
        """Trace the last `blocks` blocks on patches [B, T, 3 P P] without padding, of grids [B, 2]."""
        x = self.embeddings(patches, grids)
        split = len(self.encoder.blocks) - blocks
        for block in self.encoder.blocks[:split]:
            x = block(x)
        return trace_blocks(x, self.encoder.blocks[split:])


def padding_mask(real: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Real tokens, bool [B, T] -> what attention adds to its scores, [B, 1, 1, T]; None if all are real"""
    if bool(real.all()):
        return None
    mask = torch.zeros(real.shape, dtype=dtype).masked_fill(~real, -torch.inf)
    return mask[:, None, None]


def load_vision(path: Path) -> NaflexVisionTower:
    """Load the vision tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the configuration or the weights are not those of a NaFlex tower. All missing,
            unexpected and mis-shaped tensors are listed, up to 20.
    """
    config = load_config(path).vision
    if not isinstance(config, NaflexVisionConfig):
        raise CheckpointError(f"{path / 'config.json'}: model_type is not 'siglip2'")
    with without_values():
        tower = NaflexVisionTower(config)
    load_strictly(tower, path, "vision")
    return tower

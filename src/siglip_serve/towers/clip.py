"""Both CLIP towers in plain PyTorch.

Parameters keep the Hugging Face names, with two exceptions. The query, key and value projections of a block
are one `qkv_proj`. Each tower holds its projection to the joint space, if it has one, as `projection`.
The blocks are SigLIP's. The result equals transformers' `CLIPModel` and `MetaClip2Model`, and open_clip's
`CLIP` with a plain ViT.

Shapes: B images or texts, T patches (grid_size ** 2) or ids (the context length), D hidden size of the tower,
P the joint space (`projection_dim`).

Source: "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al., 2021,
arXiv 2103.00020).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import main_file
from siglip_serve.checkpoint.model_config import ClipTextConfig, ClipVisionConfig
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.clip_rules import end_places
from siglip_serve.towers.siglip import Encoder, TextEmbeddings
from siglip_serve.towers.weights import load_strictly, without_values

__all__ = ["ClipTextTower", "ClipVisionEmbeddings", "ClipVisionTower", "load_text", "load_vision"]


class ClipVisionEmbeddings(nn.Module):
    """A class token and the patches become tokens with learned positions."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, side, stride=side, bias=False)
        self.position_embedding = nn.Embedding(1 + config.grid_size**2, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1 + T, D]; pixels beyond the last whole patch of a side are not seen"""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, T, D]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [B, 1 + T, D]
        return x + self.position_embedding.weight


class ClipVisionTower(nn.Module):
    """Normalised pixels -> a class token and patch tokens; `head` makes the class token the embedding."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = _projection(config)

    @property
    def context(self) -> int:
        """Tokens of one image, the class token included."""
        return 1 + self.config.grid_size**2

    def embed(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1 + T, D], the input of the first block"""
        return self.pre_layrnorm(self.embeddings(pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the reference's `last_hidden_state`.

        Args:
            pixels: [B, 3, S, S], floating point, normalised as the checkpoint asks.

        Returns:
            [B, 1 + T, D] tokens, the class token first. `head` makes them the reference's `image_embeds`
            [B, P] before normalisation.
        """
        return self.encoder(self.embed(pixels))

    def head(self, tokens: Tensor) -> Tensor:
        """[B, 1 + T, D] -> [B, P], not normalised"""
        return self.projection(self.post_layernorm(tokens[:, 0]))

    def patches(self, tokens: Tensor) -> Tensor:
        """[B, 1 + T, D] -> [B, T, D], the tokens that stand for a place"""
        return tokens[:, 1:]


class ClipTextTower(nn.Module):
    """Token ids -> tokens; `pool` projects the end token into the joint space."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = _projection(config)

    @property
    def context(self) -> int:
        """Tokens of one text."""
        return self.config.max_position_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the reference's `last_hidden_state`.

        Args:
            ids: [B, T] int64, padded behind the end token; tokens before it do not see the padding.

        Returns:
            [B, T, D] tokens.
        """
        x = self.embeddings(ids)
        x = self.encoder(x)
        return self.final_layer_norm(x)

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """[B, T, D] of ids [B, T] -> [B, P], the reference's `text_embeds` before normalisation"""
        places = end_places(self.config, ids)
        return self.projection(tokens[torch.arange(len(tokens), device=tokens.device), places])


def load_vision(path: Path) -> ClipVisionTower:
    """Load the vision tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the configuration or the weights are not those of a CLIP. All missing, unexpected and
            mis-shaped tensors are listed, up to 20.
    """
    config = load_config(path).vision
    if not isinstance(config, ClipVisionConfig):
        raise CheckpointError(f"{main_file(path)}: the model is not a CLIP")
    with without_values():
        tower = ClipVisionTower(config)
    load_strictly(tower, path, "vision")
    return tower


def load_text(path: Path) -> ClipTextTower:
    """Load the text tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: as for `load_vision`.
    """
    config = load_config(path).text
    if not isinstance(config, ClipTextConfig):
        raise CheckpointError(f"{main_file(path)}: the model is not a CLIP")
    with without_values():
        tower = ClipTextTower(config)
    load_strictly(tower, path, "text")
    return tower


def _projection(config: ClipVisionConfig | ClipTextConfig) -> nn.Module:
    """Make the projection to the joint space; a checkpoint of one tower may have none."""
    if not config.projected:
        return nn.Identity()
    return nn.Linear(config.hidden_size, config.projection_size, bias=False)

"""CLIP's vision tower (provisional)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from siglip_serve.checkpoint import load_tensors, read_json
from siglip_serve.siglip import Encoder


class ClipVisionTower(nn.Module):
    """See the branch that replaces this."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.empty(width))
        self.embeddings.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, config.patch_size, bias=False
        )
        self.embeddings.position_embedding = nn.Embedding(
            (config.image_size // config.patch_size) ** 2 + 1, width
        )
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, config.projection_dim, bias=False)

    def embed(self, pixels: Tensor) -> Tensor:
        e = cast(Any, self.embeddings)
        x = e.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([e.class_embedding.expand(len(x), 1, -1), x], 1)
        return self.pre_layrnorm(x + e.position_embedding.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embed(pixels)))

    def head(self, tokens: Tensor) -> Tensor:
        return self.projection(tokens[:, 0])


def load_clip(path: Path) -> ClipVisionTower:
    config = read_json(path / "config.json")
    values = {
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        **config["vision_config"],
        "projection_dim": config["projection_dim"],
    }
    tower = ClipVisionTower(SimpleNamespace(**values))
    state = {k.removeprefix("vision_model."): v for k, v in load_tensors(path, "vision_model.").items()}
    state["projection.weight"] = load_tensors(path, "visual_projection.")["visual_projection.weight"]
    tower.load_state_dict(state)
    tower.eval().requires_grad_(False)
    return tower

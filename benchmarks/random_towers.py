"""Random weights that are harder to compute in few bits than a new model's, and pictures for them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from siglip_serve.towers.naflex import NaflexVisionTower
from siglip_serve.towers.siglip import VisionTower

__all__ = ["fill", "make_pixels"]


def fill(tower: VisionTower | NaflexVisionTower, scale: float = 1.0) -> None:
    """Draw all weights of a tower anew. `scale` multiplies those of its products."""
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=scale * module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, std=0.2)
    nn.init.normal_(tower.head.probe, std=1)
    nn.init.trunc_normal_(tower.head.attention.in_proj_weight, std=scale * tower.config.hidden_size**-0.5)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.5)


def make_pixels(rows: int, size: int) -> NDArray[np.uint8]:
    """Draw other pictures than float8 is calibrated on: sharp rectangles on soft colours, with grain."""
    rng = np.random.default_rng(1)
    coarse = torch.from_numpy(rng.normal(128, 60, (rows, 3, 6, 6)).astype(np.float32))
    pictures = (
        nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").permute(0, 2, 3, 1).numpy()
    )
    for picture in pictures:
        for _ in range(6):
            top, left = rng.integers(0, size, 2)
            height, width = rng.integers(size // 16, size // 2, 2)
            picture[top : top + height, left : left + width] = rng.uniform(0, 255, 3)
    grain = rng.normal(0, 12, (rows, size, size, 1))
    return np.clip(pictures + grain, 0, 255).astype(np.uint8)

"""The NaFlex tower against transformers, in float32: at most 1e-5 of the reference's scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_checkpoints import random_naflex, save_naflex
from transformers import Siglip2TextModel, Siglip2VisionModel

from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.towers.load import load_text
from siglip_serve.towers.naflex import load_vision, padding_mask

GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patch16, learned on 16x16": ({}, {}),
    "patch14, learned on 7x7, other text width": (
        {"patch_size": 14, "num_patches": 49},
        {"hidden_size": 32, "num_hidden_layers": 2, "projection_size": 64},
    ),
}
# Larger and smaller than the learned grids, and so long that no row or column keeps its own position.
GRIDS = torch.tensor([[16, 16], [1, 64], [45, 5], [7, 36], [2, 2], [30, 8]])


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_towers_equal_transformers(name: str, tmp_path: Path) -> None:
    model = random_naflex(*GEOMETRIES[name])
    path = save_naflex(model, tmp_path)
    vision, text = load_vision(path), load_text(path)
    generator = torch.Generator().manual_seed(1)
    counts = GRIDS.prod(1)
    real = torch.arange(int(counts.max())) < counts[:, None]
    patches = torch.rand(*real.shape, 3 * vision.config.patch_size**2, generator=generator) * 2 - 1
    with torch.inference_mode():
        reference = model.vision_model(patches, real.int(), GRIDS)
        mask = padding_mask(real, torch.float32)
        tokens = vision(patches, GRIDS, mask)
        assert relative_error(tokens[real], reference.last_hidden_state[real]) <= 1e-5
        assert relative_error(vision.head(tokens, mask), reference.pooler_output) <= 1e-5
        ids = torch.randint(text.config.vocab_size, (3, text.context), generator=generator)
        texts = model.text_model(ids).pooler_output
        assert relative_error(text.pool(text(ids), ids), texts) <= 1e-5
    assert load_scale(path) == (model.logit_scale.item(), model.logit_bias.item())


def test_towers_that_stand_alone(tmp_path: Path) -> None:
    """Transformers saves them without the prefix of the tower."""
    model = random_naflex()
    grid, patches = torch.tensor([[4, 9]]), torch.rand(1, 36, 768, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(64)[None]
    for kind, part in (("vision", model.vision_model), ("text", model.text_model)):
        alone = {"vision": Siglip2VisionModel, "text": Siglip2TextModel}[kind](part.config)
        alone.load_state_dict({f"{name}": value for name, value in part.state_dict().items()})
        save_naflex(alone, tmp_path / kind)
    vision, text = load_vision(tmp_path / "vision"), load_text(tmp_path / "text")
    with torch.inference_mode():
        pooled = model.vision_model(patches, torch.ones(1, 36), grid).pooler_output
        assert relative_error(vision.head(vision(patches, grid)), pooled) <= 1e-5
        pooled = model.text_model(ids).pooler_output
        assert relative_error(text.pool(text(ids), ids), pooled) <= 1e-5


def test_positions_are_resized_as_an_antialiased_image(tmp_path: Path) -> None:
    embeddings = load_vision(save_naflex(random_naflex(), tmp_path)).embeddings
    learned = embeddings.position_embedding.weight.unflatten(0, (16, 16)).permute(2, 0, 1)[None]
    for rows, columns in GRIDS.tolist():
        resized = F.interpolate(learned, (rows, columns), mode="bilinear", antialias=True)
        ours = embeddings.positions(torch.tensor([[rows, columns]]), rows * columns)
        torch.testing.assert_close(ours[0], resized[0].flatten(1).T, atol=1e-6, rtol=0)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """One image alone, and padded with noise."""
    vision = load_vision(save_naflex(random_naflex(), tmp_path))
    noise = torch.rand(1, 60, 768, generator=torch.Generator().manual_seed(2)) * 100
    grid = torch.tensor([[4, 9]])
    real = torch.arange(60)[None] < 36
    with torch.inference_mode():
        mask = padding_mask(real, torch.float32)
        padded = vision(noise, grid, mask)
        alone = vision(noise[:, :36], grid)
        torch.testing.assert_close(padded[:, :36], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(vision.head(padded, mask), vision.head(alone), atol=1e-5, rtol=0)
    assert padding_mask(real[:, :36], torch.float32) is None

"""The towers against transformers, in float32: at most 1e-5 of the reference's scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from random_checkpoints import random_model, save_checkpoint
from transformers import SiglipModel, SiglipVisionModel

from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.towers.siglip import load_text, load_vision

TINY = ROOT / "checkpoints" / "siglip-tiny"
JERSEY = TINY.with_name("siglip-tiny-jersey")

GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patch16-224": ({"image_size": 224, "patch_size": 16}, {}),
    "patch14-384, grid does not divide": ({"image_size": 384, "patch_size": 14}, {}),
    "patch32-256": ({"image_size": 256, "patch_size": 32}, {"max_position_embeddings": 16}),
    "patch16-512, other text width": (
        {"image_size": 512, "patch_size": 16},
        {"hidden_size": 32, "num_hidden_layers": 2, "projection_size": 64},
    ),
}


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def assert_equal_towers(model: SiglipModel, path: Path) -> None:
    vision, text = load_vision(path), load_text(path)
    generator = torch.Generator().manual_seed(1)
    size = vision.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    ids = torch.randint(text.config.vocab_size, (3, text.config.max_position_embeddings), generator=generator)
    with torch.inference_mode():
        reference = model.vision_model(pixels)
        tokens = vision(pixels)
        assert relative_error(tokens, reference.last_hidden_state) <= 1e-5
        assert relative_error(vision.head(tokens), reference.pooler_output) <= 1e-5
        reference = model.text_model(ids)
        tokens = text(ids)
        assert relative_error(tokens, reference.last_hidden_state) <= 1e-5
        assert relative_error(text.pool(tokens, ids), reference.pooler_output) <= 1e-5


@pytest.mark.parametrize("name", GEOMETRIES)
def test_towers_with_random_weights_equal_transformers(name: str, tmp_path: Path) -> None:
    vision, text = GEOMETRIES[name]
    model = random_model(vision, text)
    assert_equal_towers(model, save_checkpoint(model, tmp_path))


def test_reads_sharded_weights(tmp_path: Path) -> None:
    model = random_model({"image_size": 32, "patch_size": 16})
    save_checkpoint(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_towers(model, tmp_path)


def test_bundled_towers_equal_transformers() -> None:
    model = SiglipModel.from_pretrained(TINY).eval()
    assert_equal_towers(model, TINY)
    assert load_scale(TINY) == (model.logit_scale.item(), model.logit_bias.item())


def test_bundled_image_tower_equals_transformers() -> None:
    vision = load_vision(JERSEY)
    size = vision.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        reference = SiglipVisionModel.from_pretrained(JERSEY).eval()(pixel_values=pixels)
        tokens = vision(pixels)
        assert relative_error(tokens, reference.last_hidden_state) <= 1e-5
        assert relative_error(vision.head(tokens), reference.pooler_output) <= 1e-5

"""CLIP's towers against transformers, in float32: at most 1e-5 of the reference's scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import random_clip, save_clip
from transformers import CLIPModel

from siglip_serve.checkpoint.model_config import ClipTextConfig
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.load import load_text, load_vision

GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patch16-224": ({"image_size": 224, "patch_size": 16}, {}),
    "patch14-336, 77 tokens": (
        {"image_size": 336, "patch_size": 14},
        {"max_position_embeddings": 77, "eos_token_id": 2},
    ),
    "grid does not divide, gelu": (
        {"image_size": 50, "patch_size": 16, "hidden_act": "gelu"},
        {"hidden_act": "gelu", "hidden_size": 32, "num_hidden_layers": 2},
    ),
    "tanh, other text width": (
        {"image_size": 64, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 96},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "eos_token_id": 7},
    ),
}


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def draw_ids(config: ClipTextConfig, texts: int = 4) -> torch.Tensor:
    """Ids with one to three end tokens, at places of their own, and larger ids among them."""
    generator = torch.Generator().manual_seed(1)
    shape = (texts, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    for row in range(texts - 1):  # the last one has none unless by chance
        ids[row, 3 + 2 * row :: 5] = config.eos_token_id
    return ids


def assert_equal_towers(model: CLIPModel, path: Path) -> None:
    vision, text = load_vision(path), load_text(path)
    assert isinstance(vision, ClipVisionTower)
    assert isinstance(text, ClipTextTower)
    size = vision.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = draw_ids(text.config)
    with torch.inference_mode():
        reference = model.get_image_features(pixels)
        tokens = vision(pixels)
        assert tokens.shape[1] == vision.context
        assert relative_error(tokens, reference.last_hidden_state) <= 1e-5
        assert relative_error(vision.patches(tokens), reference.last_hidden_state[:, 1:]) <= 1e-5
        assert relative_error(vision.head(tokens), reference.pooler_output) <= 1e-5
        reference = model.get_text_features(ids)
        tokens = text(ids)
        assert relative_error(tokens, reference.last_hidden_state) <= 1e-5
        assert relative_error(text.pool(tokens, ids), reference.pooler_output) <= 1e-5
    assert load_scale(path) == (model.logit_scale.item(), None)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_random_weights(name: str, tmp_path: Path) -> None:
    vision, text = GEOMETRIES[name]
    model = random_clip(vision, text)
    assert_equal_towers(model, save_clip(model, tmp_path))


def test_sharded_weights(tmp_path: Path) -> None:
    model = random_clip({"image_size": 32, "patch_size": 16})
    save_clip(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_towers(model, tmp_path)


def test_padding_is_not_seen(tmp_path: Path) -> None:
    """Reference texts come with a mask of their padding; a text's embedding is the same without."""
    model = random_clip({"image_size": 32, "patch_size": 16})
    text = load_text(save_clip(model, tmp_path))
    assert isinstance(text, ClipTextTower)
    ids = torch.full((1, text.context), text.config.eos_token_id)
    ids[0, :5] = torch.tensor([298, 5, 9, 2, 8])
    mask = (torch.arange(text.context) <= 5).long()[None]
    with torch.inference_mode():
        reference = model.get_text_features(ids, attention_mask=mask).pooler_output
        assert relative_error(text.pool(text(ids), ids), reference) <= 1e-5

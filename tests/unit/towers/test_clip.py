"""Weights of CLIP checkpoints that are not those of their configuration, and towers in mixed precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clip_checkpoints import SIDE, make_clip
from safetensors.torch import load_file, save_file

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.load import load_text, load_vision

ACTIVATIONS = ["quick_gelu", "gelu", "gelu_pytorch_tanh"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_clip(tmp_path)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(make_clip(tmp_path_factory.mktemp("clip"), request.param))


def test_lists_every_wrong_tensor(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]  # of old versions
    save_file(tensors, file)
    load_vision(checkpoint)
    del tensors["visual_projection.weight"]
    tensors["vision_model.encoder.layers.9.layer_norm1.bias"] = torch.zeros(64)
    tensors["vision_model.embeddings.class_embedding"] = torch.zeros(3)
    tensors["text_projection.bias"] = torch.zeros(48)
    tensors["logit_bias"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_vision(checkpoint)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: visual_projection.weight [48, 64]",
        "unexpected: vision_model.encoder.layers.9.layer_norm1.bias",
        "mis-shaped: vision_model.embeddings.class_embedding is [3], expected [64]",
    ]
    with pytest.raises(CheckpointError, match=r"unexpected: text_projection\.bias"):
        load_text(checkpoint)
    with pytest.raises(CheckpointError, match=r"expected one logit_scale .* got .*'logit_bias'"):
        load_scale(checkpoint)


def test_autocast_is_close(config: ModelConfig) -> None:
    vision, text = load_vision(config.path), load_text(config.path)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(text.context)[None]
    with torch.inference_mode():
        exact = [vision.head(vision(x)), text.pool(text(ids), ids)]
        with torch.autocast("cpu", torch.bfloat16):
            rough = [vision.head(vision(x)), text.pool(text(ids), ids)]
    for ours, theirs in zip(exact, rough, strict=True):
        assert 0.999 < float(torch.cosine_similarity(ours, theirs.float()).min()) < 1

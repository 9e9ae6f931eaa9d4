"""Random checkpoints in the Hugging Face layout, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedModel,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

NARROW = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}


def random_model(vision: dict[str, Any], text: dict[str, Any] | None = None, seed: int = 0) -> SiglipModel:
    """Make a reference model with random weights, biases and norms, so that no term of a block is neutral."""
    torch.manual_seed(seed)
    small_text = {**NARROW, "vocab_size": 300, "bos_token_id": None, "eos_token_id": 1}
    config = SiglipConfig(vision_config={**NARROW, **vision}, text_config={**small_text, **(text or {})})
    model = SiglipModel(config).eval()
    randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    """Give biases and norms random values."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and parameter.numel() > 1:
            mean = 1.0 if "norm" in name and "weight" in name else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.1)


def save_checkpoint(model: SiglipModel, path: Path, **save: Any) -> Path:
    """Write weights, configuration and image processor of `model` with `save_pretrained`."""
    model.save_pretrained(path, **save)
    size = model.config.vision_config.image_size
    SiglipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(path)
    return path


def random_clip(vision: dict[str, Any], text: dict[str, Any] | None = None, seed: int = 0) -> CLIPModel:
    """Make a random CLIP model whose joint space is narrower than its towers."""
    torch.manual_seed(seed)
    small_text = {**NARROW, "vocab_size": 300, "bos_token_id": 298, "eos_token_id": 299}
    config = CLIPConfig(
        vision_config={**NARROW, **vision}, text_config={**small_text, **(text or {})}, projection_dim=48
    )
    model = CLIPModel(config).eval()
    randomise(model)
    return model


def save_clip(model: CLIPModel, path: Path, **save: Any) -> Path:
    """Write weights, configuration and image processor of `model` with `save_pretrained`."""
    model.save_pretrained(path, **save)
    size = model.config.vision_config.image_size
    crop = {"height": size, "width": size}
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop).save_pretrained(path)
    return path


def random_naflex(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, seed: int = 0
) -> Siglip2Model:
    """Make a random NaFlex model of SigLIP 2."""
    torch.manual_seed(seed)
    small_text = {**NARROW, "vocab_size": 300, "bos_token_id": None, "eos_token_id": 1}
    config = Siglip2Config(
        vision_config={**NARROW, **(vision or {})}, text_config={**small_text, **(text or {})}
    )
    model = Siglip2Model(config).eval()
    randomise(model)
    return model


def save_naflex(model: PreTrainedModel, path: Path, most: int = 256) -> Path:
    """Write weights, configuration and image processor of a model or of one tower with `save_pretrained`."""
    model.save_pretrained(path)
    vision = getattr(model.config, "vision_config", model.config)
    patch = getattr(vision, "patch_size", 16)
    Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=most).save_pretrained(path)
    return path

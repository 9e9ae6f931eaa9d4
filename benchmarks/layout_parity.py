"""Every family and layout of transformers at full width (base), random weights, float32: the least cosine.

The suite's tests do the same at narrow widths, and with open_clip (tests/parity). Nothing is kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    SiglipConfig,
    SiglipModel,
)

from siglip_serve.towers.load import load_text, load_vision

VOCABULARY = 1000  # the published ones would only take time to write


def _models() -> Iterator[tuple[str, Any]]:
    torch.manual_seed(0)
    text = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2}
    yield "SigLIP base/16@224", SiglipModel(SiglipConfig(text_config=text))
    for activation in ("quick_gelu", "gelu"):
        act = {"hidden_act": activation}
        config = {"vision_config": act, "text_config": {**text, **act}}
        yield f"CLIP base/32@224, {activation}", CLIPModel(CLIPConfig(**config))
        yield f"MetaCLIP 2 base/32@224, {activation}", MetaClip2Model(MetaClip2Config(**config))


def _bin(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _compiled(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(
        {f"module._orig_mod.{name}": value for name, value in tensors.items()}, path / "model.safetensors"
    )


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "safetensors": lambda _: None,
    "wrapped and compiled": _compiled,
    "bin": _bin,
}


def _cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.cosine_similarity(ours.double(), theirs.double()).min())


@torch.inference_mode()
def main() -> None:
    """Print the least cosine of each row."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1
    for name, model in _models():
        model.eval()
        ids = torch.randint(
            3, VOCABULARY, (2, model.config.text_config.max_position_embeddings), generator=generator
        )
        ids[:, 9] = 2
        image = model.get_image_features(pixels).pooler_output
        text = model.get_text_features(ids).pooler_output
        for layout, change in LAYOUTS.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)
                model.save_pretrained(path)
                change(path)
                vision_tower, text_tower = load_vision(path), load_text(path)
                found = (
                    _cosine(vision_tower.head(vision_tower(pixels)), image),
                    _cosine(text_tower.pool(text_tower(ids), ids), text),
                )
            print(f"{name}, {layout}: image {found[0]:.9f}, text {found[1]:.9f}", flush=True)
        for part in ("vision", "text"):
            tower = getattr(model, f"{part}_model")
            with tempfile.TemporaryDirectory() as folder:
                tower.save_pretrained(folder)
                if part == "vision":
                    mine = load_vision(Path(folder))
                    found_alone = _cosine(mine.head(mine(pixels)), tower(pixels).pooler_output)
                else:
                    alone = load_text(Path(folder))
                    found_alone = _cosine(alone.pool(alone(ids), ids), tower(ids).pooler_output)
            print(f"{name}, {part} tower alone: {found_alone:.9f}", flush=True)


if __name__ == "__main__":
    main()

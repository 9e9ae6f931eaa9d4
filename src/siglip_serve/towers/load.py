"""Load the towers of a checkpoint of either family."""

from __future__ import annotations

from pathlib import Path

from siglip_serve.checkpoint.config import load_config
from siglip_serve.towers import clip, siglip
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.siglip import TextTower, VisionTower

__all__ = ["AnyTextTower", "AnyVisionTower", "load_text", "load_vision"]

AnyVisionTower = VisionTower | ClipVisionTower
AnyTextTower = TextTower | ClipTextTower


def load_vision(path: Path) -> AnyVisionTower:
    """Load the vision tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the configuration is not usable, or the weights are not those of it. All missing,
            unexpected and mis-shaped tensors are listed, up to 20.
    """
    return clip.load_vision(path) if _is_clip(path) else siglip.load_vision(path)


def load_text(path: Path) -> AnyTextTower:
    """Load the text tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: there is no text tower, or as for `load_vision`.
    """
    return clip.load_text(path) if _is_clip(path) else siglip.load_text(path)


def _is_clip(path: Path) -> bool:
    return load_config(path).family == "clip"

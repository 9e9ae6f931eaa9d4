"""The towers of a checkpoint of either family."""

from __future__ import annotations

from pathlib import Path

from siglip_serve.checkpoint.config import load_config
from siglip_serve.towers import clip, siglip
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.siglip import TextTower, VisionTower

__all__ = ["AnyTextTower", "AnyVisionTower", "load_scale", "load_text", "load_vision"]

AnyVisionTower = VisionTower | ClipVisionTower
AnyTextTower = TextTower | ClipTextTower


def load_vision(path: Path) -> AnyVisionTower:
    """The vision tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the configuration or the weights are not what they should be; every missing,
            unexpected and mis-shaped tensor is listed.
    """
    return clip.load_vision(path) if _is_clip(path) else siglip.load_vision(path)


def load_text(path: Path) -> AnyTextTower:
    """The text tower, likewise.

    Raises:
        CheckpointError: as `load_vision`; or there is none.
    """
    return clip.load_text(path) if _is_clip(path) else siglip.load_text(path)


def load_scale(path: Path) -> tuple[float, float | None]:
    """`(logit_scale, logit_bias)` of a checkpoint; CLIP has no bias, and no probability of a pair.

    Raises:
        CheckpointError: the checkpoint lacks one that it should have, or has another beside them.
    """
    return (clip.load_scale(path), None) if _is_clip(path) else siglip.load_scale(path)


def _is_clip(path: Path) -> bool:
    return load_config(path).family == "clip"

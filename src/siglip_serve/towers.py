"""Provisional."""

from pathlib import Path

from siglip_serve.checkpoint import read_json
from siglip_serve.clip import ClipVisionTower, load_clip
from siglip_serve.siglip import VisionTower
from siglip_serve.siglip import load_vision as load_siglip


def load_vision(path: Path) -> VisionTower | ClipVisionTower:
    return (
        load_clip(path) if read_json(path / "config.json").get("model_type") == "clip" else load_siglip(path)
    )

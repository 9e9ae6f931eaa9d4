"""Random CLIP checkpoints of a given geometry, and edits of their JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from random_checkpoints import random_clip, save_clip

__all__ = ["PATCH", "SIDE", "edit_json", "make_clip"]

SIDE, PATCH = 50, 16


def make_clip(path: Path, activation: str = "quick_gelu") -> Path:
    """Save a checkpoint with images of SIDE pixels, which patches do not divide."""
    vision = {"image_size": SIDE, "patch_size": PATCH, "hidden_act": activation}
    return save_clip(random_clip(vision, {"hidden_act": activation}), path)


def edit_json(file: Path, **changes: Any) -> None:
    """Set values of a JSON file; `part__name` is the key `name` of the object `part`."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (content[part] if part else content)[name] = value
    file.write_text(json.dumps(content))

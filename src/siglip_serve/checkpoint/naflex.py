"""Translate the configuration of a NaFlex checkpoint into that of a SigLIP for squares, and read its patches.

Values that the files leave out have the defaults of the reference's `Siglip2VisionConfig` and
`Siglip2ImageProcessor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip_serve.errors import CheckpointError, SettingsError

__all__ = ["check_most_patches", "naflex_patches", "square_config"]

_PATCH_SIZE, _PATCHES, _BILINEAR = 16, 256, 2
_MOST_PATCHES = 4096  # attention takes the square of it


def square_config(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the side of the square on which the positions were learned, as `vision_config.image_size`.

    Raises:
        CheckpointError: the positions are not those of a square, or a value is no whole number above 0.
    """
    given = config.get("vision_config") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{file}: vision_config is {given!r}, expected an object")
    values = {"patch_size": _PATCH_SIZE, "num_patches": _PATCHES, **given}
    patch, learned = (
        _count(file, f"vision_config.{key}", values[key]) for key in ("patch_size", "num_patches")
    )
    grid = math.isqrt(learned)
    if grid**2 != learned:
        raise CheckpointError(f"{file}: vision_config.num_patches is {learned}, expected a square number")
    return {**config, "vision_config": {**values, "image_size": grid * patch}}


def naflex_patches(file: Path, processor: Mapping[str, Any], patch: int) -> tuple[int, int]:
    """Read the most patches of an image and the number of the resize's filter from an image processor.

    Raises:
        CheckpointError: patches have not the size `patch`, that of the tower, or their number is none.
    """
    if processor.get("patch_size", patch) != patch:
        raise CheckpointError(
            f"{file}: patch_size is {processor['patch_size']!r}, the vision tower takes patches of {patch}"
        )
    most = _count(file, "max_num_patches", processor.get("max_num_patches", _PATCHES))
    resample = processor.get("resample")
    return most, _BILINEAR if resample is None else resample


def check_most_patches(most: int) -> None:
    """Check the setting `max_num_patches`.

    Raises:
        SettingsError: it is more than 4,096.
    """
    if most > _MOST_PATCHES:
        raise SettingsError(f"setting 'max_num_patches': got {most}, expected at most {_MOST_PATCHES}")


def _count(file: Path, name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_PATCHES:
        raise CheckpointError(f"{file}: {name} is {value!r}, expected a whole number of 1 to {_MOST_PATCHES}")
    return value

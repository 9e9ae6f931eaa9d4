"""Raw pixels as features: what a classifier gets that has no model at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from validate.dataset import Sample
from validate.errors import DatasetError

__all__ = ["pixel_features"]


def pixel_features(samples: Sequence[Sample], side: int, label: str) -> NDArray[np.float32]:
    """Pixels [n, side * side * 3] in 0..1, resized without keeping the aspect, transparency on white.

    Raises:
        DatasetError: a file is not an image that Pillow reads.
    """
    features = np.empty((len(samples), side * side * 3), dtype=np.float32)
    for row, sample in enumerate(tqdm(samples, desc=label, unit="row")):
        try:
            features[row] = _pixels(sample.path, side)
        except OSError as error:
            raise DatasetError(f"{sample.path}: no pixels for the baseline ({error})") from error
    return features


def _pixels(path: Path, side: int) -> NDArray[np.float32]:
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    rgb = Image.alpha_composite(white, rgba).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(rgb, dtype=np.float32).ravel() / 255

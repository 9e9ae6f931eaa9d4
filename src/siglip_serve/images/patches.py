"""Pictures keep their aspect ratio and become the patches that a NaFlex tower takes.

A picture is resized to the largest grid of whole patches that has its aspect ratio and at most as many
patches as the checkpoint allows. `pil` mode gives the pixels of transformers' `Siglip2ImageProcessorPil`,
`fast` mode gives the same within two levels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from siglip_serve.checkpoint.model_config import ModelConfig, NaflexImageConfig
from siglip_serve.errors import ImageError
from siglip_serve.images.resize import Mode, Pixels, resize

__all__ = ["cut_patches", "grid_of", "lay_patches", "patch_grid", "patched_size"]

# The reference searches the scale in this range until it is known this precisely. Large pictures show it.
_SMALLEST, _LARGEST, _PRECISION = 1e-6, 100.0, 1e-5


def cut_patches(pixels: Pixels, image: NaflexImageConfig, mode: Mode) -> Pixels:
    """uint8 `[T, 3 P P]` of uint8 `[H, W, 3]`: T patches of P x P pixels, row by row, then zeros.

    T is the most patches that an image may have. The first rows times columns of `patch_grid` are its own.

    Raises:
        ImageError: a picture that `patch_grid` refuses.
    """
    return lay_patches(resize(pixels, patched_size(image, *pixels.shape[:2]), image.resample, mode), image)


def patched_size(image: NaflexImageConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width to which a picture is resized, those of whole patches.

    Raises:
        ImageError: a picture that `patch_grid` refuses.
    """
    rows, columns = patch_grid(image, height, width)
    return rows * image.patch_size, columns * image.patch_size


def lay_patches(resized: Pixels, image: NaflexImageConfig) -> Pixels:
    """uint8 `[T, 3 P P]`, as of `cut_patches`, of a picture that has its `patched_size`."""
    side = image.patch_size
    rows, columns = resized.shape[0] // side, resized.shape[1] // side
    patches = resized.reshape(rows, side, columns, side, 3).swapaxes(1, 2)  # [rows, columns, P, P, 3]
    cut = np.zeros((image.max_patches, 3 * side**2), dtype=np.uint8)
    cut[: rows * columns] = patches.reshape(rows * columns, -1)
    return cut


def grid_of(model: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """Find the rows and columns of the patches of a picture for a checkpoint of any family.

    Raises:
        ImageError: a picture that `patch_grid` refuses.
    """
    if isinstance(model.image, NaflexImageConfig):
        return patch_grid(model.image, height, width)
    return model.vision.grid_size, model.vision.grid_size


@lru_cache(maxsize=4096)
def patch_grid(image: NaflexImageConfig, height: int, width: int) -> tuple[int, int]:
    """Find the rows and columns of the patches of a picture.

    Both sides are scaled alike and rounded up to whole patches. The scale is the largest by which the patches
    are not too many, at most 100. It is searched as in the reference, since its precision shows.

    Raises:
        ImageError: one side is more than the most patches times the other: no grid has this aspect ratio.
    """
    most = image.max_patches
    if max(height, width) > most * min(height, width):
        raise ImageError(
            f"picture of {width}x{height} pixels is too thin: expected sides of at most {most}:1, since it "
            f"becomes at most {most} patches"
        )
    low, high = _SMALLEST, _LARGEST
    while high - low >= _PRECISION:
        scale = (low + high) / 2
        if math.prod(_grid(image, height, width, scale)) <= most:
            low = scale
        else:
            high = scale
    return _grid(image, height, width, low)


def _grid(image: NaflexImageConfig, height: int, width: int, scale: float) -> tuple[int, int]:
    rows, columns = (max(1, math.ceil(side * scale / image.patch_size)) for side in (height, width))
    return rows, columns

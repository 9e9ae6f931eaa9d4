"""Decoded images become uint8 RGB, upright, on white.

They are converted in strips: a whole picture in each of the forms on the way would take several times the
memory of its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve.errors import ImageError
from siglip_serve.images.resize import Pixels
from siglip_serve.images.tiff import grey_range

__all__ = ["SWAPPED_AXES", "TURNED", "Canvas", "orient", "paint_array", "paint_image"]

TURNED = frozenset(range(2, 9))  # orientations of EXIF that are not upright
_MIRRORED_ROWS = frozenset({3, 4, 7, 8})
_MIRRORED_COLUMNS = frozenset({2, 3, 6, 7})
SWAPPED_AXES = frozenset({5, 6, 7, 8})  # those with columns for rows
_STRIP = 2**18  # pixels, which fit into a core's cache


class Canvas(Protocol):
    """Makes memory for a decoded image, as `numpy.empty` does."""

    def __call__(self, shape: tuple[int, int, int], /, *, dtype: type[np.uint8]) -> Pixels:
        """Return an array of this shape, whatever it holds."""


def paint_image(image: Image.Image, orientation: int, canvas: Canvas) -> Pixels:
    """uint8 RGB `[H, W, 3]` of a loaded image in any mode of Pillow, transparency composited on white.

    Raises:
        ImageError: floating-point pixels, or grey values out of range.
    """
    if image.mode == "F":
        raise ImageError("floating-point pixels, of no defined range; expected 1 to 16 bits per channel")
    convert = _grey_to_rgb(image) if image.mode.startswith("I") else _to_rgb
    width, height = image.size
    upright = orientation not in TURNED
    pixels = (canvas if upright else np.empty)((height, width, 3), dtype=np.uint8)
    for top, bottom in _strips(width, height):
        whole = top == 0 and bottom == height
        pixels[top:bottom] = convert(image if whole else image.crop((0, top, width, bottom)))
    return pixels if upright else orient(pixels, orientation, canvas)


def paint_array(stored: NDArray[np.uint8], orientation: int, canvas: Canvas) -> Pixels:
    """uint8 RGB `[H, W, 3]` of uint8 RGB or RGBA `[H, W, 3 or 4]`, on white."""
    height, width, channels = stored.shape
    upright = orientation not in TURNED
    if channels == 3:
        return orient(stored, orientation, canvas)
    pixels = (canvas if upright else np.empty)((height, width, 3), dtype=np.uint8)
    for top, bottom in _strips(width, height):
        pixels[top:bottom] = _to_rgb(Image.fromarray(stored[top:bottom]))
    return pixels if upright else orient(pixels, orientation, canvas)


def orient(pixels: Pixels, orientation: int, canvas: Canvas) -> Pixels:
    """Turn `[H, W, 3]` as stored upright: contiguous, `[W, H, 3]` for orientations 5 to 8."""
    if orientation in SWAPPED_AXES:
        pixels = pixels.swapaxes(0, 1)
    if orientation in _MIRRORED_ROWS:
        pixels = pixels[::-1]
    if orientation in _MIRRORED_COLUMNS:
        pixels = pixels[:, ::-1]
    height, width, _ = pixels.shape
    upright = canvas((height, width, 3), dtype=np.uint8)
    upright[...] = pixels
    return upright


def _strips(width: int, height: int) -> Iterator[tuple[int, int]]:
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield top, min(height, top + rows)


def _to_rgb(image: Image.Image) -> Pixels:
    """Transparency composited on white as transformers does since 5.21."""
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() == (255, 255):  # the same pixels in a tenth of the time
            return np.asarray(image.convert("RGB"))
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _grey_to_rgb(image: Image.Image) -> Callable[[Image.Image], Pixels]:
    """Make the conversion of grey of 12 or 16 bits to 0 to 255, where Pillow's own clips at 255."""
    full, inverted = grey_range(image)
    transparent = image.info.get("transparency")
    width, height = image.size
    strips = (np.asarray(image.crop((0, top, width, bottom))) for top, bottom in _strips(width, height))
    ranges = [(int(values.min()), int(values.max())) for values in strips]
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    if lowest < 0 or highest > full:
        raise ImageError(f"grey values from {lowest} to {highest}, expected 0 to {full}")

    def convert(strip: Image.Image) -> Pixels:
        values = np.asarray(strip)
        grey = ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)
        if inverted:
            np.subtract(255, grey, out=grey)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return grey[:, :, np.newaxis]

    return convert

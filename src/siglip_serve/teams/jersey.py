"""Pixels of players' jerseys, from crops or from a frame and boxes around its players."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from siglip_serve.errors import ImageError, ImageTooLargeError, InvalidInputError, SettingsError
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.resize import Pixels

__all__ = ["COLOR_ORDERS", "ColorOrder", "Region", "cut_box", "jersey_roi", "parse_region", "rgb_frame"]

ColorOrder = Literal["RGB", "BGR"]

COLOR_ORDERS: tuple[ColorOrder, ...] = get_args(ColorOrder)
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Region:
    """Where the jersey is, as parts 0 to 1 of a player's box."""

    left: float
    top: float
    right: float
    bottom: float

    def __str__(self) -> str:
        return ",".join(f"{side:g}" for side in (self.left, self.top, self.right, self.bottom))


def parse_region(text: str) -> Region:
    """Parse a region such as `0.25,0.2,0.75,0.5`: left, top, right, bottom.

    Raises:
        SettingsError: not four numbers, or not 0 <= left < right <= 1 and 0 <= top < bottom <= 1.
    """
    try:
        region = Region(*(float(side) for side in text.split(",")))
    except (TypeError, ValueError):
        raise SettingsError(f"jersey_region: got {text!r}, expected left,top,right,bottom") from None
    if not (0 <= region.left < region.right <= 1 and 0 <= region.top < region.bottom <= 1):
        raise SettingsError(f"jersey_region: got {text!r}, expected 0 <= left < right <= 1, and so downwards")
    return region


def jersey_roi(pixels: Pixels, region: Region) -> tuple[Pixels, bool]:
    """The jersey of a player's crop.

    Args:
        pixels: uint8 RGB [H, W, 3], at least 1x1.
        region: bounds are cut to whole pixels towards the upper left, as the published recipe does.

    Returns:
        uint8 RGB [h, w, 3], a view; and whether the region was empty, and this is the whole crop instead.
    """
    height, width = pixels.shape[:2]
    top, bottom = int(height * region.top), int(height * region.bottom)
    left, right = int(width * region.left), int(width * region.right)
    if top >= bottom or left >= right:
        return pixels, True
    return pixels[top:bottom, left:right], False


def rgb_frame(frame: NDArray[np.uint8], order: ColorOrder, limits: ImageLimits) -> Pixels:
    """Convert a raw frame to RGB.

    Args:
        frame: uint8 [H, W, C]; grey (1 channel), colours in `order` (3), or these and an alpha channel, which
            is dropped (4).
        order: of the colours.
        limits: of which `max_pixels` holds here.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        ImageError: another number of channels, or no pixels.
        ImageTooLargeError: more pixels than allowed.
    """
    height, width, channels = frame.shape
    if channels not in _CHANNELS or not height or not width:
        raise ImageError(f"got shape {list(frame.shape)}, expected [height, width, 1, 3 or 4]")
    if height * width > limits.max_pixels:
        raise ImageTooLargeError(f"{width}x{height} pixels, at most {limits.max_pixels} are allowed")
    if channels == 1:
        return np.repeat(frame, 3, axis=2)
    return frame[:, :, :3] if order == "RGB" else frame[:, :, 2::-1]


def cut_box(frame: Pixels, box: NDArray[np.float32]) -> Pixels:
    """The pixels [h, w, 3] of a frame [H, W, 3] that a box touches. Pixels outside the frame are left out.

    Args:
        frame: uint8.
        box: left, top, right, bottom in pixels; the right and lower edges are not part of it.

    Raises:
        InvalidInputError: not finite, inverted or empty, or wholly outside.
    """
    height, width = frame.shape[:2]
    given = f"got {', '.join(f'{side:g}' for side in box)}"
    if not np.isfinite(box).all():
        raise InvalidInputError(f"{given}, expected finite numbers")
    left, top, right, bottom = (float(side) for side in box)
    if left >= right or top >= bottom:
        raise InvalidInputError(f"{given}, expected left < right and top < bottom, in pixels")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise InvalidInputError(f"{given}: outside the frame of {width}x{height} pixels")
    columns = slice(max(0, int(np.floor(left))), min(width, int(np.ceil(right))))
    rows = slice(max(0, int(np.floor(top))), min(height, int(np.ceil(bottom))))
    return frame[rows, columns]

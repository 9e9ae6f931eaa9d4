"""Transparent colours of PNG files, which Pillow compares with pixels of another bit depth."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from siglip_serve.images.resize import Pixels

__all__ = ["correct_transparency"]

_SIGNATURE = 8
_HEADER = struct.Struct(">4sIIBB")
_GREY, _RGB, _PALETTE = 0, 2, 3


def correct_transparency(image: Image.Image, data: bytes) -> Image.Image:
    """Give a loaded PNG the transparency that its chunk tRNS means.

    Pillow compares grey of 2 and 4 bits and RGB of 16 bits, which it has scaled to 8, with the unscaled
    transparent colour, and drops the rest of some palettes' opacities.

    Args:
        image: as Pillow has loaded it. Its `info` is corrected.
        data: the file.

    Returns:
        The image, or for RGB of 16 bits one with its transparent pixels in white.
    """
    found = _read_chunk(data)
    if found is None or image.info.get("transparency") is None:
        return image
    bits, kind, chunk = found
    # Bits above the depth are to be ignored.
    values = [value & (1 << bits) - 1 for (value,) in struct.iter_unpack(">H", chunk[: len(chunk) // 2 * 2])]
    if kind == _PALETTE:
        image.info["transparency"] = chunk
    elif kind == _GREY and bits < 16:
        image.info["transparency"] = values[0] * (255 // ((1 << bits) - 1))
    elif kind == _RGB and bits == 8:
        image.info["transparency"] = tuple(values[:3])
    elif kind == _RGB and bits == 16:
        low = _low_bytes(data)
        pixels = np.array(image)
        color = np.array(values[:3])
        pixels[((pixels == color >> 8) & (low == color & 0xFF)).all(axis=2)] = 255
        image = Image.fromarray(pixels)
    return image


def _read_chunk(data: bytes) -> tuple[int, int, bytes] | None:
    """Bit depth, colour type and content of tRNS, or None if no such chunk precedes the image data."""
    position, found = _SIGNATURE, None
    name, _, _, bits, kind = _HEADER.unpack_from(data, position + 4)
    if name != b"IHDR":
        return None
    while position + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        if name == b"IDAT":
            break
        if name == b"tRNS":
            found = bits, kind, data[position + 8 : position + 8 + size]
        position += size + 12
    return found


def _low_bytes(data: bytes) -> Pixels:
    """The lower half of each sample of RGB of 16 bits, uint8 [H, W, 3]. Pillow keeps the upper one."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.array(image)

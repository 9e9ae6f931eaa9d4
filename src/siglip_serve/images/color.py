"""Colours of a picture in sRGB, by the ICC profile that its file brings.

Without this, samples are taken as they are stored, whatever space they belong to. The published checkpoints
learnt so.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

__all__ = ["jpeg_profile", "to_srgb"]

_LARGEST_PROFILE = 4 * 2**20  # bytes; profiles of printing presses reach 2 MB
_PROFILES = 16  # whose conversions stay in memory
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # of a profile, by the mode of the pixels
# Modes of Pillow as modes with a profile, without and with transparency.
_PLAIN = {
    **dict.fromkeys(("RGB", "RGBA", "RGBa", "P", "PA", "YCbCr"), ("RGB", "RGBA")),
    **dict.fromkeys(("1", "L", "LA", "La"), ("L", "LA")),
    "CMYK": ("CMYK", "CMYK"),
}
_RELATIVE = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_GRID = 9  # values per channel for which a conversion is compared with none

_ICC = b"ICC_PROFILE\0"
_APP2 = 0xE2
_START_OF_SCAN = 0xDA


def jpeg_profile(data: bytes) -> bytes:
    """The ICC profile in the segments before a JPEG's first scan, or b"" if there is none or a part lacks."""
    parts: dict[int, bytes] = {}
    total, position = 0, 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _START_OF_SCAN:
            break
        content = data[position + 4 : position + 2 + length]
        if marker == _APP2 and content.startswith(_ICC) and len(content) > len(_ICC) + 2:
            number, total = content[len(_ICC)], content[len(_ICC) + 1]
            parts.setdefault(number, content[len(_ICC) + 2 :])
        position += 2 + max(2, length)
    if not total or set(parts) != set(range(1, total + 1)):
        return b""
    return b"".join(parts[number] for number in sorted(parts))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture in sRGB, relative colorimetric with black point compensation.

    A picture without a profile stays as it is, and so does one whose profile is broken, larger than 4 MB, or
    for other kinds of samples.

    Args:
        image: loaded, in any mode.
        profile: the bytes of the profile, if there is one.

    Returns:
        The image itself, or one of the mode RGB or RGBA.
    """
    if not profile or len(profile) > _LARGEST_PROFILE:
        return image
    transparent = "transparency" in image.info or {"A", "a"} & set(image.getbands())
    if image.mode in _PLAIN:
        colors = image.convert(_PLAIN[image.mode][bool(transparent)])
    else:  # deeper grey, and colours that are in no device's space
        return image
    bare = {"RGBA": "RGB", "LA": "L"}.get(colors.mode, colors.mode)
    conversion = _conversion(profile, bare)
    if conversion is None:
        return image
    converted = conversion.apply(colors.convert(bare))
    if colors.mode != bare:
        converted.putalpha(colors.getchannel("A"))
    return converted


@lru_cache(_PROFILES)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from a profile's space to sRGB, or None where there is none or it changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _SPACES[mode]:
            return None
        conversion = ImageCms.buildTransform(source, _SRGB, mode, "RGB", _RELATIVE, _FLAGS)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode == "RGB" and _changes_nothing(conversion) else conversion


def _changes_nothing(conversion: ImageCms.ImageCmsTransform) -> bool:
    """Tell if a conversion of RGB is that of sRGB itself, up to rounding."""
    values = np.linspace(0, 255, _GRID).astype(np.uint8)
    grid = np.stack(np.meshgrid(values, values, values), axis=-1).reshape(_GRID, _GRID**2, 3)
    converted = np.asarray(conversion.apply(Image.fromarray(grid)))
    return int(np.abs(converted.astype(int) - grid).max()) <= 1


_SRGB = ImageCms.createProfile("sRGB")

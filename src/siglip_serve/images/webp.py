"""WebP files of one picture, decoded by libwebp into the memory of their pixels.

Pillow decodes every file as an animation, which takes twice the time and six times the memory.
"""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache

import numpy as np
from PIL import features

from siglip_serve.images.formats import ImageLimits, check_size
from siglip_serve.images.jpeg import read_orientation
from siglip_serve.images.paint import TURNED, Canvas, orient, paint_array
from siglip_serve.images.resize import Pixels

__all__ = ["decode_webp"]

_MOST_CHUNKS = 1_000
_ANIMATED, _ALPHA = 0x02, 0x10  # flags of an extended file
_LOSSLESS_ALPHA = 1 << 28


def decode_webp(data: bytes, limits: ImageLimits, canvas: Canvas) -> Pixels | None:
    """uint8 RGB `[H, W, 3]`, upright, on white, or None for a file that Pillow has to judge.

    These are animations and files with faults.

    Raises:
        ImageTooLargeError: more pixels than allowed.
    """
    library, chunks = _library(), _chunks(data)
    if library is None or chunks is None:
        return None
    across, down = ctypes.c_int(), ctypes.c_int()
    if not library.WebPGetInfo(data, len(data), ctypes.byref(across), ctypes.byref(down)):
        return None
    width, height = across.value, down.value
    check_size(width, height, limits)
    orientation = read_orientation(chunks.get(b"EXIF", b""), chunks.get(b"XMP ", b""))
    if _has_alpha(data):
        stored = np.empty((height, width, 4), np.uint8)
        if not _decode(library.WebPDecodeRGBAInto, data, stored):
            return None
        return paint_array(stored, orientation, canvas)
    upright = orientation not in TURNED
    pixels = (canvas if upright else np.empty)((height, width, 3), dtype=np.uint8)
    if not _decode(library.WebPDecodeRGBInto, data, pixels):
        return None
    return pixels if upright else orient(pixels, orientation, canvas)


def _decode(function: ctypes._NamedFuncPointer, data: bytes, pixels: Pixels) -> bool:
    return bool(function(data, len(data), pixels.ctypes.data, pixels.nbytes, pixels.strides[0]))


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The libwebp that Pillow's own module was linked to, or None where its functions are hidden."""
    if not features.check("webp"):
        return None
    from PIL import _webp

    library = ctypes.CDLL(_webp.__file__)
    names = ("WebPGetInfo", "WebPDecodeRGBInto", "WebPDecodeRGBAInto")
    if not all(hasattr(library, name) for name in names):
        return None
    integer = ctypes.POINTER(ctypes.c_int)
    library.WebPGetInfo.argtypes = [ctypes.c_char_p, ctypes.c_size_t, integer, integer]
    for name in names[1:]:
        function = getattr(library, name)
        function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        function.restype = ctypes.c_void_p
    return library


def _chunks(data: bytes) -> dict[bytes, bytes] | None:
    """The metadata by its chunks' names, or None for an animation or a broken file."""
    if data[12:16] not in (b"VP8 ", b"VP8L", b"VP8X") or len(data) < 30:
        return None
    found: dict[bytes, bytes] = {}
    if data[12:16] != b"VP8X":
        return found
    if data[20] & _ANIMATED:
        return None
    end, position = 8 + int.from_bytes(data[4:8], "little"), 12
    for _ in range(_MOST_CHUNKS):
        if position + 8 > min(end, len(data)):
            return found
        name, size = struct.unpack_from("<4sI", data, position)
        if name in (b"EXIF", b"XMP "):
            found.setdefault(name, data[position + 8 : position + 8 + size])
        position += 8 + size + size % 2
    return None


def _has_alpha(data: bytes) -> bool:
    """True if the header says so, which is what Pillow goes by."""
    if data[12:16] == b"VP8X":
        return bool(data[20] & _ALPHA)
    return data[12:16] == b"VP8L" and bool(int.from_bytes(data[21:25], "little") & _LOSSLESS_ALPHA)

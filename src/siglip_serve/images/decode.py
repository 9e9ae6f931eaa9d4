"""Pixels of an image file: its first frame, upright, on white, by Pillow or by libjpeg-turbo."""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

# Pillow would otherwise import all of its plugins, a second's work, when the first such image comes.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from siglip_serve.config import Color
from siglip_serve.errors import ImageError, ImageTooLargeError
from siglip_serve.images.color import jpeg_profile, to_srgb
from siglip_serve.images.formats import ImageLimits, check_size
from siglip_serve.images.heif import open_heif
from siglip_serve.images.jpeg import read_header, read_orientation
from siglip_serve.images.png import correct_transparency
from siglip_serve.images.resize import Pixels
from siglip_serve.images.tiff import grey_range, load_tiff, name_unread_tiff, silence_tiff

__all__ = ["decode_fast", "decode_with_pil"]

# Pillow's parsers are Python, and hostile bytes make them raise any of these. Fuzzing met OSError,
# SyntaxError, ValueError, TypeError and RuntimeError. The others are raised by name in Pillow, or by the
# readers that it builds on.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)

silence_tiff()

_AVIF_EXIF = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MIRRORED_ROWS = frozenset({3, 4, 7, 8})
_MIRRORED_COLUMNS = frozenset({2, 3, 6, 7})
_SWAPPED_AXES = frozenset({5, 6, 7, 8})


def decode_fast(data: bytes, kind: str, limits: ImageLimits, color: Color = "stored") -> Pixels:
    """uint8 RGB `[H, W, 3]`, upright, contiguous. libjpeg-turbo reads it without Pillow where both agree."""
    if kind == "JPEG" and (color == "stored" or not jpeg_profile(data)):
        header = read_header(data)
        pixels = _decode_jpeg(data, limits)
        if pixels is not None:
            return _orient(pixels, read_orientation(header.exif, header.xmp))
    # torch takes no read-only memory, which is what `asarray` would give.
    return np.array(decode_with_pil(data, kind, limits, color))


def _decode_jpeg(data: bytes, limits: ImageLimits) -> Pixels | None:
    """uint8 RGB `[H, W, 3]` as stored, or None where Pillow has to judge: CMYK, and files with faults."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(int(width), int(height), limits)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def decode_with_pil(data: bytes, kind: str, limits: ImageLimits, color: Color = "stored") -> Image.Image:
    """The first frame as Pillow decodes it, upright, mode RGB."""
    profile = jpeg_profile(data) if kind == "JPEG" and color == "srgb" else b""
    header = read_header(data) if kind == "JPEG" else None
    if header is not None:
        data = header.without_metadata(data)
    elif kind == "AVIF":
        # AVIF has an orientation of its own and asks readers to ignore the one in EXIF; Pillow does, but
        # a broken block fails it. An item of unknown type is passed over.
        data = _AVIF_EXIF.sub(rb"\1skip", data)
    try:
        with _without_warnings(), _open(data, kind) as image:
            check_size(*image.size, limits)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                load_tiff(image)
            else:
                image.load()
            exif, xmp = _metadata(image) if header is None else (header.exif, header.xmp)
            samples = correct_transparency(image, data) if kind == "PNG" else image
            if color == "srgb":
                samples = to_srgb(samples, profile or image.info.get("icc_profile"))
            rgb = _to_rgb(samples)
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"at most {limits.max_pixels} pixels are allowed: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"broken {kind}: the header of its {len(data)} bytes cannot be read") from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        fault = "truncated" if "truncated" in reason.lower() else "broken"
        raise ImageError(f"{fault} {kind}: {reason}") from error
    transposition = _TRANSPOSITIONS.get(read_orientation(exif, xmp))
    return rgb if transposition is None else rgb.transpose(transposition)


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    if kind == "HEIC":
        return open_heif(data)
    try:
        return Image.open(io.BytesIO(data), formats=(kind,))
    except (UnidentifiedImageError, KeyError):  # KeyError: a compression that Pillow does not know
        unread = None
        if kind == "TIFF":
            with suppress(*_DECODER_ERRORS):
                unread = name_unread_tiff(data)
        if unread is None:
            raise
        raise unread from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB, transparency composited on white as transformers does since 5.21."""
    if image.mode == "F":
        raise ImageError("floating-point pixels, of no defined range; expected 1 to 16 bits per channel")
    if image.mode.startswith("I"):
        return _scale_to_8_bit(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits as mode L, scaled to 0 to 255, where Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    full, inverted = grey_range(image)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > full:
        raise ImageError(f"grey values from {lowest} to {highest}, expected 0 to {full}")
    grey = ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)
    if inverted:
        np.subtract(255, grey, out=grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _metadata(image: Image.Image) -> tuple[bytes, bytes]:
    """EXIF and XMP blocks of an image that is no JPEG, each empty where there is none."""
    if image.format == "TIFF":  # its orientation lies in the file's own tags, and Pillow has applied it
        return b"", b""
    exif = image.info.get("exif", b"")
    if not exif and isinstance(profile := image.info.get("Raw profile type exif"), str):
        exif = _from_hex("".join(profile.split("\n")[3:]))
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    return exif, xmp.encode() if isinstance(xmp, str) else xmp


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _orient(pixels: Pixels, orientation: int) -> Pixels:
    """Turn `[H, W, 3]` as stored upright: contiguous, `[W, H, 3]` for orientations 5 to 8."""
    if orientation in _SWAPPED_AXES:
        pixels = pixels.swapaxes(0, 1)
    if orientation in _MIRRORED_ROWS:
        pixels = pixels[::-1]
    if orientation in _MIRRORED_COLUMNS:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


class _WarningsOff:
    """Number of threads inside `_without_warnings`, and the filters to restore after the last."""

    lock = threading.Lock()
    depth = 0
    saved: warnings.catch_warnings[None] | None = None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings about metadata and bombs: here each is either harmless or an error.

    `warnings.catch_warnings` alone would leave the wrong filters behind when threads overlap.
    """
    with _WarningsOff.lock:
        if _WarningsOff.depth == 0:
            _WarningsOff.saved = warnings.catch_warnings(action="ignore")
            _WarningsOff.saved.__enter__()
        _WarningsOff.depth += 1
    try:
        yield
    finally:
        with _WarningsOff.lock:
            _WarningsOff.depth -= 1
            if _WarningsOff.depth == 0 and _WarningsOff.saved is not None:
                _WarningsOff.saved.__exit__(None, None, None)

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
    BmpImagePlugin,  # noqa: F401 - registers its own decoder of run lengths first
    Image,
    ImageFile,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from siglip_serve.config import Color
from siglip_serve.errors import ImageCostError, ImageError, ImageTooLargeError
from siglip_serve.images.bmp import install_bmp_runs
from siglip_serve.images.color import jpeg_profile, to_srgb
from siglip_serve.images.formats import ImageLimits, check_size
from siglip_serve.images.heif import open_heif
from siglip_serve.images.jpeg import JpegHeader, read_header, read_orientation
from siglip_serve.images.paint import TURNED, Canvas, orient, paint_array, paint_image
from siglip_serve.images.png import correct_transparency
from siglip_serve.images.resize import Mode, Pixels
from siglip_serve.images.tiff import load_tiff, name_unread_tiff, silence_tiff
from siglip_serve.images.webp import decode_webp

__all__ = ["decode_file"]

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
install_bmp_runs()

_NO_MEMORY = re.compile(r"(?i)out of memory|cannot allocate memory|insufficient memory")
_AVIF_EXIF = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)


def decode_file(
    data: bytes,
    kind: str,
    mode: Mode,
    limits: ImageLimits,
    header: JpegHeader | None = None,
    canvas: Canvas = np.empty,
    color: Color = "stored",
) -> Pixels:
    """uint8 RGB `[H, W, 3]`, upright, contiguous, of the first frame.

    In `fast` mode libjpeg-turbo reads the JPEGs of which it makes the same as Pillow.

    Args:
        data: the file.
        kind: name of its format.
        mode: `fast` or `pil`.
        limits: on its pixels.
        header: of a JPEG, if it has been read.
        canvas: makes the memory of the result.
        color: `srgb` converts the samples by the file's ICC profile.

    Raises:
        ImageError: not a decodable image.
        ImageTooLargeError: more pixels than allowed.
        ImageCostError: there is not enough memory for it.
    """
    if kind == "JPEG" and header is None:
        header = read_header(data)
    applied = color == "srgb" and (kind != "JPEG" or bool(jpeg_profile(data)))  # Pillow gives the profile
    if header is not None and mode == "fast" and not applied:
        pixels = _decode_jpeg(data, header, limits, canvas)
        if pixels is not None:
            return pixels
    with _named_faults(kind, len(data), limits), _without_warnings():
        pixels = None
        if kind == "WebP" and not applied:
            pixels = decode_webp(data, limits, canvas)
        elif kind == "AVIF" and not applied:
            pixels = _decode_avif(data, limits, canvas)
        return _decode_with_pil(data, kind, limits, header, canvas, color) if pixels is None else pixels


def _decode_jpeg(data: bytes, header: JpegHeader, limits: ImageLimits, canvas: Canvas) -> Pixels | None:
    """The pixels, or None where Pillow has to judge: CMYK, and files with faults."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, LookupError):  # LookupError: a sampling that it has no name for
        return None
    check_size(int(width), int(height), limits)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    orientation = read_orientation(header.exif, header.xmp)
    upright = orientation not in TURNED
    try:
        if not upright or canvas is np.empty:
            pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
        else:
            pixels = canvas((int(height), int(width), 3), dtype=np.uint8)
            simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
    except (ValueError, LookupError, MemoryError, OSError):  # Pillow names the fault
        return None
    return pixels if upright else orient(pixels, orientation, canvas)


def _decode_avif(data: bytes, limits: ImageLimits, canvas: Canvas) -> Pixels:
    # AVIF has an orientation of its own and asks readers to ignore the one in EXIF; Pillow does, but
    # a broken block fails it. An item of unknown type is passed over.
    from PIL import _avif

    decoder = _avif.AvifDecoder(_AVIF_EXIF.sub(rb"\1skip", data), "auto", 1)
    size, _, mode, _, _, orientation, _ = decoder.get_info()
    check_size(size[0], size[1], limits)
    frame = decoder.get_frame(0)[0]
    del decoder  # and its copy of the picture
    stored = np.frombuffer(frame, np.uint8).reshape(size[1], size[0], len(mode))
    return paint_array(stored, orientation, canvas)


def _decode_with_pil(
    data: bytes, kind: str, limits: ImageLimits, header: JpegHeader | None, canvas: Canvas, color: Color
) -> Pixels:
    profile = jpeg_profile(data) if header is not None and color == "srgb" else b""
    if header is not None:
        data = header.without_metadata(data)
    elif kind == "AVIF":
        data = _AVIF_EXIF.sub(rb"\1skip", data)
    with _open(data, kind) as image:
        check_size(*image.size, limits)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            load_tiff(image)
        else:
            image.load()
        exif, xmp = _metadata(image) if header is None else (header.exif, header.xmp)
        loaded = correct_transparency(image, data) if kind == "PNG" else image
        if color == "srgb":
            loaded = to_srgb(loaded, profile or image.info.get("icc_profile"))
        return paint_image(loaded, read_orientation(exif, xmp), canvas)


@contextmanager
def _named_faults(kind: str, size: int, limits: ImageLimits) -> Iterator[None]:
    """Turn whatever a decoder raises into an error that names the file's fault."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"at most {limits.max_pixels} pixels are allowed: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"broken {kind}: the header of its {size} bytes cannot be read") from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, MemoryError) or _NO_MEMORY.search(reason):
            raise ImageCostError(
                f"{kind} needs too much memory, at most {limits.max_memory / 1e6:.0f} MB are allowed"
            ) from error
        fault = "truncated" if "truncated" in reason.lower() else "broken"
        raise ImageError(f"{fault} {kind}: {reason}") from error


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

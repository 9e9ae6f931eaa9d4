"""The bytes of an image file become uint8 RGB pixels `[S, S, 3]`, the size that the checkpoint wants.

Four steps, each a function of its own: the header is checked, the file decoded, the EXIF orientation
applied, the image resized as `resize` says. `pil` mode gives the pixels of transformers'
`SiglipImageProcessorPil` and `CLIPImageProcessorPil`; `fast` mode gives the same within two levels in about
half the time.
"""

from __future__ import annotations

import binascii
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import numpy as np

# Pillow would otherwise import all of its plugins, a second's work, when the first such image comes.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    Image,
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
    features,
)

from siglip_serve.checkpoint.config import ImageConfig
from siglip_serve.errors import ImageError, ImageTooLargeError, InvalidInputError, SettingsError
from siglip_serve.images.jpeg import PlainFrame, plain_frame, read_header, read_orientation
from siglip_serve.images.resize import Mode, Pixels, fit

__all__ = ["ImageLimits", "Mode", "Pixels", "Preprocessor", "decode_base64", "plain_jpeg"]


@dataclass(frozen=True)
class ImageLimits:
    """Limits of one image: bytes of the file, and pixels as its header declares them."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000


_DEFAULT_LIMITS = ImageLimits()

# Pillow can open some fifty formats; what is not listed here is attack surface without users.
_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0"),
    "AVIF": re.compile(rb".{4}ftyp(?:avif|avis|mif1|msf1)", re.DOTALL),
}
if not features.check("avif"):
    del _SIGNATURES["AVIF"]
_EXPECTED = f"{', '.join(list(_SIGNATURES)[:-1])} or {list(_SIGNATURES)[-1]}"

# Pillow's parsers are Python: on hostile bytes they stumble over whatever they read, and say so in the
# terms of what they were doing. Fuzzing met OSError, SyntaxError, ValueError, TypeError and RuntimeError;
# the others are raised by name in Pillow, or by the readers that it builds on.
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

_MAX_SIDE = 65_535

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


class Preprocessor:
    """Image files of any kind become what the vision tower's checkpoint takes, up to its normalisation.

    Safe to call from several threads. `fast` mode needs torch and simplejpeg, `pil` mode neither.

    Attributes:
        size: S, the side of the pixels.

    Raises:
        SettingsError: `mode` is neither `fast` nor `pil`.
    """

    def __init__(
        self, image: ImageConfig, mode: Mode = "fast", limits: ImageLimits = _DEFAULT_LIMITS
    ) -> None:
        if mode not in ("fast", "pil"):
            raise SettingsError(f"preprocessing mode is {mode!r}, expected 'fast' or 'pil'")
        if mode == "fast":
            # Here, and not with the first image: torch takes seconds, and what is missing stops the start.
            import_module("simplejpeg")
            import_module("torch")
        self.size = image.size
        self._image = image
        self._mode = mode
        self._limits = limits

    def __call__(self, data: bytes) -> Pixels:
        """The file's first frame, upright, on white, fitted to the square whatever its aspect.

        Args:
            data: a whole JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file.

        Returns:
            uint8 RGB `[S, S, 3]`, 0 to 255, contiguous.

        Raises:
            ImageError: not a decodable image.
            ImageTooLargeError: more bytes or pixels than the limits allow.
        """
        return self.resize(self.decode(data))

    def decode(self, data: bytes) -> Pixels:
        """The file's first frame, upright, on white: uint8 RGB `[H, W, 3]`. Raises as a call does."""
        kind = _identify(data, self._limits)
        if self._mode == "pil":
            return np.array(_decode_with_pil(data, kind, self._limits))
        return _decode_fast(data, kind, self._limits)

    def resize(self, pixels: Pixels) -> Pixels:
        """uint8 RGB `[H, W, 3]` -> `[S, S, 3]`, contiguous, whatever the aspect."""
        return fit(pixels, self._image, self._mode)


def decode_base64(data: bytes, limits: ImageLimits = _DEFAULT_LIMITS) -> bytes:
    """The bytes that standard base64 text stands for. ASCII whitespace between the characters is skipped.

    Raises:
        InvalidInputError: empty, a character outside the alphabet, or wrong padding.
        ImageTooLargeError: the text stands for more bytes than an image may have.
    """
    text = data.translate(None, b" \t\r\n\v\f")
    if not text:
        raise InvalidInputError("empty, expected base64 text")
    if len(text) > 4 * -(-limits.max_bytes // 3):
        raise ImageTooLargeError(
            f"{len(text)} characters of base64, at most {limits.max_bytes} bytes are allowed"
        )
    if stray := re.search(rb"[^A-Za-z0-9+/=]", text):
        raise InvalidInputError(
            f"not base64: character {stray.start()} is {stray[0]!r}, "
            "expected only A-Z a-z 0-9 + / and = padding"
        )
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise InvalidInputError(
            f"not base64: {len(text)} characters, {str(error).lower()}; "
            "expected a multiple of 4, padded with ="
        ) from error


def plain_jpeg(data: bytes, limits: ImageLimits = _DEFAULT_LIMITS) -> PlainFrame | None:
    """The frame of a JPEG that holds no surprises, as `plain_frame` says, and is within the limits."""
    if not _SIGNATURES["JPEG"].match(data) or len(data) > limits.max_bytes:
        return None
    frame = plain_frame(data)
    return frame if frame and frame.height * frame.width <= limits.max_pixels else None


def _identify(data: bytes, limits: ImageLimits) -> str:
    """The format that the first bytes announce.

    Raises:
        ImageError: no bytes, or of no format that is served.
        ImageTooLargeError: more bytes than allowed.
    """
    if not data:
        raise ImageError("empty, expected the bytes of an image file")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data)} bytes, at most {limits.max_bytes} are allowed")
    for kind, signature in _SIGNATURES.items():
        if signature.match(data):
            return kind
    raise ImageError(
        f"not a decodable image: {len(data)} bytes that begin with {data[:8].hex()}; expected {_EXPECTED}"
    )


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{width}x{height} pixels, expected at least 1x1")
    # The resize's table of weights grows with the side: 29 kB of a 30,000,000 x 1 PNG would cost 1.3 GB.
    if max(width, height) > _MAX_SIDE:
        raise ImageTooLargeError(f"{width}x{height} pixels, at most {_MAX_SIDE} a side are allowed")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(f"{width}x{height} pixels, at most {limits.max_pixels} are allowed")


def _decode_fast(data: bytes, kind: str, limits: ImageLimits) -> Pixels:
    """uint8 RGB `[H, W, 3]`, upright, contiguous. libjpeg-turbo reads it without Pillow where both agree."""
    if kind == "JPEG":
        header = read_header(data)
        pixels = _decode_jpeg(data, limits)
        if pixels is not None:
            return _orient(pixels, read_orientation(header.exif, header.xmp))
    # torch takes no read-only memory, which is what `asarray` would give.
    return np.array(_decode_with_pil(data, kind, limits))


def _decode_jpeg(data: bytes, limits: ImageLimits) -> Pixels | None:
    """uint8 RGB `[H, W, 3]` as stored, or None where Pillow has to judge: CMYK, and files with faults."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(int(width), int(height), limits)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def _decode_with_pil(data: bytes, kind: str, limits: ImageLimits) -> Image.Image:
    """The first frame as Pillow decodes it, upright, mode RGB."""
    header = read_header(data) if kind == "JPEG" else None
    if header is not None:
        data = header.without_metadata(data)
    elif kind == "AVIF":
        # AVIF has an orientation of its own and asks readers to ignore the one in EXIF; Pillow does, but
        # a broken block fails it. An item of unknown type is passed over.
        data = _AVIF_EXIF.sub(rb"\1skip", data)
    try:
        with _without_warnings(), Image.open(io.BytesIO(data), formats=(kind,)) as image:
            _check_size(*image.size, limits)
            image.load()
            exif, xmp = _metadata(image) if header is None else (header.exif, header.xmp)
            rgb = _to_rgb(image)
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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB, transparency composited on white as transformers does since 5.21."""
    if image.mode == "F":
        raise ImageError("floating-point pixels, of no defined range; expected 1 to 16 bits a channel")
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
    """16-bit grey as mode L: 0 to 65535 becomes 0 to 255, where Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 0xFFFF:
        raise ImageError(f"grey values from {lowest} to {highest}, expected 0 to {0xFFFF}")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
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
    """How many threads are inside `_without_warnings`, and the filters to restore after the last."""

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

"""Image files that are served: their formats by the first bytes, their limits, and base64 text.

Nothing here reads further than a header.
"""

from __future__ import annotations

import binascii
import re
from contextlib import suppress
from dataclasses import dataclass

import pybase64
from PIL import features

from siglip_serve.config import Settings
from siglip_serve.errors import ImageError, ImageTooLargeError, InvalidInputError
from siglip_serve.images.heif import HEIF_HINT, HEIF_INSTALLED
from siglip_serve.images.jpeg import PlainFrame, plain_frame

__all__ = ["DEFAULT_LIMITS", "ImageLimits", "check_size", "decode_base64", "identify", "plain_jpeg"]


@dataclass(frozen=True)
class ImageLimits:
    """Limits of one image.

    Attributes:
        max_bytes: of the file.
        max_pixels: as its header declares them.
        max_seconds: CPU time that decoding and resizing may take.
        max_memory: bytes that decoding may need.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    max_seconds: float = 2.0
    max_memory: int = 512_000_000

    @classmethod
    def of(cls, settings: Settings) -> ImageLimits:
        """Take the limits of the settings."""
        return cls(
            settings.max_image_bytes,
            settings.max_image_pixels,
            settings.max_decode_seconds,
            settings.max_decode_megabytes * 1_000_000,
        )


DEFAULT_LIMITS = ImageLimits()

# Pillow can open some fifty formats. Those that are not listed here are attack surface without users.
_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0"),
    "HEIC": re.compile(
        rb".{4}ftyp(?:hei[cxms]|hev[cxms]|(?:mif1|msf1).{4}(?:.{4})*?(?:hei[cxms]|hev[cxms]))", re.DOTALL
    ),
    "AVIF": re.compile(rb".{4}ftyp(?:avif|avis|mif1|msf1)", re.DOTALL),  # after HEIC, which may begin so
}
if not features.check("avif"):
    del _SIGNATURES["AVIF"]
# Formats of images that users do send, to be named when they are refused.
_NOT_SERVED = {
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP {2}\r\n\x87\n"),
    "JPEG XR": re.compile(rb"II\xbc[\0\1]"),
    "JPEG-LS": re.compile(rb"\xff\xd8\xff\xf7"),
    "PDF": re.compile(rb"%PDF-"),
}
_HINTS = {"HEIC": f"; {HEIF_HINT}"}
if not HEIF_INSTALLED:
    _NOT_SERVED["HEIC"] = _SIGNATURES.pop("HEIC")
_EXPECTED = f"{', '.join(list(_SIGNATURES)[:-1])} or {list(_SIGNATURES)[-1]}"

_MAX_SIDE = 65_535
_HEAD = 64  # bytes that tell the format: a signature, or the brands of an ISO media file


def identify(data: bytes, limits: ImageLimits) -> str:
    """Name of the format that the first bytes announce, such as JPEG.

    Raises:
        ImageError: no bytes, or of no format that is served.
        ImageTooLargeError: more bytes than allowed.
    """
    if not data:
        raise ImageError("empty, expected the bytes of an image file")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data)} bytes, at most {limits.max_bytes} are allowed")
    head = data[:_HEAD]
    for kind, signature in _NOT_SERVED.items():
        if signature.match(head):
            hint = _HINTS.get(kind, "")
            raise ImageError(f"not a decodable image: {kind} is not served; expected {_EXPECTED}{hint}")
    for kind, signature in _SIGNATURES.items():
        if signature.match(head):
            return kind
    raise ImageError(
        f"not a decodable image: {len(data)} bytes that begin with {data[:8].hex()}; expected {_EXPECTED}"
    )


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Refuse a picture whose header declares no pixel, or more than allowed.

    Raises:
        ImageError: a side of 0 pixels.
        ImageTooLargeError: a longer side than 65,535 pixels, or more pixels than the limits allow.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{width}x{height} pixels, expected at least 1x1")
    # The resize's table of weights grows with the side: 29 kB of a 30,000,000 x 1 PNG would cost 1.3 GB.
    if max(width, height) > _MAX_SIDE:
        raise ImageTooLargeError(f"{width}x{height} pixels, at most {_MAX_SIDE} a side are allowed")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(f"{width}x{height} pixels, at most {limits.max_pixels} are allowed")


def plain_jpeg(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> PlainFrame | None:
    """Frame of a plain JPEG within the limits, or None for any other file, as `plain_frame` says."""
    if not _SIGNATURES["JPEG"].match(data) or len(data) > limits.max_bytes:
        return None
    frame = plain_frame(data)
    return frame if frame and frame.height * frame.width <= limits.max_pixels else None


def decode_base64(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Decode standard base64 text. ASCII whitespace between the characters is skipped.

    Raises:
        InvalidInputError: empty, a character outside the alphabet, or wrong padding.
        ImageTooLargeError: the text stands for more bytes than an image may have.
    """
    most = 4 * -(-limits.max_bytes // 3)
    if 0 < len(data) <= most:
        # A hundred times as fast as the rest, and it takes nothing that the rest refuses.
        with suppress(binascii.Error):
            return pybase64.b64decode(data, validate=True)
    text = data.translate(None, b" \t\r\n\v\f")
    if not text:
        raise InvalidInputError("empty, expected base64 text")
    if len(text) > most:
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

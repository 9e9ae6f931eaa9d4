"""Pictures as callers write them: data URIs, base64 in all its spellings, URLs."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import dataclass

from PIL import Image

from siglip_gateway.inputs import File, Input, Link, Picture
from siglip_gateway.refusals import Refusal

__all__ = ["Header", "file_of", "looks_like_a_picture", "picture_of", "read_header", "standard_base64"]

_DATA_URI = re.compile(
    r"data:(?:(?P<type>[a-z0-9][a-z0-9.+-]*/[a-z0-9][a-z0-9.+-]*))?(?:;[a-z0-9-]+=[^;,]*)*;base64,",
    re.IGNORECASE,
)
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
# The first characters of base64 of JPEG, PNG, GIF, WebP, TIFF and BMP files.
_MAGIC = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0AK", "Qk")
_LEAST = 100  # characters of a bare base64 text that is taken for a picture
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\r\n\v\f"
_BITS = {"1": 1, "I;16": 16, "I": 32, "F": 32}  # per channel. Other modes have 8


@dataclass(frozen=True)
class Header:
    """An image file's header: pixels, format in lower case, and bits per pixel."""

    width: int
    height: int
    format: str
    bit_depth: int


def looks_like_a_picture(text: str) -> bool:
    """Tell a picture from a text where the caller does not say which it is.

    A picture is a data URI of an image or of no type, an http or https URL alone, or bare base64 text that
    begins as an image file does.
    """
    if text[:5].lower() == "data:":
        found = _DATA_URI.match(text)
        return text[:11].lower() == "data:image/" or found is not None
    if text[:4].lower() == "http":
        return _URL.fullmatch(text) is not None
    return len(text) >= _LEAST and text.startswith(_MAGIC) and not _stray(text.encode())


def picture_of(value: object, where: str) -> Input:
    """The picture that a caller wrote as a data URI, as base64 text or as a URL.

    Raises:
        Refusal: 400, it is none of these. The message begins with `where`.
    """
    if not isinstance(value, str):
        raise _wrong(where, f"{type(value).__name__}, expected a data URI, base64 text or a URL")
    if value[:4].lower() == "http" and "://" in value[:8]:
        return Link(where, value.strip())
    if value[:5].lower() != "data:":
        return Picture(where, standard_base64(value, where))
    found = _DATA_URI.match(value)
    if found is None:
        raise _wrong(where, "a data URI of another form, expected data:image/...;base64,...")
    kind = (found["type"] or "image/").lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise _wrong(where, f"a data URI of the type {kind}, expected an image")
    return Picture(where, standard_base64(value[found.end() :], where))


def standard_base64(text: str, where: str) -> bytes:
    """Base64 in the standard alphabet with padding, from any spelling: URL-safe, unpadded, with white space.

    Nothing is decoded.

    Raises:
        Refusal: 400, it is not base64.
    """
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError as error:
        raise _wrong(where, f"not base64: character {error.start} is {text[error.start]!r}") from None
    # One look is enough for most pictures, which are of the standard alphabet alone.
    if data.translate(None, _ALPHABET + b"="):
        data = data.translate(_STANDARD, _SPACE)
        stray = _stray(data)
        if stray:
            raise _wrong(where, f"not base64: character {data.index(stray[:1])} is {chr(stray[0])!r}")
    data = data.rstrip(b"=")
    if not data:
        raise _wrong(where, "an empty picture")
    if b"=" in data:
        raise _wrong(where, f"not base64: character {data.index(b'=')} is '=', and more follows")
    if len(data) % 4 == 1:
        raise _wrong(where, f"not base64: {len(data)} characters, which is cut off")
    return data + b"=" * (-len(data) % 4)


def file_of(picture: Picture | File) -> bytes:
    """The bytes of an image file."""
    return picture.data if isinstance(picture, File) else base64.b64decode(picture.base64)


def read_header(picture: Picture | File) -> Header:
    """Read the header of an image file. No pixel is decoded.

    Raises:
        Refusal: 400, the file is not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures, whose limit Triton checks
            with Image.open(io.BytesIO(file_of(picture))) as image:
                bits = _BITS.get(image.mode, 8) * len(image.getbands())
                return Header(image.width, image.height, (image.format or "").lower(), bits)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _wrong(picture.where, "the header of the image cannot be read") from None


def _stray(data: bytes) -> bytes:
    """All that is not of the alphabet of base64, of either spelling, white space and padding left out."""
    return data.translate(None, _ALPHABET + b"-_=" + _SPACE)


def _wrong(where: str, problem: str) -> Refusal:
    return Refusal(400, f"{where}: {problem}", param=where, code="invalid_image")

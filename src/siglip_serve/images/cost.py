"""Cost of decoding an image file, bounded by its header.

A file is cheap if no content that its header allows takes a decoder long. Cheap files are decoded in this
process. All others go to a process that can be ended, see `watched`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from siglip_serve.errors import ImageCostError
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.jpeg import JpegHeader, read_header

__all__ = ["MOST_BYTES", "Inspected", "inspect"]

# The most that is decoded in this process. Each bound is worth up to a quarter of a second for the worst file
# that it allows, and lies above ordinary files of the kind.
MOST_BYTES = 8 * 2**20
_JPEG_PIXELS = 16_000_000  # a photograph of 12 megapixels takes 50 ms
_JPEG_VISITS = 4_000_000  # of blocks, by the scans of a JPEG: up to 10 ns each
_PNG_BYTES = 8 * 2**20  # of pixels that are inflated
_PNG_CHUNKS = 2_000  # Pillow reads each in Python
_PNG_TEXTS = 20  # compressed chunks, which inflate to up to 1 MB each
_WEBP_PIXELS = 2_100_000
_WEBP_LOSSLESS_PIXELS = 400_000  # tables of codes may take a hundred times longer than the pixels
_BMP_PIXELS = 4_000_000

_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # arithmetic coding has a price per coefficient
_BYTES_PER_BLOCK = 128  # of coefficients, which a decoder keeps of a JPEG of several scans
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_COMPRESSED_CHUNKS = frozenset({b"iCCP", b"zTXt", b"iTXt"})
_UNCOMPRESSED_BMP = frozenset({0, 3})
_WEBP_ANIMATED = 0x02


@dataclass(frozen=True)
class Inspected:
    """A file's kind and cost.

    Attributes:
        kind: name of the format, such as JPEG.
        cheap: it may be decoded in this process.
        header: of a JPEG, else None.
    """

    kind: str
    cheap: bool
    header: JpegHeader | None = None


def inspect(data: bytes, kind: str, limits: ImageLimits) -> Inspected:
    """Read a file's header.

    Raises:
        ImageError: a JPEG that `read_header` refuses.
        ImageCostError: a JPEG that needs more memory than allowed.
    """
    if kind == "JPEG":
        header = read_header(data)
        return Inspected(kind, _is_cheap_jpeg(header, len(data), limits), header)
    check = _CHECKS.get(kind)
    try:
        cheap = check is not None and len(data) <= MOST_BYTES and check(data)
    except (struct.error, LookupError):  # a broken header, which the decoder is to name
        cheap = False
    return Inspected(kind, cheap)


def _is_cheap_jpeg(header: JpegHeader, size: int, limits: ImageLimits) -> bool:
    frame = header.frame
    if len(frame) < 7:
        return True  # no frame: a decoder stops there
    height, width = struct.unpack_from(">HH", frame, 2)
    blocks = -(-height // 8) * -(-width // 8)
    samples = blocks * frame[6]
    if header.scans > 1:
        needed = _jpeg_samples(frame, blocks) * _BYTES_PER_BLOCK + 3 * height * width
        if needed > limits.max_memory:
            raise ImageCostError(
                f"JPEG of {header.scans} scans and {width}x{height} pixels needs {needed / 1e6:.0f} MB, "
                f"at most {limits.max_memory / 1e6:.0f} are allowed"
            )
    return (
        frame[0] in _HUFFMAN_FRAMES
        and height * width <= _JPEG_PIXELS
        and size <= MOST_BYTES
        and samples * header.scans <= _JPEG_VISITS
    )


def _jpeg_samples(frame: bytes, blocks: int) -> int:
    """Blocks of all components, of which the subsampled have fewer."""
    factors = [(max(1, sampling >> 4), max(1, sampling & 0xF)) for sampling in frame[8::3]] or [(1, 1)]
    across, down = (max(side) for side in zip(*factors, strict=True))
    return -(-blocks * sum(a * b for a, b in factors) // (across * down))


def _is_cheap_png(data: bytes) -> bool:
    name, width, height, bits, color = struct.unpack_from(">4sIIBB", data, 12)
    line = 1 + (width * bits * _PNG_CHANNELS[color] + 7) // 8
    if name != b"IHDR" or height * line > _PNG_BYTES:
        return False
    position, texts = 8, 0
    for _ in range(_PNG_CHUNKS):
        if position + 8 > len(data):
            return texts <= _PNG_TEXTS
        length, name = struct.unpack_from(">I4s", data, position)
        texts += name in _COMPRESSED_CHUNKS
        position += length + 12
    return False


def _is_cheap_webp(data: bytes) -> bool:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        return width * height <= _WEBP_PIXELS
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1) <= _WEBP_LOSSLESS_PIXELS
    width, height = (1 + int.from_bytes(data[start : start + 3], "little") for start in (24, 27))
    return not data[20] & _WEBP_ANIMATED and width * height <= _WEBP_LOSSLESS_PIXELS


def _is_cheap_bmp(data: bytes) -> bool:
    size, width, height, _, _, compression = struct.unpack_from("<IiiHHI", data, 14)
    return size >= 40 and compression in _UNCOMPRESSED_BMP and abs(width * height) <= _BMP_PIXELS


_CHECKS: dict[str, Callable[[bytes], bool]] = {
    "PNG": _is_cheap_png,
    "WebP": _is_cheap_webp,
    "BMP": _is_cheap_bmp,
}

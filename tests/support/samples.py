"""PNG and TIFF files written from their specifications, sample by sample, without the decoder under test."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLACK_IS_ZERO", "CMYK", "PALETTE", "RGB", "WHITE_IS_ZERO", "YCBCR", "Tiff", "png_of"]

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
_SHORT, _LONG = 3, 4
_DEFLATE = 8


def pack(samples: NDArray[Any], bits: int, little: bool = False) -> bytes:
    """Pack rows `[H, n]` of unsigned samples, most significant bit first, each row padded to a whole byte.

    Args:
        samples: values below 2 ** bits.
        bits: 1 to 32 per sample.
        little: samples of 16 and 32 bits have their lowest byte first.
    """
    if bits in (8, 16, 32):
        return samples.astype(np.dtype(f"{'<' if little else '>'}u{bits // 8}")).tobytes()
    shifts = np.arange(bits - 1, -1, -1)
    spread = (samples[..., None].astype(np.int64) >> shifts) & 1  # [H, n, bits]
    return np.packbits(spread.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def png_of(samples: NDArray[Any], bits: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Make a PNG of samples `[H, W, C]`, of the colour type `kind`, with `chunks` before the image data."""
    height, width, _ = samples.shape
    packed = pack(samples.reshape(height, -1), bits)
    stride = len(packed) // height
    rows = b"".join(b"\0" + packed[y * stride : (y + 1) * stride] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


@dataclass(frozen=True)
class Tiff:
    """A TIFF with one strip, or one per plane.

    Attributes:
        samples: `[H, W, C]`, unsigned.
        bits: per sample.
        photometric: interpretation of the samples.
        order: `II` for little-endian, `MM` for big-endian.
        reversed_bits: FillOrder 2, the lowest bit of each byte comes first.
        planes: PlanarConfiguration 2, each sample in a strip of its own.
        deflate: compress the strips.
        extra: what each sample after the colours is: 0 unspecified, 1 premultiplied alpha, 2 alpha.
        sample_format: 1 unsigned, 2 signed, 3 floating-point.
        palette: `[2 ** bits, 3]` of 16 bits.
        more: further tags of the type SHORT.
    """

    samples: NDArray[Any]
    bits: int
    photometric: int
    order: str = "II"
    reversed_bits: bool = False
    planes: bool = False
    deflate: bool = False
    extra: Sequence[int] = ()
    sample_format: int = 1
    palette: NDArray[np.uint16] | None = None
    more: Sequence[tuple[int, Sequence[int]]] = ()

    def file(self) -> bytes:
        """Return the bytes of the file."""
        height, width, count = self.samples.shape
        planes = np.moveaxis(self.samples, 2, 0) if self.planes else [self.samples.reshape(height, -1)]
        strips = [self._strip(plane) for plane in planes]
        offsets = [8 + sum(map(len, strips[:index])) for index in range(len(strips))]
        tags: list[tuple[int, int, Sequence[int]]] = [
            (256, _LONG, [width]),
            (257, _LONG, [height]),
            (258, _SHORT, [self.bits] * count),
            (259, _SHORT, [_DEFLATE if self.deflate else 1]),
            (262, _SHORT, [self.photometric]),
            (266, _SHORT, [2 if self.reversed_bits else 1]),
            (273, _LONG, offsets),
            (277, _SHORT, [count]),
            (278, _LONG, [height]),
            (279, _LONG, [len(strip) for strip in strips]),
            (284, _SHORT, [2 if self.planes else 1]),
            (339, _SHORT, [self.sample_format] * count),
            *((tag, _SHORT, values) for tag, values in self.more),
        ]
        if self.palette is not None:
            tags.append((320, _SHORT, self.palette.T.reshape(-1).tolist()))
        if self.extra:
            tags.append((338, _SHORT, list(self.extra)))
        return self._with_tags(b"".join(strips), sorted(tags))

    def _strip(self, plane: NDArray[Any]) -> bytes:
        data = pack(plane, self.bits, self.order == "II")
        data = zlib.compress(data) if self.deflate else data
        if self.reversed_bits:
            bits = np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, 8)
            data = np.packbits(bits[:, ::-1]).tobytes()
        return data

    def _with_tags(self, data: bytes, tags: Sequence[tuple[int, int, Sequence[int]]]) -> bytes:
        order = "<" if self.order == "II" else ">"
        data += bytes(len(data) % 2)
        directory = 8 + len(data)
        entries, values = b"", b""
        behind = directory + 2 + 12 * len(tags) + 4
        for tag, kind, numbers in tags:
            content = struct.pack(f"{order}{len(numbers)}{'H' if kind == _SHORT else 'I'}", *numbers)
            if len(content) > 4:
                values += content
                content = struct.pack(order + "I", behind + len(values) - len(content))
            entries += struct.pack(order + "HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
        magic = self.order.encode() + struct.pack(order + "HI", 42, directory)
        return magic + data + struct.pack(order + "H", len(tags)) + entries + bytes(4) + values

"""Segments of a JPEG before its image data: its orientation, its tables, and whether it is a plain one."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from siglip_serve.errors import ImageError

__all__ = [
    "JpegHeader",
    "PlainFrame",
    "PlainScan",
    "Sampling",
    "plain_frame",
    "plain_scan",
    "read_header",
    "read_orientation",
]

Sampling = Literal["gray", "4:4:4", "4:2:2", "4:2:0"]

# The first byte after a run of 0xFF that is neither stuffing nor fill names the segment.
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})
_START_OF_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
_END_OF_IMAGE = 0xD9
# In image data restart markers are passed over as well: a file may hold millions of them.
_MARKER_BETWEEN_SCANS = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
# APP0 (JFIF) and APP14 (Adobe) say how the colours are coded; no other APPn changes a pixel.
_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_MAX_SEGMENTS = 10_000
_MAX_SCANS = 50

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_EXIF_ORIENTATION = 0x0112
_EXIF_FORMATS = {3: "H", 4: "I"}

_BASELINE = 0xC0
_HUFFMAN_TABLES = 0xC4
_QUANTIZATION_TABLES = 0xDB
_RESTART_INTERVAL = 0xDD
_EXIF_OR_XMP = 0xE1
_ADOBE = 0xEE
_IDENTIFIERS = (0x00, 0x01, 0x10, 0x11)  # of the Huffman tables that a baseline JPEG may have: DC, then AC
_LARGEST_DC_SYMBOL = 11  # of 8 bits a sample
_QUANTIZATION = 0x100  # apart from the identifiers of Huffman tables
_SEARCHED_AT_ONCE = 2**18  # bytes of image data: the flags fit into a core's cache
_SMALLEST_PLAIN = 16  # pixels per side; libjpeg treats very narrow pictures in its own way
# Component ids, then horizontal and vertical sampling factors of each; pixels across and down of an MCU.
_SAMPLINGS: dict[bytes, tuple[Sampling, int, int]] = {
    b"\1\x11": ("gray", 8, 8),
    b"\1\2\3\x11\x11\x11": ("4:4:4", 8, 8),
    b"\1\2\3\x21\x11\x11": ("4:2:2", 16, 8),
    b"\1\2\3\x22\x11\x11": ("4:2:0", 16, 16),
}


@dataclass(frozen=True)
class JpegHeader:
    """Segments before a JPEG's first scan: its metadata, and the parts that decoding needs.

    Attributes:
        exif: EXIF block without its name, empty if there is none.
        xmp: XMP block, empty if there is none.
        needed: first byte and end of each segment that is not metadata.
        scan: first byte of the first scan.
        frame: marker of the frame, and its content: bits, height, width, components.
        scans: number of scans, not counted beyond the first where a decoder ends there.
    """

    exif: bytes
    xmp: bytes
    needed: tuple[tuple[int, int], ...]
    scan: int
    frame: bytes
    scans: int

    def without_metadata(self, data: bytes) -> bytes:
        """The file without metadata, whose parsing by Pillow hostile files make slow or fatal."""
        return b"".join([b"\xff\xd8", *(data[start:end] for start, end in self.needed), data[self.scan :]])


def read_header(data: bytes) -> JpegHeader:
    """Split a JPEG at its markers.

    Raises:
        ImageError: 12 bits per sample, no scan follows, or more segments or scans than any camera or editor
            writes.
    """
    exif: list[bytes] = []
    xmp = b""
    needed: list[tuple[int, int]] = []
    frame = b""
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            frame = bytes([marker]) + data[start + 4 : end]
        if marker == _START_OF_SCAN:
            if frame[1:2] == b"\x0c":
                raise ImageError("JPEG of 12 bits per sample is not served, expected 8")
            scans = _count_scans(data, frame, start)
            return JpegHeader(b"".join(exif), xmp, tuple(needed), start, frame, scans)
        if marker not in _METADATA:
            needed.append((start, end))
        elif marker == _EXIF_OR_XMP:
            content = data[start + 4 : end]
            if content.startswith(b"Exif\0\0"):
                exif.append(content[6:])
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp = content
    raise ImageError(f"truncated JPEG: its {len(data)} bytes hold no image data")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte and end of each segment, the first start of scan last."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None:
            return
        marker, start, position = found[1][0], found.start(), found.end()
        if marker not in _WITHOUT_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2]))
        yield marker, start, position
        if marker == _START_OF_SCAN:
            return
    raise ImageError(f"broken JPEG: more than {_MAX_SEGMENTS} segments before the image data")


def _count_scans(data: bytes, frame: bytes, first: int) -> int:
    # Each scan of a progressive JPEG visits every block, even when it says nothing about it: a few
    # kilobytes of empty scans would keep a decoder busy for minutes. A sequential JPEG whose first scan
    # holds all components ends there, and need not be searched.
    if frame[0:1] and frame[0] in _SEQUENTIAL and frame[6:7] == data[first + 4 : first + 5]:
        return 1
    # Both bytes must be there for a scan to begin, so this many are the most.
    most = data.count(b"\xff\xda", first)
    scans = most if most <= _MAX_SCANS else _walk_scans(data, first)
    if scans > _MAX_SCANS:
        raise ImageError(f"broken JPEG: {scans} or more scans, expected at most {_MAX_SCANS}")
    return scans


def _walk_scans(data: bytes, position: int) -> int:
    """Count scans as libjpeg meets them: to the end of the image, outside other segments, to one too many."""
    scans = 0
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER_BETWEEN_SCANS.search(data, position)
        if found is None or found[1][0] == _END_OF_IMAGE:
            return scans
        marker, position = found[1][0], found.end()
        if marker == _START_OF_SCAN:
            scans += 1
            if scans == _MAX_SCANS + 1:
                return scans
        # Below 0xC0 libjpeg looks for the next marker at once, or gives up.
        if marker >= _BASELINE and marker not in _WITHOUT_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2]))
    raise ImageError(f"broken JPEG: more than {_MAX_SEGMENTS} segments in the image data")


def read_orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8 as EXIF, or else XMP, says. 1 where neither does or both are broken."""
    tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    value = _read_orientation_tag(tiff, order) if order else None
    if value is None and (found := _XMP_ORIENTATION.search(xmp)):
        value = int(found[1])
    return value if value is not None and 1 <= value <= 8 else 1


def _read_orientation_tag(tiff: bytes, order: str) -> int | None:
    # Not Pillow's reader: it reads every tag, however many and large, and raises at the first broken one.
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _EXIF_ORIENTATION and kind in _EXIF_FORMATS:
                return int(struct.unpack_from(order + _EXIF_FORMATS[kind], tiff, entry + 8)[0])
    except struct.error:
        return None
    return None


class PlainFrame(NamedTuple):
    """Height and width in pixels, and how colour is subsampled."""

    height: int
    width: int
    sampling: Sampling


class PlainScan(NamedTuple):
    """Everything that decoding the image data of a plain JPEG needs.

    Attributes:
        frame: of the picture as it is stored.
        sampling: blocks across and down of each component in an MCU.
        quantization: table of each component, 64 bytes in zigzag order.
        dc: Huffman table of each component, numbers of codes of 1 to 16 bits and then the symbols.
        ac: the same for AC coefficients.
        interval: MCUs between two restart markers, 0 if there are none.
        restarts: number of restart markers.
        start: first byte of the image data.
    """

    frame: PlainFrame
    sampling: tuple[tuple[int, int], ...]
    quantization: tuple[bytes, ...]
    dc: tuple[bytes, ...]
    ac: tuple[bytes, ...]
    interval: int
    restarts: int
    start: int


def plain_frame(data: bytes) -> PlainFrame | None:
    """Read the frame of a plain JPEG, or None for any other file.

    A plain file is baseline, upright and whole. It has one frame of grey or YCbCr and one scan, with all
    tables that they name. Its segments have no gaps, and nothing follows the image data. Every decoder reads
    the same out of it, and none takes more room than the frame says.
    """
    walked = _walk(data)
    if walked is None:
        return None
    found, frame, end = walked
    if not _is_whole(data, end, found.restarts):
        return None
    return None if found.may_be_turned and _is_turned(data) else frame


def plain_scan(data: bytes) -> PlainScan | None:
    """Read the segments of a JPEG that is plain but may be turned, or None for any other file.

    Its image data are not looked at, nor what follows them.
    """
    walked = _walk(data)
    if walked is None:
        return None
    found, frame, end = walked
    components = range(found.first[5])
    factors, chosen = found.first[7::3], found.scan[2:-3:2]
    return PlainScan(
        frame,
        tuple((factors[index] >> 4, factors[index] & 0xF) for index in components),
        tuple(found.tables[_QUANTIZATION | found.first[8 + 3 * index]] for index in components),
        tuple(found.tables[chosen[index] >> 4] for index in components),
        tuple(found.tables[0x10 | chosen[index] & 0xF] for index in components),
        found.interval,
        found.restarts,
        end,
    )


def _walk(data: bytes) -> tuple[_Plain, PlainFrame, int] | None:
    """The segments up to the image data, their frame, and where they end."""
    found = _Plain()
    end, last = 2, len(data) - 2
    for _ in range(_MAX_SEGMENTS):
        start = end
        if start + 4 > last or data[start] != 0xFF:
            return None
        end = start + 2 + (data[start + 2] << 8 | data[start + 3])
        if end > last or not found.take(data[start + 1], data[start + 4 : end]):
            return None
        if found.scan:
            break
    frame = found.frame()
    return (found, frame, end) if frame and data.startswith(b"\xff\xd8") else None


def _is_turned(data: bytes) -> bool:
    try:
        header = read_header(data)
    except ImageError:
        return True
    return read_orientation(header.exif, header.xmp) != 1


@dataclass
class _Plain:
    """The segments of a plain JPEG."""

    first: bytes = b""
    scan: bytes = b""
    interval: int = 0
    tables: dict[int, bytes] = field(default_factory=dict)
    may_be_turned: bool = False
    restarts: int = 0

    def take(self, marker: int, content: bytes) -> bool:
        """Keep the segment. False if a plain JPEG cannot have it."""
        if marker == _QUANTIZATION_TABLES:
            return self._take_tables(_quantization_tables(content))
        if marker == _HUFFMAN_TABLES:
            return self._take_tables(_huffman_tables(content))
        if marker == _BASELINE:
            once, self.first = not self.first, content
            return once and len(content) > 6 and content[0] == 8 and len(content) == 6 + 3 * content[5]
        if marker == _START_OF_SCAN:
            self.scan = content
            return len(content) > 4 and len(content) == 4 + 2 * content[0] and content[-3:] == b"\0\x3f\0"
        if marker == _RESTART_INTERVAL:
            self.interval = int.from_bytes(content)
            return len(content) == 2
        if marker == _ADOBE:
            return content[11:12] == b"\1"  # YCbCr
        self.may_be_turned |= marker == _EXIF_OR_XMP
        return marker == 0xE0 or marker in _METADATA

    def _take_tables(self, tables: Mapping[int, bytes]) -> bool:
        self.tables |= tables
        return bool(tables)

    def frame(self) -> PlainFrame | None:
        """None if something is missing, or does not fit together."""
        height, width = int.from_bytes(self.first[1:3]), int.from_bytes(self.first[3:5])
        sampling = _SAMPLINGS.get(self.first[6::3] + self.first[7::3])
        if sampling is None or min(height, width) < _SMALLEST_PLAIN:
            return None
        if self.scan[:1] + self.scan[1:-3:2] != self.first[5:6] + self.first[6::3]:  # all of them, in order
            return None
        needed = {_QUANTIZATION | identifier for identifier in self.first[8::3]}
        for chosen in self.scan[2:-3:2]:
            needed |= {chosen >> 4, 0x10 | chosen & 0xF}
        if not needed <= self.tables.keys():
            return None
        name, across, down = sampling
        units = -(-width // across) * -(-height // down)
        self.restarts = -(-units // self.interval) - 1 if self.interval else 0
        return PlainFrame(height, width, name)


# Most files have the same tables as others.
@lru_cache(maxsize=256)
def _quantization_tables(content: bytes) -> Mapping[int, bytes]:
    """By their identifiers, none if a table is not of 8 bits, or not whole."""
    identifiers = content[::65]
    if len(content) % 65 or any(identifier > 3 for identifier in identifiers):
        return {}
    return {
        _QUANTIZATION | identifier: content[65 * index + 1 : 65 * index + 65]
        for index, identifier in enumerate(identifiers)
    }


@lru_cache(maxsize=256)
def _huffman_tables(content: bytes) -> Mapping[int, bytes]:
    """By their identifiers, none if one of them is not whole, or codes more than its lengths hold."""
    found: dict[int, bytes] = {}
    start = 0
    while start < len(content):
        identifier, counts = content[start], content[start + 1 : start + 17]
        end = start + 17 + sum(counts)
        if identifier not in _IDENTIFIERS or end > len(content) or not _is_code(counts):
            return {}
        if identifier < 0x10 and max(content[start + 17 : end], default=0) > _LARGEST_DC_SYMBOL:
            return {}
        found[identifier] = content[start + 1 : end]
        start = end
    return found


def _is_code(counts: bytes) -> bool:
    """True if prefix-free codes of 1 to 16 bits exist in these numbers, none of them all ones."""
    code = 0
    for length, count in enumerate(counts, 1):
        code = 2 * code + count
        if code >= 1 << length:
            return False
    return True


class _Flags(threading.local):
    """Memory of one thread for two flags per byte. New memory of that size costs more than the search."""

    def __init__(self) -> None:
        self.two = np.empty((2, _SEARCHED_AT_ONCE), np.bool_)


_flags = _Flags()


def _is_whole(data: bytes, start: int, restarts: int) -> bool:
    """True if image data with `restarts` markers in order, and nothing else, fill the file to its end."""
    if not data.endswith(b"\xff\xd9"):
        return False
    scan = np.frombuffer(data, np.uint8, offset=start)
    found = []
    for begin in range(0, len(scan) - 1, _SEARCHED_AT_ONCE):
        part = scan[begin : begin + _SEARCHED_AT_ONCE + 1]
        marked, other = _flags.two[:, : len(part) - 1]
        np.equal(part[:-1], 0xFF, out=marked)
        marked &= np.not_equal(part[1:], 0, out=other)
        if marked.any():
            found.append(part[1:][marked])
    markers = np.concatenate(found)
    if len(markers) != restarts + 1:  # a hostile file may be all markers
        return False
    return bool((markers[:-1] == 0xD0 + np.arange(restarts) % 8).all())

"""Surgery on image files: the pieces of each format are dropped, repeated, moved, changed and resized."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence

from images import mutations

from tests.chaos.cases.base import edge

__all__ = ["operate", "pieces_of", "set_fields"]

# Offset, bytes and byte order of the numbers in the headers of formats whose headers have a fixed place.
_PNG = [(16, 4, ">"), (20, 4, ">"), (24, 1, ">"), (25, 1, ">"), (26, 1, ">"), (28, 1, ">"), (8, 4, ">")]
_GIF = [(6, 2, "<"), (8, 2, "<"), (10, 1, "<"), (11, 1, "<")]
_BMP = [(10, 4, "<"), (14, 4, "<"), (18, 4, "<"), (22, 4, "<"), (26, 2, "<"), (28, 2, "<"), (30, 4, "<")]
_BMP += [(34, 4, "<"), (46, 4, "<"), (50, 4, "<")]
_WEBP = [(4, 4, "<"), (16, 4, "<"), (20, 4, "<"), (24, 3, "<"), (26, 2, "<"), (27, 3, "<"), (28, 2, "<")]
_BOXES_IN = {b"meta", b"iprp", b"ipco", b"moov", b"trak", b"iinf"}


def pieces_of(data: bytes) -> tuple[str, list[bytes]]:
    """Name the format of a file and split it into its pieces; a format without pieces is one."""
    if data.startswith(b"\x89PNG"):
        return "png", [data[:8], *_png_chunks(data)]
    if data.startswith(b"\xff\xd8"):
        return "jpeg", _jpeg_segments(data)
    if data.startswith(b"RIFF"):
        return "webp", [data[:12], *_riff_chunks(data)]
    if data[4:8] == b"ftyp":
        return "avif", _boxes(data)
    if data.startswith((b"II*\0", b"MM\0*")):
        return "tiff", _tiff_pieces(data)
    return ("gif" if data.startswith(b"GIF") else "bmp" if data.startswith(b"BM") else "other"), [data]


def operate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change a file by one to three operations; return their names and the file."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name, operation = rng.choice(_OPERATIONS)
        done.append(name)
        data = operation(data, rng) if data else data
    return "+".join(done), data


def set_fields(data: bytes, rng: random.Random) -> bytes:
    """Set one to three numbers of a file's headers to edges, and repair the checksums of PNG."""
    changed = bytearray(data)
    places = _fields(data)
    for offset, size, order in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 3)))):
        value = (edge(rng) if rng.random() < 0.7 else rng.getrandbits(8 * size)) & (256**size - 1)
        changed[offset : offset + size] = value.to_bytes(size, "little" if order == "<" else "big")
    return _repaired(bytes(changed))


def _fields(data: bytes) -> list[tuple[int, int, str]]:
    kind, pieces = pieces_of(data)
    fixed = {"png": _PNG, "gif": _GIF, "bmp": _BMP, "webp": _WEBP}.get(kind)
    found: list[tuple[int, int, str]] = []
    if kind == "jpeg":
        at = 0
        for piece in pieces:
            if len(piece) > 4:
                found += [(at + offset, 1 + offset % 2, ">") for offset in range(2, min(len(piece), 20))]
            at += len(piece)
    elif kind == "tiff":
        order = "<" if data.startswith(b"II") else ">"
        start = struct.unpack_from(order + "I", data, 4)[0] if len(data) >= 8 else 0
        count = struct.unpack_from(order + "H", data, start)[0] if start + 2 <= len(data) else 0
        entries = [start + 2 + 12 * row for row in range(min(count, 64))]
        found = [
            (entry + at, size, order)
            for entry in entries
            for at, size in ((0, 2), (2, 2), (4, 4), (8, 4), (8, 2))
        ]
        found.append((4, 4, order))
    elif kind == "avif":
        found = [(at, 4, ">") for at in range(0, min(len(data), 600), 4)]
    else:
        found = fixed or [(at, 2, "<") for at in range(0, min(len(data), 60), 2)]
    return [place for place in found if place[0] + place[1] <= len(data)]


def _surgery(data: bytes, rng: random.Random) -> bytes:
    """Drop, repeat, move, exchange, cut or fill one piece."""
    _, pieces = pieces_of(data)
    at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    match rng.randrange(7):
        case 0:
            del pieces[at]
        case 1:
            pieces[at:at] = [pieces[other]] * rng.choice((1, 2, 50))
        case 2:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        case 3:
            pieces[at] = pieces[at][: rng.randrange(len(pieces[at]) + 1)]
        case 4:
            pieces[at] = mutations(pieces[at], rng) if pieces[at] else b""
        case 5:
            pieces = pieces[: at + 1]
        case _:
            head = pieces[at][: rng.choice((4, 8, 12))]
            pieces[at] = head + rng.randbytes(max(len(pieces[at]) - len(head), 0))
    return _repaired(b"".join(pieces))


def _insert(data: bytes, rng: random.Random) -> bytes:
    """Insert a piece that the file did not have: metadata, palettes, animation, restart intervals."""
    kind, pieces = pieces_of(data)
    content = rng.randbytes(rng.choice((0, 1, 2, 6, 13, 256, 768, 5000)))
    if kind == "png":
        names = (
            b"tRNS",
            b"PLTE",
            b"iCCP",
            b"gAMA",
            b"acTL",
            b"fcTL",
            b"fdAT",
            b"eXIf",
            b"zTXt",
            b"iTXt",
            b"pHYs",
            b"IHDR",
        )
        new = struct.pack(">I", len(content)) + rng.choice(names) + content + b"crc!"
    elif kind == "jpeg":
        marker = rng.choice(
            (0xC0, 0xC2, 0xC4, 0xCC, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xD0, 0xD9)
        )
        new = bytes([0xFF, marker]) + struct.pack(">H", (len(content) + 2) & 0xFFFF) + content
    elif kind == "webp":
        name = rng.choice((b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP ", b"VP8 ", b"VP8L"))
        new = name + struct.pack("<I", len(content)) + content
    elif kind == "avif":
        name = rng.choice(
            (
                b"meta",
                b"iloc",
                b"ispe",
                b"pixi",
                b"av1C",
                b"ipma",
                b"irot",
                b"imir",
                b"clap",
                b"grid",
                b"free",
            )
        )
        new = struct.pack(">I", len(content) + 8) + name + content
    else:
        new = content
    pieces.insert(rng.randrange(len(pieces) + 1), new)
    return _repaired(b"".join(pieces))


def _tail(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((data, rng.randbytes(100), bytes(5000), b"\xff\xd9", b"IEND"))


_OPERATIONS: Sequence[tuple[str, Callable[[bytes, random.Random], bytes]]] = (
    ("bytes", mutations),
    ("bytes", mutations),
    ("fields", set_fields),
    ("fields", set_fields),
    ("pieces", _surgery),
    ("pieces", _surgery),
    ("insert", _insert),
    ("tail", _tail),
)


def _png_chunks(data: bytes) -> list[bytes]:
    return _chunks(data, 8, lambda at: struct.unpack_from(">I", data, at)[0] + 12)


def _riff_chunks(data: bytes) -> list[bytes]:
    return _chunks(data, 12, lambda at: 8 + (struct.unpack_from("<I", data, at + 4)[0] + 1) // 2 * 2)


def _chunks(data: bytes, at: int, size: Callable[[int], int]) -> list[bytes]:
    found: list[bytes] = []
    while at + 8 <= len(data) and len(found) < 500:
        length = max(size(at), 8)
        found.append(data[at : at + length])
        at += length
    return [*found, data[at:]] if at < len(data) else found or [b""]


def _boxes(data: bytes) -> list[bytes]:
    """Boxes of ISO files; those inside of some are pieces too, so that their parents' sizes become wrong."""
    found: list[bytes] = []
    for box in _chunks(data, 0, lambda at: struct.unpack_from(">I", data, at)[0]):
        if box[4:8] in _BOXES_IN and len(box) > 20:
            head = 12 if box[4:8] == b"meta" else 8
            found += [box[:head], *_boxes(box[head:])]
        else:
            found.append(box)
    return found


def _jpeg_segments(data: bytes) -> list[bytes]:
    found, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and len(found) < 500:
        marker = data[at + 1]
        size = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append(data[at : at + size])
        at += size
        if marker == 0xDA:
            end = at
            while end + 1 < len(data) and not (
                data[end] == 0xFF and data[end + 1] not in {0, *range(0xD0, 0xD8)}
            ):
                end += 1
            found.append(data[at:end])
            at = end
    return [*found, data[at:]]


def _tiff_pieces(data: bytes) -> list[bytes]:
    order = "<" if data.startswith(b"II") else ">"
    start = struct.unpack_from(order + "I", data, 4)[0] if len(data) >= 8 else 8
    pieces = [data[:8], data[8:start]]
    at = start + 2
    pieces.append(data[start:at])
    while at + 12 <= len(data) and len(pieces) < 40:
        pieces.append(data[at : at + 12])
        at += 12
    return [piece for piece in [*pieces, data[at:]] if piece] or [b""]


def _repaired(data: bytes) -> bytes:
    """Write right checksums into a PNG, so that its decoder reads on; other files as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    chunks = _png_chunks(data)
    for index, chunk in enumerate(chunks):
        size = struct.unpack_from(">I", chunk)[0] if len(chunk) >= 12 else -1
        if size + 12 == len(chunk):
            chunks[index] = chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
    return data[:8] + b"".join(chunks)

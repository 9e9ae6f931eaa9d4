"""Image files that cost a decoder much for their size: `craft(kind, count, seed)`.

Each is made by one of several recipes, which know the structure of its format: scans, tiles, chunks, sizes,
ratios and lengths of runs. Some are then damaged in a few bytes of their header.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageFile

__all__ = ["KINDS", "craft"]

Recipe = Callable[[random.Random], bytes]

ImageFile.MAXBLOCK = 2**26  # Pillow fails to write a JPEG of noise with less
_MOST_BYTES = 32 * 2**20
_PIXELS = 64_000_000
_DAMAGED = 0.25  # part of the files


def craft(kind: str, count: int, seed: int) -> Iterator[bytes]:
    """Files of a format, the same for the same seed."""
    rng = random.Random(f"{kind} {seed}")
    recipes = _RECIPES[kind]
    for number in range(count):
        data = recipes[number % len(recipes)](rng)
        yield (_damage(data, rng) if rng.random() < _DAMAGED else data)[:_MOST_BYTES]


def _damage(data: bytes, rng: random.Random) -> bytes:
    """Change up to three bytes of the header."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(min(len(changed), 400))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(changed)


def _size(rng: random.Random, longest: int = 65_535) -> tuple[int, int]:
    """Width and height, often of all pixels that are allowed."""
    pixels = rng.choice([_PIXELS, _PIXELS, _PIXELS // 5, 1_000_000, 10_000])
    width = min(longest, rng.choice([1, 2, 17, 1000, 7900, 8000, 16_000, 65_535, rng.randint(1, 65_535)]))
    return width, max(1, min(longest, pixels // width))


def _noise(rng: random.Random, width: int, height: int, channels: int = 3) -> Image.Image:
    """Noise that repeats, which is quick to make."""
    tile = np.frombuffer(rng.randbytes(64 * 64 * channels), np.uint8).reshape(64, 64, channels)
    pixels = np.tile(tile, (-(-height // 64), -(-width // 64), 1))[:height, :width]
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _picture(rng: random.Random, width: int, height: int, modes: tuple[str, ...]) -> Image.Image:
    mode = rng.choice(modes)
    if width * height > 4_000_000 or rng.random() < 0.3:
        return Image.new(mode, (width, height), rng.choice([0, 90]))
    return _noise(rng, width, height).convert(mode)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---- JPEG


@functools.cache
def _flat_jpeg(mode: str, width: int, height: int, progressive: bool, subsampling: int = 0) -> bytes:
    image = Image.new(mode, (width, height), 90 if mode == "L" else (90, 40, 10))
    return _encode(image, "JPEG", progressive=progressive, quality=50, subsampling=subsampling)


_JPEG_SIDES = ((7900, 7900), (8000, 8000), (65_500, 970), (970, 65_500), (2000, 1500), (400, 300))


def _jpeg_scans(rng: random.Random) -> bytes:
    """Repeat scans, openly or behind what looks like the end."""
    size = rng.choice(_JPEG_SIDES)
    data = _flat_jpeg(rng.choice(["L", "RGB"]), *size, True, rng.choice([0, 2]))
    starts = [place for place in range(len(data) - 1) if data[place : place + 2] == b"\xff\xda"]
    first, last = starts[rng.randrange(1, len(starts)) - 1], len(data) - 2
    hidden = rng.choice([b"", b"\xff\xfe\0\4\xff\xd9", b"\xff\xe5\0\x06\xff\xd9\xff\xd8", b"\xff" * 50])
    body = data[first:last]
    return data[:last] + (hidden + body) * rng.choice([1, 3, 5, 10, 45, 49, 200]) + data[last:]


def _jpeg_dense(rng: random.Random) -> bytes:
    """Fill the picture with coefficients."""
    side = rng.choice([2000, 3000, 4000])
    image = _noise(rng, side, side)
    return _encode(
        image,
        "JPEG",
        quality=rng.choice([95, 100]),
        progressive=rng.random() < 0.5,
        subsampling=rng.choice([0, 1, 2]),
        restart_marker_blocks=rng.choice([0, 1, 100]),
    )


def _jpeg_declared(rng: random.Random) -> bytes:
    """Declare another size, frame or sampling than the data has."""
    small = _encode(_noise(rng, 200, 200), "JPEG", quality=90, progressive=rng.random() < 0.5)
    data = bytearray(small)
    frame = next(data.index(bytes([0xFF, kind])) for kind in (0xC0, 0xC2) if bytes([0xFF, kind]) in data)
    width, height = _size(rng)
    struct.pack_into(">HH", data, frame + 5, height, width)
    data[frame + 1] = rng.choice([data[frame + 1]] * 4 + [0xC1, 0xC2, 0xC9, 0xCA, 0xC3])
    data[frame + 11] = rng.choice([data[frame + 11], 0x11, 0x44, 0x41, 0x14])
    return bytes(data)


def _jpeg_segments(rng: random.Random) -> bytes:
    """Fill the file with segments, tables and restart markers."""
    data = _flat_jpeg("RGB", 400, 300, rng.random() < 0.5)
    filler = rng.choice(
        [b"\xff\xfe\0\2", b"\xff\xdd\0\4\0\1", b"\xff\xe1\0\x08Exif\0\0", b"\xff\xd0", b"\xff"]
    )
    place = 2 if rng.random() < 0.5 else len(data) - 2
    return data[:place] + filler * rng.choice([100, 9_000, 1_000_000]) + data[place:]


# ---- PNG

_COLORS = (
    (1, 0),
    (2, 0),
    (4, 0),
    (8, 0),
    (16, 0),
    (8, 2),
    (16, 2),
    (1, 3),
    (8, 3),
    (8, 4),
    (16, 4),
    (8, 6),
    (16, 6),
)
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@functools.cache
def _zeros(count: int, level: int) -> bytes:
    """A stream that inflates to this many zeros."""
    packer = zlib.compressobj(level)
    parts = [packer.compress(bytes(min(2**24, count - start))) for start in range(0, count, 2**24)]
    return b"".join([*parts, packer.flush()])


def _png(rng: random.Random, before: bytes = b"", after: bytes = b"", piece: int = 2**20) -> bytes:
    bits, color = rng.choice(_COLORS)
    width, height = _size(rng)
    line = 1 + (width * bits * _CHANNELS[color] + 7) // 8
    size = min(2 * 10**8, -(-height * line // 2**20) * 2**20)
    stream = _zeros(size, rng.choice([1, 9]))
    if rng.random() < 0.3:
        lines = rng.choice([b"\4", b"\3", b"\2"]) + rng.randbytes(min(line - 1, 10**6))
        stream = zlib.compress(lines * min(height, 2 * 10**7 // len(lines) + 1), 1)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, rng.choice([0, 0, 1]))
    palette = _chunk(b"PLTE", rng.randbytes(768)) if color == 3 else b""
    alpha = _chunk(b"tRNS", bytes(6)) if rng.random() < 0.5 else b""
    data = b"".join(_chunk(b"IDAT", stream[at : at + piece]) for at in range(0, len(stream), piece))
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + palette + alpha
    return start + before + data + after + _chunk(b"IEND", b"")


def _png_pieces(rng: random.Random) -> bytes:
    return _png(rng, piece=rng.choice([1, 7, 100]))


def _png_chunks(rng: random.Random) -> bytes:
    """Add many chunks, some of which inflate."""
    bomb = _zeros(2**20 - 1, 9)
    filler = rng.choice(
        [
            _chunk(b"iCCP", b"a\0\0" + bomb),
            _chunk(b"zTXt", b"a\0\0" + bomb),
            _chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
            _chunk(b"tEXt", b"a\0b"),
            _chunk(b"aaAa", b""),
            _chunk(b"tIME", b""),
        ]
    ) * rng.choice([10, 1_000, 10_000])
    filler = filler[: 20 * 2**20]
    return _png(rng, before=filler) if rng.random() < 0.6 else _png(rng, after=filler)


def _png_frames(rng: random.Random) -> bytes:
    width, height = 100, 100
    control = struct.pack(">IIIIIHHBB", 0, width, height, 0, 0, 1, 1, 0, 0)
    count = rng.choice([2, 1000, 2**31 - 1])
    more = b"".join(_chunk(b"fdAT", struct.pack(">I", n) + bytes(5)) for n in range(rng.choice([10, 20_000])))
    return _png(rng, _chunk(b"acTL", struct.pack(">II", count, 0)) + _chunk(b"fcTL", control), more)


# ---- WebP


@functools.cache
def _flat_webp(mode: str, width: int, height: int, lossless: bool) -> bytes:
    return _encode(Image.new(mode, (width, height), 90), "WEBP", lossless=lossless, quality=0, method=0)


def _webp_flat(rng: random.Random) -> bytes:
    size = rng.choice([(8000, 8000), (16_383, 3900), (3900, 16_383), (2000, 1500), (400, 300)])
    return _flat_webp(rng.choice(["RGB", "RGBA"]), *size, rng.random() < 0.5)


def _webp_dense(rng: random.Random) -> bytes:
    side = rng.choice([500, 1200, 2000])
    lossless = rng.random() < 0.5
    return _encode(
        _noise(rng, side, side, rng.choice([3, 4])),
        "WEBP",
        lossless=lossless,
        quality=100 * (not lossless),
        method=0,
    )


def _webp_declared(rng: random.Random) -> bytes:
    """Declare another size than the data has."""
    data = bytearray(_encode(_noise(rng, 100, 100), "WEBP", lossless=rng.random() < 0.5, quality=50))
    width, height = _size(rng, 16_383)
    if data[12:16] == b"VP8L":
        struct.pack_into("<I", data, 21, (width - 1) | (height - 1) << 14 | rng.choice([0, 1 << 28]))
    else:
        struct.pack_into("<HH", data, 26, width, height)
    return bytes(data)


def _webp_random(rng: random.Random) -> bytes:
    """Random bits after the header of a lossless file, which are codes, transforms and many tables."""
    width, height = _size(rng, 16_383)
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    body = (
        b"\x2f" + bits + rng.choice([b"", b"\x07", b"\x02"]) + rng.randbytes(rng.choice([100, 10**5, 10**6]))
    )
    chunk = b"VP8L" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def _webp_frames(rng: random.Random) -> bytes:
    """Animate: a large canvas, or many frames."""
    width, height = _size(rng, 16_383)
    inner = _flat_webp("RGB", 16, 16, False)[12:]
    frame = struct.pack("<I", 0)[:3] * 2 + struct.pack("<I", 15)[:3] * 2 + bytes(4) + inner
    frame = b"ANMF" + struct.pack("<I", len(frame)) + frame
    header = bytes([2, 0, 0, 0]) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + header + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += frame * rng.choice([1, 100, 100_000]) + b"JUNK\0\0\0\0" * rng.choice([0, 2000, 10**6])
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


# ---- GIF


def _gif(rng: random.Random) -> bytes:
    """Canvas, frame and blocks of any size; codes that clear, repeat or end."""
    (width, height), (across, down) = _size(rng), _size(rng)
    if rng.random() < 0.6:
        across, down = width, height
    head = rng.choice([b"GIF87a", b"GIF89a"]) + struct.pack(
        "<HHBBB", width, height, rng.choice([0, 0xF7]), 0, 0
    )
    head += rng.randbytes(768) if head[10] & 0x80 else b""
    block = rng.choice([b"\1\0", b"\xff" + bytes(255), b"\4\0\0\0\0"])
    label = rng.choice([b"\xfe", b"\xff", b"\xf9", b"\x01"])
    extension = b"!" + label + block * rng.choice([0, 10, 100_000, 2_000_000]) + b"\0"
    extensions = extension[: 16 * 2**20] * rng.choice([1, 1, 1000 if len(extension) < 20 else 1])
    frame = b"," + struct.pack("<HHHHB", 0, 0, across, down, rng.choice([0, 0x40, 0x87]))
    frame += rng.randbytes(768) if frame[9] & 0x80 else b""
    bits = rng.choice([2, 8, 8, 8, 11])
    return head + extensions + frame + bytes([bits]) + _lzw(rng, bits) + b"\0;"


def _lzw(rng: random.Random, bits: int) -> bytes:
    """Codes in blocks: the longest strings, clear codes, or noise."""
    way = rng.random()
    if way < 0.4:  # each code one longer than the one before: 4,096 codes stand for 8 million pixels
        codes, width = [1 << bits, 0], bits + 1
        stream, filled = 0, 0
        for code in [*codes, *range((1 << bits) + 2, 4096)]:
            stream |= code << filled
            filled += width
            if code >= (1 << width) - 1 and width < 12:
                width += 1
        raw = stream.to_bytes(-(-filled // 8), "little") * rng.choice([1, 8, 200])
    elif way < 0.7:
        raw = rng.randbytes(rng.choice([1000, 10**6]))
    else:
        raw = bytes([rng.choice([0, 0x55, 0xFF])]) * rng.choice([1000, 10**6, 10**7])
    size = rng.choice([1, 20, 255, 255])
    raw = raw if size > 1 else raw[: 10**6]
    return b"".join(
        bytes([len(raw[at : at + size])]) + raw[at : at + size] for at in range(0, len(raw), size)
    )


# ---- BMP


def _bmp_runs(rng: random.Random) -> bytes:
    """Run lengths that pad rows, skip, copy and repeat."""
    width, height = _size(rng)
    run = rng.choice(
        [
            b"\1\0\0\0",
            b"\0\0",
            b"\xff\7",
            b"\0\2\xff\xff",
            b"\0\2\1\0",
            b"\0\4\1\2\3\4",
            b"\1\1",
            b"\0\xff" + bytes(256),
        ]
    )
    if rng.random() < 0.3:
        run += rng.choice([b"\0\0", b"\5\5", b"\0\2\0\1"])
    runs = run * rng.choice([height, 1000, 10**6])
    runs = runs[: 16 * 2**20]
    bits, compression = rng.choice([(8, 1), (4, 2)])
    return _bmp(width, height, bits, compression, runs)


def _bmp_raw(rng: random.Random) -> bytes:
    width, height = _size(rng)
    bits = rng.choice([1, 4, 8, 16, 24, 32])
    size = min(-(-width * bits // 32) * 4 * height, 30 * 2**20)
    return _bmp(width, rng.choice([height, -height]), bits, rng.choice([0, 0, 3]), bytes(size))


def _bmp(width: int, height: int, bits: int, compression: int, body: bytes) -> bytes:
    palette = bytes(1024) if bits <= 8 else bytes(12)
    colors = 256 if bits <= 8 else 0
    start = 54 + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, colors, 0)
    return head + info + palette + body


# ---- TIFF

_COMPRESSIONS = (
    "raw",
    "packbits",
    "tiff_lzw",
    "tiff_deflate",
    "tiff_adobe_deflate",
    "jpeg",
    "group3",
    "group4",
    "lzma",
    "zstd",
)


def _tiff_encoded(rng: random.Random) -> bytes:
    compression = rng.choice(_COMPRESSIONS)
    width, height = _size(rng, 16_000)
    longest = 1000 if compression == "lzma" else 8000  # it takes half a minute to write the largest
    width, height = min(width, longest), min(height, longest)
    modes = (
        ("1",)
        if compression.startswith("group")
        else ("L", "RGB")
        if compression == "jpeg"
        else ("L", "RGB", "RGBA", "CMYK")
    )
    image = _picture(rng, width, height, modes)
    tags = {274: rng.randint(1, 8)}
    if compression != "jpeg":  # it fixes the rows per strip, and other numbers end the encoder
        tags[278] = rng.choice([1, 16, height])
    try:
        return _encode(image, "TIFF", compression=compression, tiffinfo=tags)
    except (OSError, RuntimeError):
        return _encode(image, "TIFF")


def _tiff_shared(rng: random.Random) -> bytes:
    """Many strips or tiles that are one and the same compressed block."""
    width, height = _size(rng)
    tiled = rng.random() < 0.5
    across, down = (rng.choice([16, 64, 256]),) * 2 if tiled else (width, rng.choice([1, 8, 100]))
    samples = rng.choice([1, 3, 4])
    compression = rng.choice([1, 5, 8, 32773, 32946])
    raw = bytes(min(across * down * samples, 10**7))
    block = {8: zlib.compress(raw), 32946: zlib.compress(raw), 32773: b"\x81\0" * (len(raw) // 128 + 1)}.get(
        compression, raw[: 10**6]
    )
    return _tiff(rng, (width, height), samples, compression, block, (across if tiled else 0, down))


def _tiff(
    rng: random.Random,
    size: tuple[int, int],
    samples: int,
    compression: int,
    block: bytes,
    part: tuple[int, int],
) -> bytes:
    (width, height), (across, down) = size, part
    count = min(10**6, -(-width // (across or width)) * -(-height // down))
    lists = 8 + len(block) + len(block) % 2
    directory = lists + 8 * count + 8
    offsets = (
        struct.pack("<I", 8) * count + struct.pack("<I", len(block)) * count + struct.pack("<4H", 8, 8, 8, 8)
    )
    one = count == 1
    at, sizes = (8, len(block)) if one else (lists, lists + 4 * count)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, samples, 8 if samples == 1 else directory - 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1 if samples == 1 else 2),
        (274, 3, 1, rng.randint(1, 8)),
        (277, 3, 1, samples),
        (284, 3, 1, rng.choice([1, 1, 2])),
        (317, 3, 1, rng.choice([1, 2])),
    ]
    if across:
        tags += [(322, 4, 1, across), (323, 4, 1, down), (324, 4, count, at), (325, 4, count, sizes)]
    else:
        tags += [(273, 4, count, at), (278, 4, 1, down), (279, 4, count, sizes)]
    tags += [(40_000 + n, 4, rng.choice([1, 10**6]), 8) for n in range(rng.choice([0, 0, 50, 2000]))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    following = rng.choice([0, directory, 8])
    head = b"II*\0" + struct.pack("<I", directory)
    body = block + bytes(len(block) % 2) + offsets
    return head + body + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


# ---- AVIF


@functools.cache
def _avif(mode: str, width: int, height: int, noisy: bool, subsampling: str) -> bytes:
    rng = random.Random(width)
    image = _noise(rng, width, height).convert(mode) if noisy else Image.new(mode, (width, height), 90)
    return _encode(
        image, "AVIF", speed=10, quality=90 if noisy else 50, subsampling=subsampling, max_threads=2
    )


def _avif_file(rng: random.Random) -> bytes:
    """Flat or noisy pictures, many of them damaged: sizes, properties, places."""
    size, noisy = rng.choice(
        [
            ((8000, 8000), False),
            ((65_000, 900), False),
            ((4000, 3000), False),
            ((1500, 1200), True),
            ((300, 200), True),
        ]
    )
    data = bytearray(_avif(rng.choice(["RGB", "RGBA"]), *size, noisy, rng.choice(["4:2:0", "4:4:4"])))
    if rng.random() < 0.4:
        place = data.find(b"ispe")
        struct.pack_into(">II", data, place + 8, *_size(rng))
    for _ in range(rng.choice([0, 0, 1, 3])):
        data[rng.randrange(30, min(len(data), 600))] = rng.randrange(256)
    return bytes(data)


_RECIPES: dict[str, tuple[Recipe, ...]] = {
    "JPEG": (_jpeg_scans, _jpeg_dense, _jpeg_declared, _jpeg_segments, _jpeg_declared),
    "PNG": (_png, _png_pieces, _png_chunks, _png_frames),
    "WebP": (_webp_flat, _webp_dense, _webp_declared, _webp_random, _webp_frames),
    "GIF": (_gif,),
    "BMP": (_bmp_runs, _bmp_raw),
    "TIFF": (_tiff_encoded, _tiff_shared),
    "AVIF": (_avif_file,),
}
KINDS = tuple(_RECIPES)

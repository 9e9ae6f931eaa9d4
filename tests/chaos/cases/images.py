"""Cases of pictures: changed files of every format, batches of good and bad rows, costly files."""

from __future__ import annotations

import base64
import functools
import io
import random
import struct
import zlib

from images import png
from PIL import Image

from tests.chaos.cases.base import World, chance, edge, image_request, picture
from tests.chaos.cases.files import operate
from tests.chaos.messages import Infer

__all__ = ["batch", "changed_picture", "costly"]


def changed_picture(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a request of one picture that was changed."""
    name, data = picture(rng, world)
    how, data = operate(data, rng)
    request = image_request(rng, [data], "siglip_vision_features" if chance(rng, 0.05) else "")
    return f"{name}: {how}, {len(data)} bytes to {request.model}", request


def batch(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a request of several rows, some of them bad, sometimes in base64."""
    rows = []
    for _ in range(rng.choice((2, 3, 5, 8, 16, 40, 128))):
        data = picture(rng, world)[1] if chance(rng, 0.7) else rng.choice([*world.broken.values()])
        rows.append(operate(data, rng)[1] if data and chance(rng, 0.3) else data)
    encoded = chance(rng, 0.3)
    if encoded:
        rows = [_base64(rng, row) for row in rows]
    request = image_request(rng, rows)
    parameters = {"base64_encoded": True} if encoded or chance(rng, 0.05) else {}
    about = f"{len(rows)} rows{', base64' if encoded else ''} to {request.model}"
    return about, Infer(request.model, request.inputs, parameters)


def _base64(rng: random.Random, row: bytes) -> bytes:
    text = bytearray(base64.b64encode(row))
    if text and chance(rng, 0.3):
        at = rng.randrange(len(text))
        text[at : at + 1] = rng.choice((b"=", b"\n", b"-", b"\xff", b"", b"===="))
    return bytes(text)


def costly(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a request of a small file that takes a decoder long, or that claims to be huge."""
    kinds = (_bmp_padding, _hidden_scans, _deep_png, _claimed_size, _gif_frames, _tiff_tiles, _repeated_tail)
    kind = rng.choice(kinds)
    data = kind(rng, world)
    rows = [data] * rng.choice((1, 1, 1, 2, 8))
    request = image_request(rng, rows)
    return f"{kind.__name__.strip('_')} x {len(rows)}, {len(data)} bytes, to {request.model}", request


def _bmp_padding(rng: random.Random, _: World) -> bytes:
    """Rows of run-length encoding that end at once: the decoder pads them."""
    height = rng.choice((16, 200, 976))
    rows = b"\1\0\0\0" * height
    head = struct.pack("<IiiHHIIiiII", 40, 65535, height, 1, 8, rng.choice((1, 2)), len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(rows), 0, 0, 54 + 1024) + head + bytes(1024) + rows


def _hidden_scans(rng: random.Random, _: World) -> bytes:
    """Many scans of a progressive JPEG, in some files behind a comment that holds an end marker."""
    side, scans = rng.choice(((800, 400), (4000, 300), (7900, 1200)))
    data = _progressive(side)
    at = data.index(b"\xff\xda")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    while not (data[end] == 0xFF and data[end + 1] != 0):
        end += 1
    table = b"\xff\xc4" + struct.pack(">H", 20) + b"\x10" + bytes([1] + [0] * 15) + b"\xe0"
    runs = -(-(((side + 7) // 8) ** 2) // (2**15 - 1))
    bits = ("0" + "1" * 14) * runs
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = b"\xff\xda" + struct.pack(">H", 8) + b"\1\1\0" + bytes([1, 63, 0]) + body
    comment = rng.choice((b"", b"\xff\xfe\0\4\xff\xd9", b"\xff\xe1\0\6\xff\xd9\xff\xd8"))
    return data[:end] + comment + table + scan * scans + b"\xff\xd9"


@functools.cache
def _progressive(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), 90).save(file, "JPEG", progressive=True, quality=50)
    return file.getvalue()


def _deep_png(rng: random.Random, _: World) -> bytes:
    """A PNG whose rows or whose metadata are much larger than the file."""
    side = rng.choice((4000, 8000, 12000))
    if chance(rng, 0.5):
        return png(side, side, rows=_packed_zeros((side + 1) * side))
    text = b"note\0\0" + _packed_zeros(rng.choice((10**6, 3 * 10**7)))
    return png(40, 30, *[(b"zTXt", text)] * rng.choice((1, 20)))


@functools.cache
def _packed_zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def _claimed_size(rng: random.Random, world: World) -> bytes:
    """A file whose header claims other sides than it has."""
    data = bytearray(world.pictures[rng.choice(("gif", "bmp", "png rgb", "tiff"))])
    offset, size = {0x47: (6, 2), 0x42: (18, 4), 0x89: (16, 4)}.get(data[0], (30, 4))
    for at in (offset, offset + size):
        order = "big" if data[0] == 0x89 else "little"
        data[at : at + size] = (abs(edge(rng)) % 256**size).to_bytes(
            size, "little" if order == "little" else "big"
        )
    return bytes(data)


def _gif_frames(rng: random.Random, _: World) -> bytes:
    """An animation of thousands of frames, or frames that lie far outside of the picture."""
    frames = rng.choice((50, 3000))
    head = b"GIF89a" + struct.pack("<HHBBB", 2000, 2000, 0x80, 0, 0) + bytes(6)
    place = rng.choice(((0, 0, 2000, 2000), (65000, 65000, 500, 500), (0, 0, 65535, 65535)))
    frame = b"\x2c" + struct.pack("<HHHHB", *place, 0) + b"\x02\x02\x4c\x01\x00"
    return head + frame * frames + b"\x3b"


def _tiff_tiles(rng: random.Random, _: World) -> bytes:
    """A TIFF of very many tiny tiles or strips that all lie at one place."""
    side, tile = rng.choice(((4096, 16), (8192, 16), (20000, 32)))
    count = ((side + tile - 1) // tile) ** 2
    tags = [(256, side), (257, side), (258, 8), (259, rng.choice((1, 5, 8, 32773))), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile)]
    where = 8 + 2 + 12 * (len(tags) + 2) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    entries += struct.pack("<HHII", 324, 4, count, where) + struct.pack(
        "<HHII", 325, 4, count, where + 4 * count
    )
    data = where + 8 * count
    lists = struct.pack("<I", data) * count + struct.pack("<I", tile * tile) * count
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 2) + entries + bytes(4) + lists + bytes(tile * tile)


def _repeated_tail(rng: random.Random, world: World) -> bytes:
    """A valid file with megabytes behind it, which no decoder has to read."""
    return picture(rng, world)[1] + rng.choice((bytes(2**20), b"\xff\xda" * 2**19, b"IDAT" * 2**18))

"""Image files for the tests: one of every kind that is served, and broken ones by name."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, features

__all__ = [
    "HAS_AVIF",
    "encode",
    "exif",
    "image_files",
    "malformed_files",
    "mutations",
    "oriented_files",
    "photo",
    "png",
    "sixteen_bit_files",
]

HAS_AVIF = bool(features.check("avif"))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw something like a photograph: gradients, shapes with saturated edges, text, sensor noise."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    phase = rng.uniform(0, 6, 3)
    waves = [np.sin(6 * x * (k + 1) + 4 * y + phase[k]) * 60 + 90 + 70 * y for k in range(3)]
    image = Image.fromarray(np.clip(np.stack(waves, axis=-1), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        right, bottom = (
            left + int(rng.integers(1, width // 3 + 2)),
            top + int(rng.integers(1, height // 3 + 2)),
        )
        red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((left, top, right, bottom), fill=(red, green, blue), outline=(255 - red, green, blue))
    draw.text((width // 8, height // 2), "SigLIP 17", fill=(250, 250, 20))
    noisy = np.asarray(image) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode `image` as a file of Pillow's format `kind`."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    """Make an EXIF block with the orientation 1 to 8 between two other tags."""
    block = Image.Exif()
    block[0x010F] = "SigLIP Serve"
    block[0x0112] = orientation
    block[0x0131] = "tests"
    return block.tobytes()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes | None = None) -> bytes:
    """Make a grey PNG that claims `width` x `height`, with `chunks` before its image data `rows`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes((width + 1) * height) if rows is None else rows)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@functools.cache
def image_files() -> Mapping[str, bytes]:
    """Make a file of every kind that is served and that the reference decodes to the same 8-bit pixels."""
    files = {
        **_jpegs(),
        **_palettes_and_alphas(),
        "png rgb": encode(photo(321, 213, 20), "PNG"),
        "png interlaced-size": encode(photo(37, 41, 21), "PNG"),
        "png grey": encode(photo(300, 200, 22).convert("L"), "PNG"),
        "png 1 bit": encode(photo(300, 200, 23).convert("1"), "PNG"),
        "png 1x1": encode(photo(1, 1, 24), "PNG"),
        **{f"png {height} rows": encode(photo(90, height, height), "PNG") for height in (1, 2, 3, 4)},
        "png 3 columns": encode(photo(3, 90, 25), "PNG"),
        "png thin": encode(photo(9000, 2, 26), "PNG"),
        "webp lossy": encode(photo(400, 300, 27), "WEBP", quality=80),
        "webp lossless alpha": encode(_with_alpha(photo(200, 160, 28)), "WEBP", lossless=True),
        "gif": encode(photo(200, 150, 29), "GIF"),
        "bmp": encode(photo(201, 151, 30), "BMP"),
        "bmp palette": encode(photo(201, 151, 31).quantize(16), "BMP"),
        "tiff": encode(photo(220, 140, 32), "TIFF"),
        "tiff lzw": encode(photo(220, 140, 33), "TIFF", compression="tiff_lzw"),
        "tiff cmyk": encode(photo(220, 140, 34).convert("CMYK"), "TIFF"),
        "tiff ycbcr": encode(photo(220, 140, 35).convert("YCbCr"), "TIFF"),
        "tiff rgba": encode(_with_alpha(photo(220, 140, 36)), "TIFF"),
        "animated gif": _animation("GIF"),
        "animated webp": _animation("WEBP", lossless=True),
        "animated png": _animation("PNG"),
    }
    if HAS_AVIF:
        files["avif"] = encode(photo(256, 192, 37), "AVIF", quality=80)
        files["avif alpha"] = encode(_with_alpha(photo(256, 192, 38)), "AVIF", quality=90)
    return MappingProxyType(files)


def _jpegs() -> dict[str, bytes]:
    sampled = {
        f"jpeg {name}": encode(photo(500, 375, seed), "JPEG", quality=90, subsampling=name)
        for seed, name in enumerate(("4:4:4", "4:2:2", "4:2:0"))
    }
    return {
        **sampled,
        "jpeg odd 4:2:0": encode(photo(333, 517, 3), "JPEG", quality=75, subsampling="4:2:0"),
        "jpeg odd 4:2:2": encode(photo(127, 61, 4), "JPEG", quality=60, subsampling="4:2:2"),
        "jpeg progressive": encode(photo(640, 360, 5), "JPEG", quality=85, progressive=True),
        "jpeg grey": encode(photo(400, 300, 6).convert("L"), "JPEG"),
        "jpeg cmyk": encode(photo(300, 200, 7).convert("CMYK"), "JPEG"),
        "jpeg kept rgb": encode(photo(300, 200, 8), "JPEG", keep_rgb=True),
        "jpeg low quality": encode(photo(64, 128, 9), "JPEG", quality=15),
        "jpeg tiny": encode(photo(5, 3, 10), "JPEG"),
        "jpeg 1 row": encode(photo(300, 1, 11), "JPEG"),
        "jpeg large": encode(photo(1920, 1080, 12), "JPEG", quality=85),
        "jpeg restart": encode(photo(300, 200, 13), "JPEG", restart_marker_rows=1),
        "jpeg metadata": encode(
            photo(300, 200, 14),
            "JPEG",
            exif=exif(1),
            comment=b"\xff\xd8 no marker",
            icc_profile=bytes(70_000),
        ),
        "mpo": encode(photo(240, 180, 15), "MPO", save_all=True, append_images=[photo(240, 180, 16)]),
    }


def _palettes_and_alphas() -> dict[str, bytes]:
    quantized = photo(220, 160, 40).quantize(32)
    bits = quantized.point([0, 1] * 128, "1")
    return {
        "png palette": encode(quantized, "PNG"),
        "png palette + tRNS": encode(quantized, "PNG", transparency=bytes(range(0, 256, 8))),
        "png palette + one transparent": encode(quantized, "PNG", transparency=3),
        "png 1 bit + tRNS": encode(bits, "PNG", transparency=1),
        "png rgb + tRNS": encode(photo(60, 40, 41), "PNG", transparency=photo(60, 40, 41).getpixel((0, 0))),
        "png grey + tRNS": encode(photo(60, 40, 42).convert("L"), "PNG", transparency=120),
        "png rgba": encode(_with_alpha(photo(220, 160, 43)), "PNG"),
        "png la": encode(_with_alpha(photo(220, 160, 44)).convert("LA"), "PNG"),
        "gif transparent": encode(quantized, "GIF", transparency=5),
        "webp palette-like alpha": encode(_with_alpha(quantized.convert("RGB")), "WEBP", lossless=True),
    }


def _with_alpha(image: Image.Image) -> Image.Image:
    ramp = np.linspace(0, 255, image.width).astype(np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(np.repeat(ramp[None], image.height, axis=0)))
    return image


def _animation(kind: str, **options: Any) -> bytes:
    frames = [photo(120, 90, seed) for seed in (50, 51, 52)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)


@functools.cache
def oriented_files() -> Mapping[str, bytes]:
    """Make a JPEG of every EXIF orientation, and some in each other format that can hold one."""
    files = {
        f"jpeg orientation {value}": encode(photo(300, 200, 60), "JPEG", quality=90, exif=exif(value))
        for value in range(1, 9)
    }
    for value in (3, 5, 6):
        files[f"png orientation {value}"] = encode(photo(90, 60, 61), "PNG", exif=exif(value))
        files[f"webp orientation {value}"] = encode(photo(90, 60, 62), "WEBP", exif=exif(value))
        files[f"tiff orientation {value}"] = encode(photo(90, 60, 63), "TIFF", exif=exif(value))
        files[f"cmyk orientation {value}"] = encode(
            photo(90, 60, 64).convert("CMYK"), "JPEG", exif=exif(value)
        )
        if HAS_AVIF:
            files[f"avif orientation {value}"] = encode(photo(90, 60, 65), "AVIF", exif=exif(value))
    files["jpeg xmp orientation 8"] = encode(
        photo(90, 60, 66), "JPEG", xmp=b'<rdf:Description tiff:Orientation="8"/>'
    )
    return MappingProxyType(files)


@functools.cache
def sixteen_bit_files() -> Mapping[str, tuple[bytes, NDArray[np.uint8]]]:
    """Make 16-bit grey files, each with its 8-bit grey values `[H, W]`."""
    values = np.linspace(0, 65535, 120 * 80).round().astype(np.uint16).reshape(80, 120)
    grey = np.round(values / 257).astype(np.uint8)
    small = np.arange(120 * 80, dtype=np.int32).reshape(80, 120) * 6
    return MappingProxyType(
        {
            "png 16 bit": (encode(Image.fromarray(values), "PNG"), grey),
            "tiff 16 bit": (encode(Image.fromarray(values), "TIFF"), grey),
            "tiff 16 bit big-endian": (encode(Image.fromarray(values.astype(">u2")), "TIFF"), grey),
            "tiff 32 bit": (encode(Image.fromarray(small), "TIFF"), np.round(small / 257).astype(np.uint8)),
        }
    )


@functools.cache
def malformed_files() -> Mapping[str, bytes]:
    """Make inputs that are no image or an incomplete one, by the name of the fault."""
    jpeg = encode(photo(120, 90, 70), "JPEG")
    whole = encode(photo(120, 90, 71), "PNG")
    files = {
        "empty": b"",
        "text": b"hello",
        "one byte": b"\xff",
        "zeros": bytes(1000),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "html": b"<!doctype html><title>404</title>",
        "pdf": b"%PDF-1.7\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "photoshop": b"8BPS\0\1" + bytes(40),
        "portable pixmap": encode(photo(9, 9, 72), "PPM"),
        "icon": encode(photo(16, 16, 73), "ICO"),
        "jpeg signature only": jpeg[:3],
        "jpeg without image data": jpeg[:300],
        "jpeg cut in half": jpeg[: len(jpeg) // 2],
        "jpeg with wrong frame": jpeg.replace(b"\xff\xc0", b"\xff\xcf"),
        "png signature only": whole[:8],
        "png cut in half": whole[: len(whole) // 2],
        "png wrong checksum": whole[:29] + b"\0\0\0\0" + whole[33:],
        "png no rows": png(4, 4, rows=b""),
        "png 0 wide": png(0, 4),
        "gif header only": b"GIF89a\x10\0\x10\0\0\0\0",
        "gif cut in half": encode(photo(120, 90, 74), "GIF")[:600],
        "bmp cut in half": encode(photo(120, 90, 75), "BMP")[:900],
        "tiff header only": b"II*\0\x08\0\0\0",
        "tiff float": encode(Image.new("F", (9, 9), 0.5), "TIFF"),
        "tiff grey beyond 16 bit": encode(Image.new("I", (9, 9), 70_000), "TIFF"),
        "tiff negative grey": encode(Image.new("I", (9, 9), -1), "TIFF"),
        "webp header only": b"RIFF\x10\0\0\0WEBPVP8 ",
        "webp cut in half": encode(photo(120, 90, 76), "WEBP")[:400],
    }
    if HAS_AVIF:
        files["avif cut in half"] = encode(photo(120, 90, 77), "AVIF")[:500]
    return MappingProxyType(files)


def mutations(data: bytes, rng: random.Random) -> bytes:
    """Make one hostile change to `data`: a cut, flipped bits, random bytes, or a piece moved or repeated."""
    changed = bytearray(data)
    # Parsers fail mostly on headers, so half of all changes fall into the first bytes.
    reach = len(data) if rng.random() < 0.5 else min(len(data), 400)
    position = rng.randrange(reach)
    length = rng.choice((1, 2, 4, 8, 64))
    match rng.randrange(6):
        case 0:
            return data[:position]
        case 1:
            for _ in range(rng.choice((1, 1, 4, 16))):
                changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        case 2:
            changed[position : position + length] = rng.randbytes(length)
        case 3:
            changed[position : position + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
        case 4:
            del changed[position : position + length]
        case _:
            start = rng.randrange(len(data))
            changed[position:position] = data[start : start + length]
    return bytes(changed)

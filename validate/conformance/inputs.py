"""Texts and pictures that tell faults of embedding servers apart. They are the same in every run."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["EMPTY", "TEXTS", "Picture", "pictures"]

EMPTY = "empty"
_ORIENTATION = 0x0112
_LONG = "a red dog and a blue car stand near an old house with a tree "

# Texts by name. No two have the same tokens.
TEXTS = {
    "one word": "dog",
    "short": "a dog",
    "prompt": "a photo of a cat on a chair",
    "upper case": "A DOG IN THE SNOW",
    "mixed case": "The Eiffel Tower In Paris",
    "punctuation": "a dog, a cat; (two) birds!",
    "spaces": "  a   red \t car \n",
    "Cyrillic": "собака на снегу",
    "Chinese": "一只狗在雪地里",
    "special tokens": "a </s> dog <unk> cat <eos> bird <|endoftext|> fish",
    "long": _LONG + "and a boat on the water",
    "too long": _LONG * 12,
}


@dataclass(frozen=True)
class Picture:
    """A file that is sent.

    Attributes:
        kind: its MIME type.
    """

    name: str
    data: bytes
    kind: str


def pictures() -> list[Picture]:
    """Draw the pictures. Each way of reading them wrongly changes some of them much."""
    square, wide, tall = _scene(192, 192, 1), _scene(360, 120, 2), _scene(100, 300, 3)
    photo, turned, mirrored = _scene(240, 180, 4), _scene(240, 180, 5), _scene(240, 180, 6)
    alpha, palette, shades = _scene(160, 160, 7), _scene(192, 160, 8), _scene(192, 160, 9)
    grey, inks, sheer = _scene(192, 192, 10), _scene(192, 160, 11), _scene(192, 160, 12)
    return [
        _picture("square", square, "PNG"),
        _picture("3:1", wide, "PNG"),
        _picture("1:3", tall, "PNG"),
        _picture("JPEG", photo, "JPEG", quality=95, subsampling=0),
        _picture("turned by EXIF", turned, "JPEG", quality=95, subsampling=0, exif=_exif(6)),
        _picture("turned over by EXIF", mirrored, "JPEG", quality=95, subsampling=0, exif=_exif(3)),
        _picture("alpha", _see_through(alpha), "PNG"),
        _picture("palette", palette.quantize(32), "PNG"),
        _picture("palette with alpha", shades.quantize(32), "PNG", transparency=bytes([0, 60] * 16)),
        _picture("grey", grey.convert("L"), "PNG"),
        _picture("CMYK", inks.convert("CMYK"), "JPEG", quality=95),
        _picture("WebP", sheer, "WEBP", lossless=True),
    ]


def _picture(name: str, image: Image.Image, kind: str, **options: Any) -> Picture:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Picture(name, file.getvalue(), f"image/{kind.lower()}")


def _scene(width: int, height: int, seed: int) -> Image.Image:
    """Draw shapes of strong colours, a smooth ground and fine lines, different at every edge."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    ground = np.stack([60 + 180 * x, 200 - 150 * y, 40 + 120 * np.abs(x - y)], axis=-1)
    image = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(10):
        left, top = int(rng.integers(-width // 8, width)), int(rng.integers(-height // 8, height))
        right, bottom = left + int(rng.integers(8, width // 2)), top + int(rng.integers(8, height // 2))
        red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape((left, top, right, bottom), fill=(red, green, blue))
    for offset in range(0, width // 3, 4):
        draw.line((offset, 0, offset, height // 4), fill=(255, 255, 255) if offset % 8 else (0, 0, 0))
    draw.rectangle((0, height - height // 8, width, height), fill=(220, 30, 30))
    return image


def _see_through(image: Image.Image) -> Image.Image:
    """Make half of a picture transparent. The colours below are kept."""
    see_through = image.copy()
    mask = Image.new("L", image.size, 255)
    ImageDraw.Draw(mask).ellipse((10, 10, image.width - 40, image.height - 20), fill=0)
    see_through.putalpha(mask)
    return see_through


def _exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[_ORIENTATION] = orientation
    return block.tobytes()

"""Parts that pictures of several commands are drawn of: colours, fonts, thumbnails, labels that fit."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

from PIL import Image, ImageFont, ImageOps

__all__ = [
    "FAINT",
    "INK",
    "PAPER",
    "Color",
    "Font",
    "drawable",
    "font_of",
    "plural",
    "shortened",
    "thumbnail",
]

Color: TypeAlias = tuple[int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK: Color = (34, 34, 34)
FAINT: Color = (105, 105, 105)
PAPER: Color = (255, 255, 255)
# Pillow's own font has ASCII letters only. These fonts have more, on systems that have the fonts.
_FURTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")


@lru_cache(maxsize=16)
def font_of(size: int) -> Font:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def drawable(text: str, size: int) -> tuple[str, Font]:
    """The text with escapes for letters that no font has, and the font that has the most letters."""
    fonts = [font for name in (None, *_FURTHER_FONTS) if (font := _font(size, name)) is not None]
    missing = [{letter for letter in set(text) if not _has(font, letter)} for font in fonts]
    best = min(range(len(fonts)), key=lambda index: len(missing[index]))
    escaped = [
        letter.encode("unicode_escape").decode() if letter in missing[best] else letter for letter in text
    ]
    return "".join(escaped), fonts[best]


def plural(count: int, noun: str) -> str:
    """The number with the noun."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def thumbnail(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The upright picture, as large as fits, in RGB."""
    # Large JPEGs are decoded at a fraction of their size.
    picture.draft("RGB", (2 * width, 2 * height))
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    # ImageOps.contain would give very thin crops a side of 0 pixels.
    scale = min(width / upright.width, height / upright.height)
    size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    return upright.resize(size, Image.Resampling.LANCZOS)


def shortened(text: str, font: Font, width: float) -> str:
    """The text, or the end of it that fits."""
    # Names of files differ at their ends. Pillow's font has no ellipsis.
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"..{text}") > width:
        text = text[1:]
    return f"..{text}"


def _has(font: Font, letter: str) -> bool:
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


@lru_cache(maxsize=16)
def _font(size: int, name: str | None) -> Font | None:
    """The font of this name, or Pillow's own without a name, or None if the system has no such font."""
    if name is None:
        return font_of(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None

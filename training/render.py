"""Vector art, glyphs and images to RGBA at one size."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg_py
from fontTools.pens.boundsPen import BoundsPen
from fontTools.pens.svgPathPen import SVGPathPen
from fontTools.ttLib import TTFont
from PIL import Image

__all__ = ["encode", "glyph_svgs", "icon_svg", "render_image", "render_svg"]

RGBA = npt.NDArray[np.uint8]


def _fit(image: Image.Image, size: int) -> RGBA:
    """Centre on a transparent square of `size`, keeping the aspect: uint8 [size, size, 4]."""
    image = image.convert("RGBA")
    if image.size != (size, size):
        scale = size / max(image.size)
        shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(shape, Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (size, size))
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    return np.asarray(image)


def render_svg(svg: str, size: int) -> RGBA | None:
    """Render to uint8 [size, size, 4], or None where nothing is visible or the drawing is broken."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)
    except ValueError:
        return None
    pixels = _fit(Image.open(io.BytesIO(png)), size)
    return pixels if int(pixels[..., 3].max()) > 64 else None


def render_image(path: Path, size: int) -> RGBA:
    """Read an image file with transparency: uint8 [size, size, 4]."""
    with Image.open(path) as image:
        return _fit(image, size)


def icon_svg(data: dict[str, Any], name: str) -> str:
    """One icon of an Iconify set as a whole SVG document; `currentColor` becomes black.

    Raises:
        KeyError: the set has neither an icon nor an alias of that name.
    """
    width, height = data.get("width", 16), data.get("height", 16)
    entry = data["icons"].get(name)
    flip = False
    if entry is None:
        alias = data["aliases"][name]
        entry, flip = data["icons"][alias["parent"]], alias.get("hFlip", False)
    width, height = entry.get("width", width), entry.get("height", height)
    left, top = entry.get("left", data.get("left", 0)), entry.get("top", data.get("top", 0))
    body = entry["body"].replace("currentColor", "#000")
    if flip:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )


def glyph_svgs(files: Sequence[Path], code_points: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Outline of each code point that one of the fonts draws, as an SVG with a margin of 4%."""
    seen: set[int] = set()
    for file in files:
        font = TTFont(file)
        table, glyphs = font.getBestCmap(), font.getGlyphSet()
        for code in code_points:
            if code in seen or code not in table:
                continue
            glyph = glyphs[table[code]]
            bounds, pen = BoundsPen(glyphs), SVGPathPen(glyphs)
            glyph.draw(bounds)
            glyph.draw(pen)
            if bounds.bounds is None:
                continue
            seen.add(code)
            left, bottom, right, top = bounds.bounds
            side = 1.08 * max(right - left, top - bottom)
            x, y = (left + right - side) / 2, -(top + bottom + side) / 2
            box = f'viewBox="{x} {y} {side} {side}" width="64" height="64"'
            path = f'<path transform="scale(1 -1)" d="{pen.getCommands()}"/>'
            yield code, f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{path}</svg>'


def encode(pixels: RGBA) -> bytes:
    """WebP of uint8 [S, S, 4]. Colour under full transparency is cleared, which packs better."""
    clean = np.where(pixels[..., 3:] == 0, np.uint8(0), pixels)
    buffer = io.BytesIO()
    Image.fromarray(clean, "RGBA").save(buffer, "WEBP", quality=88, method=4, alpha_quality=90)
    return buffer.getvalue()

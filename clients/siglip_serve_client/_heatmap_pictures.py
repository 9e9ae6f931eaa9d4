"""A labelled grid of heatmaps: the picture, and a panel for each prompt with its score and a colour bar."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeAlias

import cmap
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from siglip_serve_client._explain import Colormap, Explanation

__all__ = ["heatmap_grid"]

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER, _INK, _FAINT = (255, 255, 255), (34, 34, 34), (105, 105, 105)
_MARGIN, _TITLE, _BAR, _TICKS = 14, 46, 12, 58
_LEAST_WIDTH = 180


def heatmap_grid(
    picture: Image.Image, explanation: Explanation, colormap: Colormap = "jet", joint: bool = False
) -> Image.Image:
    """The picture, and the overlay of each prompt, in rows of about equal width and height.

    Args:
        picture: upright.
        explanation: with overlays.
        colormap: of the overlays.
        joint: the overlays share one scale.
    """
    width, height = explanation.overlays[0].size
    scale = max(1.0, _LEAST_WIDTH / width)
    width, height = round(width * scale), round(height * scale)
    cell = (width + _BAR + _TICKS + _MARGIN, height + _TITLE + _MARGIN)
    count = 1 + len(explanation.prompts)
    columns = min(count, max(1, round(math.sqrt(count * cell[1] / cell[0] * 1.6))))
    rows = -(-count // columns)
    sheet = Image.new("RGB", (_MARGIN + columns * cell[0], _MARGIN + rows * cell[1]), _PAPER)
    maps = explanation.patch_maps
    for index in range(count):
        left, top = _MARGIN + index % columns * cell[0], _MARGIN + index // columns * cell[1]
        if index == 0:
            _title(sheet, (left, top), width, "image", f"{picture.width} x {picture.height}")
            sheet.paste(picture.convert("RGB").resize((width, height)), (left, top + _TITLE))
            continue
        prompt, score = explanation.prompts[index - 1], explanation.scores[index - 1]
        _title(sheet, (left, top), width, prompt, f"cosine {score:.3f}")
        sheet.paste(explanation.overlays[index - 1].resize((width, height)), (left, top + _TITLE))
        own = maps if joint else maps[index - 1]
        place = (left + width + 4, top + _TITLE)
        _bar(sheet, place, height, (float(own.min()), float(own.max())), colormap)
    return sheet


def _title(sheet: Image.Image, place: tuple[int, int], width: int, first: str, second: str) -> None:
    draw = ImageDraw.Draw(sheet)
    font = _font(16)
    shown = first
    while len(shown) > 1 and draw.textlength(shown, font) > width + _BAR + _TICKS:
        shown = shown[:-1]
    draw.text(place, shown if shown == first else f"{shown[:-2]}..", _INK, font)
    draw.text((place[0], place[1] + 22), second, _FAINT, _font(13))


def _bar(
    sheet: Image.Image, place: tuple[int, int], height: int, limits: tuple[float, float], colormap: Colormap
) -> None:
    """Colours from the largest value, on top, to the least; 0 is marked where it lies between them."""
    colors = np.rint(cmap.Colormap(colormap).lut(256)[::-1, :3] * 255).astype(np.uint8)
    strip = Image.fromarray(colors[:, None]).resize((_BAR, height), Image.Resampling.BILINEAR)
    sheet.paste(strip, place)
    draw, font = ImageDraw.Draw(sheet), _font(11)
    low, high = limits
    right = place[0] + _BAR + 4
    draw.text((right, place[1]), f"{high:+.4f}", _FAINT, font, anchor="lt")
    draw.text((right, place[1] + height), f"{low:+.4f}", _FAINT, font, anchor="lb")
    if low < 0 < high:
        zero = place[1] + round(height * high / (high - low))
        draw.line((place[0], zero, place[0] + _BAR + 2, zero), _INK)
        if 14 < zero - place[1] < height - 14:
            draw.text((right, zero), "0", _FAINT, font, anchor="lm")


@lru_cache(maxsize=4)
def _font(size: int) -> Font:
    return ImageFont.load_default(size)

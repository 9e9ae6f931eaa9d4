"""Maps over a picture from maps on a patch grid, and overlays to look at.

The picture is the upright one, with its EXIF orientation applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cmap
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "COLORMAPS",
    "MOST_SIDE",
    "MOST_VALUES",
    "NORMALIZATIONS",
    "Normalization",
    "View",
    "color_scale",
    "default_size",
    "normalize",
    "overlay",
]

Maps = NDArray[np.float32]
Normalization = Literal["none", "prompt", "joint"]

NORMALIZATIONS: tuple[Normalization, ...] = ("none", "prompt", "joint")
# The first one is the default. Readers who cannot tell red from green can read all but jet.
COLORMAPS = ("bwr", "jet", "viridis", "cividis")
# Blue speaks against a prompt and red for it; 0 is white.
_DIVERGING = frozenset({"bwr"})
MOST_VALUES = 2**24  # of all maps of a request: 64 MiB
MOST_SIDE = 8192  # of a map: weights of each patch for each pixel of a side lie in memory
_DEFAULT_SIDE = 512
# A map that varies less over its picture than float32 resolves is level: it must not be scaled up to 0 to 1.
_LEAST_RANGE = 1e-6
_LEVELS = 255  # of a palette: an odd number, so that the middle has a level of its own


@dataclass(frozen=True)
class View:
    """The part of a picture that a tower sees.

    Attributes:
        width, height: of the upright picture, in pixels.
        box: left, top, right, bottom of the part that the tower is shown, in these pixels.
        covered: the share of its sides that whole patches cover, from the top left corner. 1 if they fit.
    """

    width: int
    height: int
    box: tuple[float, float, float, float]
    covered: float = 1.0

    def place(self, maps: Maps, height: int, width: int) -> Maps:
        """Maps [P, G, G] -> float32 [P, height, width] over the whole picture, bilinear, 0 where unseen."""
        left, top, right, bottom = self.box
        rows = _weights(self.height, (top, bottom), maps.shape[1], height, self.covered)
        columns = _weights(self.width, (left, right), maps.shape[2], width, self.covered)
        return np.asarray(rows @ maps @ columns.T, dtype=np.float32)

    def seen(self, height: int, width: int) -> NDArray[np.bool_]:
        """Mask, bool [height, width], of the pixels that the tower was shown."""
        left, top, right, bottom = self.box
        rows, columns = _centers(self.height, height), _centers(self.width, width)
        inside = ((top <= rows) & (rows <= bottom))[:, None] & (left <= columns) & (columns <= right)
        return np.asarray(inside)


def default_size(view: View, prompts: int) -> tuple[int, int]:
    """Default height and width of maps: the picture's own, or smaller for large pictures and many prompts."""
    pixels = view.width * view.height
    scale = min(1.0, _DEFAULT_SIDE / max(view.width, view.height), (MOST_VALUES / prompts / pixels) ** 0.5)
    height, width = (max(1, round(side * scale)) for side in (view.height, view.width))
    if prompts * height * width > MOST_VALUES:  # only by rounding up
        height, width = (max(1, int(side * scale)) for side in (view.height, view.width))
    return height, width


def normalize(maps: Maps, how: Normalization) -> Maps:
    """Scale maps [P, ...] so that the least value is 0 and the largest 1.

    Args:
        maps: float32, of one request.
        how: `prompt` scales each map alone. `joint` scales all of them alike. `none` leaves them.
    """
    if how == "none":
        return maps
    axes = tuple(range(0 if how == "joint" else 1, maps.ndim))
    low, high = maps.min(axis=axes, keepdims=True), maps.max(axis=axes, keepdims=True)
    return np.asarray((maps - low) / np.maximum(high - low, _LEAST_RANGE), dtype=np.float32)


def color_scale(maps: Maps, how: Normalization, colormap: str = COLORMAPS[0]) -> Maps:
    """Scale maps [P, ...] to places 0 to 1 in a colormap.

    In a diverging colormap 0 is in the middle, at 0.5, and both ends are equally far from it. In another
    one the scale runs from the least value to the largest.

    Args:
        maps: of one request, positive where the image speaks for a prompt and negative where against it.
        how: `prompt` gives each map its own scale. `joint` and `none` give all maps one scale.
        colormap: one of `COLORMAPS`.
    """
    if colormap not in _DIVERGING:
        return normalize(maps, "prompt" if how == "prompt" else "joint")
    axes = tuple(range(1 if how == "prompt" else 0, maps.ndim))
    most = np.maximum(np.abs(maps).max(axis=axes, keepdims=True), _LEAST_RANGE)
    return np.asarray(0.5 + maps / (2 * most), dtype=np.float32)


def overlay(
    picture: Image.Image,
    heat: NDArray[np.float32],
    seen: NDArray[np.bool_],
    colormap: str = COLORMAPS[0],
    opacity: float = 0.5,
) -> Image.Image:
    """Lay a map over its picture.

    Under a diverging colormap the picture loses its own colours, all of them from an opacity of 0.5 on.
    A red guitar would otherwise look like a place that speaks for the prompt.

    Args:
        picture: upright. It is scaled to the map.
        heat: [H, W] float32, 0 to 1, as from `color_scale`.
        seen: [H, W]. Where it is not set, the picture shows through.
        colormap: one of `COLORMAPS`.
        opacity: 0 to 1, of the map.
    """
    height, width = heat.shape
    ground = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    colors = Image.fromarray(np.clip(np.rint(heat * (_LEVELS - 1)), 0, _LEVELS - 1).astype(np.uint8))
    colors.putpalette(_palette(colormap))
    under = ground
    if colormap in _DIVERGING:
        under = Image.blend(ground, ground.convert("L").convert("RGB"), min(1.0, 2 * opacity))
    mixed = Image.blend(under, colors.convert("RGB"), opacity)
    if seen.all():
        return mixed
    return Image.composite(mixed, ground, Image.fromarray(seen.astype(np.uint8) * 255))


@lru_cache(maxsize=len(COLORMAPS))
def _palette(colormap: str) -> bytes:
    """Red, green and blue of each level, 0 to 255, one after the other."""
    return np.rint(cmap.Colormap(colormap).lut(_LEVELS)[:, :3] * 255).astype(np.uint8).tobytes()


def _centers(side: int, count: int) -> NDArray[np.float64]:
    """Centres of `count` pixels on a side of `side` pixels."""
    return np.asarray((np.arange(count) + 0.5) * side / count)


def _weights(
    side: int, shown: tuple[float, float], patches: int, count: int, covered: float
) -> NDArray[np.float32]:
    """Weights [count, patches] of patches for pixels along one side. Rows sum to 1, or to 0 if unseen."""
    at = (_centers(side, count) - shown[0]) / (shown[1] - shown[0])  # 0 to 1 over the part that was shown
    cell = np.clip(at / covered * patches - 0.5, 0, patches - 1)
    first = np.minimum(cell.astype(np.intp), max(patches - 2, 0))
    weights = np.zeros((count, patches), dtype=np.float32)
    rows = np.arange(count)
    weights[rows, first] = 1 - (cell - first)
    if patches > 1:
        weights[rows, first + 1] = cell - first
    weights[(at < 0) | (at > 1)] = 0
    return weights

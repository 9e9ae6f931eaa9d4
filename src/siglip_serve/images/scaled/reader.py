"""Plain JPEGs at an eighth, a quarter or half of their size, where the resize has pixels to spare.

Each sample is the mean of the pixels that it stands for, of what their block's lowest frequencies hold. What
such a mean weakens is then made stronger again.
Files that are not plain (progressive, CMYK, damaged), and those that would become too small, are left to
others.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve.errors import SettingsError
from siglip_serve.images.jpeg import PlainScan, plain_scan
from siglip_serve.images.resize import Extent, Pixels
from siglip_serve.images.scaled import kernels

__all__ = ["Scaled", "read_scaled", "scaled_side", "warm_up"]

# Scaled pixels per pixel of the result, along either axis and in all. Fewer would show: see
# docs/preprocessing.md.
_LEAST_RATIO, _LEAST_PIXELS = 1.2, 1.5**2
_BLOCK = 8  # pixels per side
_SIDES = (1, 2, 4)  # samples per side of a block
_MOST_CHROMA = 4
_TABLES_KEPT = 16  # sets of up to 1.2 MB


class Scaled(NamedTuple):
    """A picture as it is stored, at a fraction of its size.

    Attributes:
        pixels: uint8 RGB `[h, w, 3]`.
        extent: height and width of the picture in these pixels, of which the last may be padding in part.
    """

    pixels: Pixels
    extent: Extent


def scaled_side(size: tuple[int, int], target: tuple[int, int]) -> int | None:
    """Find how many samples of 8 are enough for a resize from one height and width to another.

    Returns:
        1, 2 or 4, or None if even 4 are too few.
    """
    for side in _SIDES:
        down, across = (side * own / _BLOCK / wanted for own, wanted in zip(size, target, strict=True))
        if min(down, across) >= _LEAST_RATIO and down * across >= _LEAST_PIXELS:
            return side
    return None


def read_scaled(data: bytes, scan: PlainScan, side: int) -> Scaled | None:
    """Decode a JPEG to `side` pixels of each 8, or None if its image data are damaged.

    Safe to call from several threads.

    Args:
        data: the file.
        scan: its segments.
        side: 1, 2 or 4.
    """
    height, width, _ = scan.frame
    across, down = scan.sampling[0]
    mcus = -(-height // (_BLOCK * down)), -(-width // (_BLOCK * across))
    layout, tables, room = _lay_out(scan, mcus, side)
    joined = np.empty(len(data) - scan.start + kernels.MARGIN, np.uint8)
    ends = np.empty(scan.restarts + 1, np.int64)
    if not kernels.join_segments(np.frombuffer(data, np.uint8), scan.start, joined, ends):
        return None
    coefficients = np.zeros(room[0], np.int16)
    count = mcus[0] * mcus[1]
    if not kernels.read_scan(joined, ends, count, scan.interval or count, layout, tables, coefficients):
        return None
    planes = np.empty(room[1], np.uint8)
    for row, factors in zip(layout, scan.quantization, strict=True):
        basis = _basis(int(row[kernels.SIDE]))
        scales = np.frombuffer(factors, np.uint8).astype(np.float32)
        kernels.put_plane(coefficients, mcus, row, scales, basis, planes)
    pixels = np.empty((-(-height * side // _BLOCK), -(-width * side // _BLOCK), 3), np.uint8)
    samples = layout[:, [kernels.DOWN, kernels.ACROSS]] * layout[:, [kernels.SIDE]]  # of an MCU
    down, across = (2 * samples[-1] // samples[0]).tolist()
    kernels.to_rgb(planes, layout, (down, across), pixels)
    return Scaled(pixels, (height * side / _BLOCK, width * side / _BLOCK))


def warm_up() -> None:
    """Compile the kernels, or load them if an earlier start has."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "JPEG")
    scan = plain_scan(file.getvalue())
    if scan is None or read_scaled(file.getvalue(), scan, 1) is None:
        raise SettingsError("preprocess scaled: Numba's code does not read a JPEG that Pillow has written")


def _lay_out(
    scan: PlainScan, mcus: tuple[int, int], side: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], tuple[int, int]]:
    """Places of all parts in memory, the tables, and the numbers of coefficients and of samples."""
    starts, tables = _join_tables(scan.dc, scan.ac)
    layout = np.zeros((len(scan.sampling), 12), np.uint64)
    coefficients = samples = 0
    halved = scan.sampling[0][0] == 2
    for index, (across, down) in enumerate(scan.sampling):
        # Colour of half the size has the picture's size if its blocks give twice as many samples.
        own = min(2 * side, _MOST_CHROMA) if halved and index else side
        pitch = mcus[1] * across * own
        last = {1: 0, 2: 4, 4: 24}[own]  # the last of the own x own lowest frequencies
        layout[index] = (across, down, own, last, *starts[index], coefficients, samples, pitch)
        coefficients += mcus[0] * mcus[1] * across * down * (own * own + 1)
        samples += mcus[0] * down * own * pitch
    return layout, tables, (coefficients, samples)


@lru_cache(_TABLES_KEPT)
def _join_tables(
    dc: tuple[bytes, ...], ac: tuple[bytes, ...]
) -> tuple[list[tuple[int, ...]], NDArray[np.uint32]]:
    """All tables in one array, and where each component's own begin in it, as columns of the layout."""
    joined: list[NDArray[np.uint32]] = []
    begun: dict[tuple[str, bytes], tuple[int, ...]] = {}
    size = 0
    for kind, codes in [*(("dc", own) for own in dc), *(("ac", own) for own in ac)]:
        if (kind, codes) in begun:
            continue
        whole = kernels.symbols(np.frombuffer(codes, np.uint8))
        parts = [kernels.shorten(whole), whole, *([kernels.skips(whole)] if kind == "ac" else [])]
        begun[kind, codes] = tuple(size + sum(map(len, parts[:index])) for index in range(len(parts)))
        size += sum(map(len, parts))
        joined += parts
    starts = [(*begun["dc", first], *begun["ac", rest]) for first, rest in zip(dc, ac, strict=True)]
    return starts, np.concatenate(joined)


@lru_cache
def _basis(side: int) -> NDArray[np.float32]:
    """[side, side]: mean of each of the lowest frequencies of a block over each of `side` parts of it."""
    places, frequencies = np.arange(_BLOCK)[:, None], np.arange(side)
    waves = np.cos((2 * places + 1) * frequencies * np.pi / (2 * _BLOCK)) * np.sqrt(2 / _BLOCK)
    waves[:, 0] /= np.sqrt(2)
    return waves.reshape(side, _BLOCK // side, side).mean(1).astype(np.float32)

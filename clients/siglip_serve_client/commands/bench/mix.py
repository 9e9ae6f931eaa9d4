"""The mix of a load: models and pictures by weight, and the times of requests."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
from PIL import Image

from siglip_serve_client.commands.bench import BenchError
from siglip_serve_client.commands.embed.sources import Sources

__all__ = ["parse_models", "parse_sizes", "photograph", "pictures", "poisson_times"]

_MOST_PIXELS = 16384  # of one side
_A_SIZE = 4  # different pictures of each size


def parse_models(text: str) -> list[tuple[str, float]]:
    """Models and their weights, from `embed_image` or `embed_image:8,embed_text:1`.

    Raises:
        BenchError: if the text has another form.
    """
    return [_weighted(part, "a model, or MODEL:WEIGHT") for part in text.split(",")]


def parse_sizes(text: str) -> list[tuple[tuple[int, int], float]]:
    """Sizes (width, height in pixels) and their weights, from `64x128:2,500x375:6`.

    Raises:
        BenchError: if the text has another form, or a side is not in 1 to 16,384.
    """
    sizes = []
    for part in text.split(","):
        size, weight = _weighted(part, "WIDTHxHEIGHT, or WIDTHxHEIGHT:WEIGHT")
        width, _, height = size.partition("x")
        if not (_is_side(width) and _is_side(height)):
            raise BenchError(f"{part!r}: expected WIDTHxHEIGHT, or WIDTHxHEIGHT:WEIGHT, sides 1 to 16,384")
        sizes.append(((int(width), int(height)), weight))
    return sizes


def pictures(sizes: str, images: Sequence[str] = ()) -> list[tuple[bytes, float]]:
    """Encoded pictures and their weights: files as `siglip-serve embed` takes them, else drawn ones.

    Raises:
        BenchError: if the sizes cannot be read, or there is no image.
        SourcesError: if an argument names no file.
        OSError: if a file cannot be read.
    """
    if images:
        found = [(item.read(), 1.0) for item in Sources(images)]
        if not found:
            raise BenchError(f"{', '.join(images)}: no images")
        return found
    return [
        (photograph(width, height, seed), weight / _A_SIZE)
        for (width, height), weight in parse_sizes(sizes)
        for seed in range(_A_SIZE)
    ]


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG that costs about as much to send and decode as a photograph: patches, edges and grain."""
    rng = np.random.default_rng([width, height, seed])
    whole = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 0.6), (12, 0.3), (48, 0.1)):  # from large patches to small ones
        patch = rng.integers(0, 256, (min(cells, height), min(cells, width), 3), np.uint8)
        smooth = Image.fromarray(patch).resize((width, height), Image.Resampling.BICUBIC)
        whole += strength * np.asarray(smooth, np.float32)
    shade = np.add.outer(np.linspace(-2, 3, height), np.linspace(-3, 4, width)) > rng.uniform(-1, 1)
    whole -= 45 * shade[..., None]
    whole += rng.standard_normal((height, width, 1), np.float32) * 6
    file = io.BytesIO()
    Image.fromarray(np.clip(whole, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def poisson_times(rate: float, rng: Random) -> Iterator[float]:
    """Endless times, in seconds from the start, at which requests are due: Poisson arrivals.

    They depend only on `rate` (requests/s) and the draw, so a slow answer does not move them.
    Several such streams together are Poisson arrivals of the sum of their rates.
    """
    due = 0.0
    while True:
        due += rng.expovariate(rate)
        yield due


def _weighted(part: str, expected: str) -> tuple[str, float]:
    name, separator, given = part.strip().partition(":")
    try:
        weight = float(given) if separator else 1.0
    except ValueError:
        weight = 0.0
    if not name or not 0 < weight < float("inf"):
        raise BenchError(f"{part.strip()!r}: expected {expected}, weights above 0")
    return name, weight


def _is_side(text: str) -> bool:
    return text.isdecimal() and 1 <= int(text) <= _MOST_PIXELS

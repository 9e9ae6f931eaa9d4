"""Parts that `benchmarks.naflex` measures on every device: widths, ways, and the turns that they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.inputs import GEOMETRIES
from siglip_serve.engine.groups import group_rows

__all__ = ["MOST", "PATCH", "SIDE", "WIDTHS", "Outcome", "Setup", "Way", "aspects", "padding", "take_turns"]

SIDE, PATCH = 256, 16
MOST = (SIDE // PATCH) ** 2


def _width_of(geometry: str) -> dict[str, int]:
    sizes = ("image_size", "patch_size")
    return {name: value for name, value in GEOMETRIES[geometry].items() if name not in sizes}


WIDTHS: dict[str, dict[str, int]] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "base": _width_of("base/16@224"),
    "so400m": _width_of("so400m/14@384"),
}


@dataclass(frozen=True)
class Way:
    """One way to embed the pictures.

    Attributes:
        tower: `naflex`, or `square` for SigLIP of the same width, which stretches pictures to a square.
        backend: one of the engine's, or `transformers`.
        dtype: its arithmetic.
        embed: embeddings of the pictures of a slice, float32, not normalised.
        padding: share of the computed tokens that is padding.
        device_seconds: measures the seconds per picture on the device alone, or None.
    """

    tower: str
    backend: str
    dtype: str
    embed: Callable[[slice], NDArray[np.float32]]
    padding: float = 0.0
    device_seconds: Callable[[], float] | None = None


@dataclass(frozen=True)
class Setup:
    """Ways to measure. The first of each tower is in float32, and is the reference of the others.

    Attributes:
        text_cosine: smallest cosine of the texts' embeddings to transformers', or None if not measured.
    """

    ways: Sequence[Way]
    text_cosine: float | None = None


@dataclass
class Outcome:
    """Totals of a way over all turns, and its embeddings of all pictures, [N, D]."""

    wall: float
    cpu: float
    embeddings: NDArray[np.float32]


def aspects(count: int, largest: float) -> list[float]:
    """Aspect ratios from 1:largest to largest:1, in an order without a pattern."""
    found = np.exp(np.linspace(-np.log(largest), np.log(largest), count))
    np.random.default_rng(0).shuffle(found)
    return list(found.tolist())


def padding(counts: NDArray[np.int64], batch: int, most: int) -> float:
    """Share of the computed tokens that is padding, in batches that are divided into passes."""
    parts = [counts[first : first + batch] for first in range(0, len(counts), batch)]
    computed = sum(len(group) * int(part[group].max()) for part in parts for group in group_rows(part, most))
    return 1 - float(counts.sum()) / computed


def take_turns(ways: Sequence[Way], count: int, batch: int, seconds: float) -> tuple[list[Outcome], int]:
    """Embed all pictures in batches, the ways alternating, until `seconds` have passed, at least once.

    Returns:
        The outcome of each way, and the number of rounds.
    """
    for way in ways:
        way.embed(slice(0, min(batch, count)))
    totals = [[0.0, 0.0] for _ in ways]
    found: list[list[NDArray[np.float32]]] = [[] for _ in ways]
    rounds, until = 0, time.perf_counter() + seconds
    while not rounds or time.perf_counter() < until:
        for first in range(0, count, batch):
            for way, total, parts in zip(ways, totals, found, strict=True):
                wall, cpu = time.perf_counter(), time.process_time()
                part = way.embed(slice(first, first + batch))
                total[0] += time.perf_counter() - wall
                total[1] += time.process_time() - cpu
                if not rounds:
                    parts.append(part)
        rounds += 1
    return [
        Outcome(wall, cpu, np.concatenate(parts)) for (wall, cpu), parts in zip(totals, found, strict=True)
    ], rounds

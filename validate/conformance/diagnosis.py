"""The recipe that explains a server's vectors best: the right one, or one with faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from validate.conformance.recipes import Fault, Recipe, with_fault

__all__ = ["Diagnosis", "cosines", "diagnose"]

Floats = NDArray[np.float32]
Embed = Callable[[Recipe], Floats]
_GAIN = 0.5  # share of the distance that a fault must explain of the inputs that it concerns


@dataclass(frozen=True)
class Diagnosis:
    """The best explanation of the vectors of some inputs.

    Attributes:
        names: of the inputs.
        faults: those that together explain the most inputs. Empty for a server that is right.
        reference: cosine of each vector to the right one.
        explained: cosine of each vector to the one that the faults give.
        alternatives: cosine of the right vectors to those with each single fault.
    """

    names: Sequence[str]
    recipe: Recipe
    faults: Sequence[Fault]
    reference: NDArray[np.float64]
    explained: NDArray[np.float64]
    alternatives: Mapping[Fault, NDArray[np.float64]]


def cosines(left: Floats, right: Floats) -> NDArray[np.float64]:
    """Cosine of each row with the same row of the other array. Rows of zeros have the cosine 0."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.float64] = (a * b).sum(1) / np.maximum(lengths, 1e-30)
    return found


def diagnose(
    names: Sequence[str], rows: Floats, right: Recipe, faults: Sequence[Fault], embed: Embed, tolerance: float
) -> Diagnosis:
    """Search for the faults that explain the rows.

    Faults are added one by one, each time the one that explains the most further inputs. They concern
    different steps, so that several of them add up.

    Args:
        names: of the inputs.
        rows: the server's vectors [N, D].
        embed: a recipe's vectors [N, D] of the same inputs.
        tolerance: smallest cosine at which a vector counts as explained.
    """
    reference = embed(right)
    alternatives = {fault: cosines(reference, embed(with_fault(right, fault))) for fault in faults}
    found: list[Fault] = []
    recipe = right
    while not (cosines(rows, embed(recipe)) >= tolerance).all():
        free = [fault for fault in faults if all(fault.field != other.field for other in found)]
        best = _best(rows, recipe, free, embed, tolerance)
        if best is None:
            break
        found.append(best)
        recipe = with_fault(recipe, best)
    found = _needed(rows, right, found, embed, tolerance)
    recipe = _of(right, found)
    return Diagnosis(
        names, recipe, found, cosines(rows, reference), cosines(rows, embed(recipe)), alternatives
    )


def _best(
    rows: Floats, recipe: Recipe, faults: Sequence[Fault], embed: Embed, tolerance: float
) -> Fault | None:
    """The fault that explains most, or None if none explains much more than the recipe does."""
    now, vectors = cosines(rows, embed(recipe)), embed(recipe)
    best, most = None, ((now >= tolerance).sum(), now.mean() + 0.01)
    for fault in faults:
        changed = embed(with_fault(recipe, fault))
        then = cosines(rows, changed)
        concerned = cosines(vectors, changed) < tolerance
        if not concerned.any() or (1 - then[concerned]).mean() > _GAIN * (1 - now[concerned]).mean():
            continue
        score = ((then >= tolerance).sum(), then.mean())
        if score > most:
            best, most = fault, score
    return best


def _needed(
    rows: Floats, right: Recipe, found: Sequence[Fault], embed: Embed, tolerance: float
) -> list[Fault]:
    """The faults without those that explain no input."""
    kept = list(found)
    for fault in found:
        without = [other for other in kept if other is not fault]
        counts = [(cosines(rows, embed(_of(right, faults))) >= tolerance).sum() for faults in (kept, without)]
        if counts[1] >= counts[0]:
            kept = without
    return kept


def _of(right: Recipe, faults: Sequence[Fault]) -> Recipe:
    for fault in faults:
        right = with_fault(right, fault)
    return right

"""Verdicts on a server's answers, each with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from validate.conformance.answers import Answers, Refusal
from validate.conformance.diagnosis import Diagnosis, cosines
from validate.conformance.inputs import EMPTY
from validate.conformance.recipes import Fault, Recipe, TextRecipe

__all__ = [
    "Status",
    "Verdict",
    "answered",
    "batched",
    "empty_text",
    "judged",
    "lengths",
    "precision",
    "unexplained",
]

Status = Literal["ok", "fault", "unseen"]
Floats = NDArray[np.float32]
_CUT = ("too long", EMPTY)  # a server may refuse these texts
_CLOSE = 0.02  # relative difference of lengths
_NOT_SAME = 1e-6  # distance from which two vectors of the same input are not of float32's precision


@dataclass(frozen=True)
class Verdict:
    """An answer to one question.

    Attributes:
        kind: `text` or `picture`.
        status: `unseen` if the answers or the checkpoint cannot tell.
        reference: smallest cosine to the right vectors of the inputs concerned, None without such.
        explained: smallest cosine to the vectors that the fault gives.
    """

    kind: str
    check: str
    status: Status
    evidence: str
    reference: float | None = None
    explained: float | None = None


def judged(kind: str, found: Diagnosis, faults: Sequence[Fault], tolerance: float) -> list[Verdict]:
    """A verdict for each check that the faults belong to."""
    checks = dict.fromkeys(fault.check for fault in faults)
    return [
        _judged(kind, check, found, [fault for fault in faults if fault.check == check], tolerance)
        for check in checks
    ]


def _judged(kind: str, check: str, found: Diagnosis, faults: Sequence[Fault], tolerance: float) -> Verdict:
    planted = [fault for fault in found.faults if fault.check == check]
    if planted:
        fault = planted[0]
        wrong = found.reference < tolerance
        concerned = wrong & (found.alternatives[fault] < tolerance) & (found.explained >= tolerance)
        concerned = concerned if concerned.any() else wrong
        names = _names(found.names, concerned)
        before, after = found.reference[concerned].min(), found.explained[concerned].min()
        evidence = f"{fault.told}: cosine {after:.4f}, to the reference {before:.4f} ({names})"
        return Verdict(kind, check, "fault", evidence, float(before), float(after))
    right = found.explained >= tolerance
    told = {fault: (found.alternatives[fault] < tolerance) & right for fault in faults}
    seen = {fault: places for fault, places in told.items() if places.any()}
    if not seen:
        evidence = "no answered input tells a fault apart" if len(found.names) else "no input was answered"
        return Verdict(kind, check, "unseen", evidence)
    places = np.logical_or.reduce(list(seen.values()))
    nearest = max(seen, key=lambda fault: found.alternatives[fault][seen[fault]].min())
    other = found.alternatives[nearest][seen[nearest]].min()
    smallest = float(found.explained[places].min())
    evidence = f"cosine {smallest:.6f} on {places.sum()} inputs; if {nearest.told}: {other:.4f}"
    return Verdict(kind, check, "ok", evidence, smallest)


def unexplained(kind: str, found: Diagnosis, tolerance: float) -> Verdict:
    """A verdict on the inputs that no known fault explains."""
    left = found.explained < tolerance
    if not len(found.names):
        return Verdict(kind, "vectors", "unseen", "no input was answered")
    if not left.any():
        return Verdict(kind, "vectors", "ok", f"all {len(left)} are explained", float(found.explained.min()))
    told = ", ".join(
        f"{name} {value:.4f}"
        for name, value in zip(found.names, found.explained, strict=True)
        if value < tolerance
    )
    smallest = float(found.explained.min())
    return Verdict(kind, "vectors", "fault", f"no known fault explains: {told}", smallest, smallest)


def answered(kind: str, answers: Answers) -> list[Verdict]:
    """A verdict on inputs that were refused, and for texts one on the empty text."""
    refused = {
        name: refusal
        for name, refusal in answers.refused.items()
        if name != EMPTY and not (name in _CUT and refusal.invalid)
    }
    told = "; ".join(f"{name}: {refusal.message}" for name, refusal in refused.items())
    allowed = [name for name in answers.refused if name not in refused and name != EMPTY]
    well = f"{len(answers.alone)} of {len(answers.inputs)} inputs have vectors"
    well += f", refused as it may be: {', '.join(allowed)}" if allowed else ""
    return [Verdict(kind, "answers", "fault" if refused else "ok", told or well)]


def empty_text(answers: Answers, right: Floats, tolerance: float) -> Verdict:
    """A verdict on the empty text, which may be refused. `right` is its vector [D] by the recipe found."""
    refusal = answers.refused.get(EMPTY)
    if refusal:
        return Verdict("text", EMPTY, "ok" if refusal.invalid else "fault", f"refused: {refusal.message}")
    found = float(cosines(answers.alone[EMPTY][None], right[None])[0])
    return Verdict("text", EMPTY, "ok" if found >= tolerance else "fault", f"cosine {found:.6f}", found)


def batched(
    kind: str, how: str, answers: Answers, tolerance: float, embed: Callable[[Recipe], Floats], recipe: Recipe
) -> Verdict:
    """A verdict on answers in one request, or at the same time, against those one by one.

    Args:
        how: `batch` or `together`.
        embed: the vectors [N, D] of the inputs in one request by a recipe.
    """
    names = [name for name in answers.names if name != EMPTY]
    rows: Floats | Refusal | None = getattr(answers, how)
    if rows is None:
        return Verdict(kind, how, "unseen", "the API has one input per request" if names else "no answers")
    if isinstance(rows, Refusal):
        return Verdict(kind, how, "fault", rows.message)
    alone = np.stack([answers.alone[name] for name in names])
    same = cosines(rows, alone)
    if (same >= tolerance).all():
        return Verdict(
            kind, how, "ok", f"cosine {same.min():.6f} to the vectors one by one", float(same.min())
        )
    moved = []
    for place in np.flatnonzero(same < tolerance):
        likeness = cosines(np.broadcast_to(rows[place], alone.shape), alone)
        if likeness.max() >= tolerance:
            moved.append(f"{names[place]} has that of {names[int(likeness.argmax())]}")
    if moved:
        return Verdict(kind, how, "fault", f"rows are mixed up: {', '.join(moved)}", float(same.min()))
    told = f"vectors depend on the other inputs: cosine {same.min():.4f} to those one by one"
    if isinstance(recipe, TextRecipe) and how == "batch":
        fit = float(cosines(rows, embed(recipe)).min())
        if recipe.padding == "longest" and fit >= tolerance:
            told += f", {fit:.4f} to texts padded to the longest of the request"
    return Verdict(kind, how, "fault", f"{told} ({_names(names, same < tolerance)})", float(same.min()))


def lengths(pairs: Mapping[str, tuple[Floats, Floats]]) -> Verdict:
    """A verdict on the lengths of all vectors: 1, or those of the towers, and not a mixture.

    Args:
        pairs: vectors [N, D] of each kind: the server's, and those of the recipe found, not normalised.
    """
    found = {}
    for kind, (rows, vectors) in pairs.items():
        sizes, own = (np.linalg.norm(side, axis=1) for side in (rows, vectors))
        if (np.abs(sizes - 1) < _CLOSE / 10).all():
            found[kind] = "1"
        elif (np.abs(sizes / own - 1) < _CLOSE).all():
            found[kind] = "those of the tower"
        else:
            found[kind] = f"{sizes.min():.4g} to {sizes.max():.4g}"
    told = ", ".join(f"{kind}: {value}" for kind, value in found.items())
    if not found:
        return Verdict("both", "length", "unseen", "no vectors to compare")
    well = len(set(found.values())) == 1 and set(found.values()) <= {"1", "those of the tower"}
    return Verdict("both", "length", "ok" if well else "fault", told)


def precision(kind: str, answers: Answers, found: Diagnosis, vectors: Floats, tolerance: float) -> Verdict:
    """A verdict on the precision of the vectors that are explained by `vectors`, those of the recipe."""
    places = np.flatnonzero(found.explained >= tolerance)
    if not len(places):
        return Verdict(kind, "precision", "unseen", "no vector is explained")
    rows = np.stack([answers.alone[found.names[place]] for place in places])
    pairs = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (rows, vectors[places])]
    most, smallest = float(np.abs(pairs[0] - pairs[1]).max()), float(found.explained[places].min())
    told = "float32" if 1 - smallest < _NOT_SAME else "less than float32, or other pixels"
    evidence = f"{told}: cosine {smallest:.7f}, largest difference of a value {most:.1e}"
    return Verdict(kind, "precision", "ok", evidence, smallest)


def _names(names: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    picked = [name for name, one in zip(names, chosen, strict=True) if one]
    return ", ".join(picked[:3]) + (f" and {len(picked) - 3} more" if len(picked) > 3 else "")

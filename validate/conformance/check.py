"""All questions to one server: ask, explain the answers, and judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from validate.conformance import verdicts
from validate.conformance.answers import Answers, ask_pictures, ask_texts
from validate.conformance.diagnosis import Diagnosis, diagnose
from validate.conformance.dialects import Endpoint
from validate.conformance.inputs import EMPTY
from validate.conformance.recipes import (
    IMAGE_FAULTS,
    TEXT_FAULTS,
    Fault,
    ImageRecipe,
    Recipe,
    TextRecipe,
)
from validate.conformance.towers import Towers
from validate.conformance.verdicts import Verdict

__all__ = ["check_server", "faults_of"]

Floats = NDArray[np.float32]


def faults_of(clip: bool) -> tuple[list[Fault], list[Fault]]:
    """The faults of texts and of pictures that a family of checkpoints can have."""
    texts = [fault for fault in TEXT_FAULTS if not (clip and fault.check in ("pooling", "padding mask"))]
    own = "cropped" if clip else "stretched"
    return texts, [fault for fault in IMAGE_FAULTS if fault.value != own]


def check_server(
    endpoint: Endpoint, towers: Towers, tolerance: float, only: Sequence[str] = ("text", "picture")
) -> list[Verdict]:
    """Ask a server, and judge its answers by the towers of its checkpoint.

    Args:
        tolerance: smallest cosine at which two vectors are equal.
        only: kinds of inputs that are sent.

    Raises:
        UnreachableError: no server answers.
    """
    texts, pictures = faults_of(towers.clip)
    kinds = []
    if "text" in only:
        kinds.append(_Kind("text", ask_texts(endpoint), TextRecipe(), texts, towers))
    if "picture" in only:
        kinds.append(_Kind("picture", ask_pictures(endpoint), ImageRecipe(), pictures, towers))
    found: list[Verdict] = []
    pairs: dict[str, tuple[Floats, Floats]] = {}
    for kind in kinds:
        found += verdicts.answered(kind.name, kind.answers)
        if kind.names:
            rows, vectors = _judge(kind, tolerance)
            found += rows
            if vectors is not None:
                pairs[kind.name] = vectors
    return [*found, verdicts.lengths(pairs)]


def _judge(kind: _Kind, tolerance: float) -> tuple[list[Verdict], tuple[Floats, Floats] | None]:
    """The verdicts on one kind of inputs, and its vectors: the server's, and those of the recipe found."""
    answers, names = kind.answers, kind.names
    rows = np.stack([answers.alone[name] for name in names])
    right = kind.embed(kind.right)
    if rows.shape != right.shape:
        told = f"vectors have {rows.shape[1]} values, those of the checkpoint {right.shape[1]}"
        return [Verdict(kind.name, "vectors", "fault", told)], None
    found = diagnose(names, rows, kind.right, kind.faults, kind.embed, tolerance)
    vectors = kind.embed(found.recipe)
    given = [
        verdicts.unexplained(kind.name, found, tolerance),
        *verdicts.judged(kind.name, found, kind.faults, tolerance),
        *_empty(kind, found, tolerance),
        *(
            verdicts.batched(kind.name, how, answers, tolerance, kind.together, found.recipe)
            for how in ("batch", "together")
        ),
        verdicts.precision(kind.name, answers, found, vectors, tolerance),
    ]
    return given, (rows, vectors)


def _empty(kind: _Kind, found: Diagnosis, tolerance: float) -> list[Verdict]:
    """A verdict on the empty text, if the vectors of other texts are explained."""
    if not isinstance(found.recipe, TextRecipe) or not (found.explained >= tolerance).any():
        return []
    return [verdicts.empty_text(kind.answers, kind.towers.vectors(found.recipe, [[""]])[0], tolerance)]


@dataclass(frozen=True)
class _Kind:
    """Texts or pictures: their answers, and the towers that they are compared with."""

    name: str
    answers: Answers
    right: Recipe
    faults: Sequence[Fault]
    towers: Towers

    @property
    def names(self) -> list[str]:
        """The inputs that were answered, without the empty text, which has its own verdict."""
        return [name for name in self.answers.names if name != EMPTY]

    def embed(self, recipe: Recipe) -> Floats:
        """The vectors [N, D] of these inputs, each in a request of its own."""
        return self.towers.vectors(recipe, [[self.answers.inputs[name]] for name in self.names])

    def together(self, recipe: Recipe) -> Floats:
        """The vectors [N, D] of these inputs in one request."""
        return self.towers.vectors(recipe, [[self.answers.inputs[name] for name in self.names]])

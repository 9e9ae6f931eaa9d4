"""A server's answers to the probes: one by one, in one request, and in requests at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from validate.conformance.dialects import Endpoint, UnreachableError
from validate.conformance.inputs import EMPTY, TEXTS, Picture, pictures
from validate.errors import RefusedError, ServerError

__all__ = ["Answers", "Refusal", "ask_pictures", "ask_texts"]

Floats = NDArray[np.float32]
Input = TypeVar("Input")
_AT_ONCE = 8


@dataclass(frozen=True)
class Refusal:
    """An answer without vectors.

    Attributes:
        invalid: the server calls the input invalid, with a status of 4xx.
    """

    message: str
    invalid: bool


@dataclass
class Answers:
    """Answers to inputs of one kind, by name.

    Attributes:
        inputs: the texts, or the files.
        alone: vectors of the inputs that were answered, each asked alone and after the others.
        refused: the other inputs.
        batch: vectors of the answered inputs in one request, None if the API has none, or the refusal.
        together: vectors of the answered inputs in requests at the same time.
    """

    inputs: Mapping[str, Any]
    alone: dict[str, Floats] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    batch: Floats | Refusal | None = None
    together: Floats | Refusal | None = None

    @property
    def names(self) -> list[str]:
        """The inputs that were answered, in the order of a batch."""
        return list(self.alone)


def ask_texts(endpoint: Endpoint) -> Answers:
    """Ask for all texts, and for the empty one.

    Raises:
        UnreachableError: the server cannot be reached.
    """
    return _ask({**TEXTS, EMPTY: ""}, endpoint.texts, endpoint.batches["text"], "texts")


def ask_pictures(endpoint: Endpoint) -> Answers:
    """Ask for all pictures. Raises as `ask_texts` does."""
    files: Mapping[str, Picture] = {picture.name: picture for picture in pictures()}
    return _ask(files, endpoint.pictures, endpoint.batches["picture"], "pictures")


def _ask(
    inputs: Mapping[str, Input], ask: Callable[[Sequence[Input]], Floats], batches: bool, label: str
) -> Answers:
    answers = Answers(inputs)
    for name, value in tqdm(inputs.items(), desc=label, unit="request", disable=None):
        found = _tried(ask, [value])
        if isinstance(found, Refusal):
            answers.refused[name] = found
        else:
            answers.alone[name] = found[0]
    widths = {len(vector) for vector in answers.alone.values()}
    if len(widths) > 1:
        raise ServerError(f"the vectors of {label} have different widths: {sorted(widths)}")
    given = [inputs[name] for name in answers.names if name != EMPTY]
    if len(given) > 1:
        answers.batch = _tried(ask, given) if batches else None
        answers.together = _at_once(ask, given)
    return answers


def _tried(ask: Callable[[Sequence[Input]], Floats], inputs: Sequence[Input]) -> Floats | Refusal:
    try:
        return ask(inputs)
    except UnreachableError:
        raise
    except ServerError as error:
        return Refusal(str(error), isinstance(error, RefusedError))


def _at_once(ask: Callable[[Sequence[Input]], Floats], given: Sequence[Input]) -> Floats | Refusal:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        rows = list(threads.map(lambda value: _tried(ask, [value]), given))
    refused = [row for row in rows if isinstance(row, Refusal)]
    return refused[0] if refused else np.concatenate([row for row in rows if not isinstance(row, Refusal)])

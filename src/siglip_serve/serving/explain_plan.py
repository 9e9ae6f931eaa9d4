"""Carry a request of `explain_image` from step to step: the tensor PLAN, written and checked here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip_serve.errors import InvalidInputError
from siglip_serve.heatmaps.picture import MOST_SIDE, MOST_VALUES, NORMALIZATIONS, Normalization
from siglip_serve.serving.request import Request

__all__ = ["ExplainPlan"]


@dataclass(frozen=True)
class ExplainPlan:
    """The sizes and modes of one request.

    Attributes:
        prompts: P, the prompts to explain.
        templates: texts per prompt.
        relative: scores are compared with a background.
        normalization: of the maps.
        height, width: of the maps, in pixels.

    Raises:
        InvalidInputError: no prompt, no template, or maps that are too large.
    """

    prompts: int
    templates: int
    relative: bool
    normalization: Normalization
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.prompts, self.templates) < 1:
            raise InvalidInputError(f"{self.prompts} prompts in {self.templates} templates, expected some")
        sides = self.height, self.width
        values = self.prompts * self.height * self.width
        if min(sides) < 1 or max(sides) > MOST_SIDE or values > MOST_VALUES:
            raise InvalidInputError(
                f"SIZE: {self.prompts} maps of {self.height}x{self.width}, expected sides of 1 to "
                f"{MOST_SIDE} and at most {MOST_VALUES} values in all"
            )

    def tensor(self) -> NDArray[np.int32]:
        """Return PLAN [6] INT32."""
        how = NORMALIZATIONS.index(self.normalization)
        values = [self.prompts, self.templates, self.relative, how, self.height, self.width]
        return np.array(values, dtype=np.int32)

    @classmethod
    def read(cls, request: Request) -> ExplainPlan:
        """Read PLAN from a request, which may be anything: each step can be called directly.

        Raises:
            InvalidInputError: it is not one that `tensor` gives.
        """
        given = list(map(int, request.array("PLAN", [], np.int32)))
        try:
            prompts, templates, relative, how, height, width = given
            normalization = dict(enumerate(NORMALIZATIONS))[how]
            return cls(prompts, templates, bool(relative), normalization, height, width)
        except (InvalidInputError, KeyError, ValueError) as error:
            raise InvalidInputError(f"PLAN: got {given}, expected what explain_prompts gives") from error

    def check_rows(self, name: str, rows: int) -> None:
        """Refuse an input that has not one row per prompt."""
        if rows != self.prompts:
            raise InvalidInputError(f"{name}: {rows} rows, expected {self.prompts} as PLAN says")

"""team_fit: embeddings of jerseys become a team state, which belongs to the caller."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.team import TeamFit


class TritonPythonModel:
    """EMBEDDING [n, D] -> STATE [1], STATUS, LABELS, MARGIN, OUTLIER_SCORE [n], COORDINATES [n, 2]."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = TeamFit(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

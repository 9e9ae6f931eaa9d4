"""team_predict: embeddings of jerseys and a team state become teams."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.team import TeamPredict


class TritonPythonModel:
    """EMBEDDING [n, D], STATE [1] -> LABELS, MARGIN, OUTLIER_SCORE [n], COORDINATES [n, 2]."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = TeamPredict(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

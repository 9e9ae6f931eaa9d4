"""team_fit: embeddings of jerseys become a team state, which belongs to the caller."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import respond as serving
from siglip_serve.serving import team as team_handlers


class TritonPythonModel:
    """EMBEDDING [n, D] -> STATE [1], STATUS, LABELS, MARGIN, OUTLIER_SCORE [n], COORDINATES [n, 2]."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = team_handlers.TeamFitter(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

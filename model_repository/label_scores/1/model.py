"""label_scores: embeddings become probabilities."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import respond as serving
from siglip_serve.serving import siglip_vision as handlers


class TritonPythonModel:
    """IMAGE_EMBEDDING [N, D], PROMPT_EMBEDDING [L * K, D], TEMPLATE_COUNT [1] -> PROBABILITIES [N, L]."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = handlers.LabelScorer(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

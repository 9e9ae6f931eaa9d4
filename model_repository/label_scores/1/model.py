"""label_scores: embeddings become logits and probabilities."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.label import LabelScores


class TritonPythonModel:
    """IMAGE_EMBEDDING [N, D], PROMPT_EMBEDDING [L * K, D], TEMPLATE_COUNT [1] -> two outputs [N, L]."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = LabelScores(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

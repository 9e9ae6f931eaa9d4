"""explain_vectors: text embeddings become the vectors that are explained."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.explain import ExplainVectors


class TritonPythonModel:
    """TEXT_EMBEDDING [n, D], PLAN [6] -> PROMPT_VECTORS [1, P, D], PROMPT_EMBEDDING [P, D]."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = ExplainVectors(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

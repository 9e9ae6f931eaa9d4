"""explain_vectors: text embeddings become the vectors that are explained."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import explain as explain_handlers
from siglip_serve.serving import respond as serving


class TritonPythonModel:
    """TEXT_EMBEDDING [n, D], PLAN [6] -> PROMPT_VECTORS [1, P, D], PROMPT_EMBEDDING [P, D]."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = explain_handlers.ExplainVectors(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

"""explain_prompts: what is asked of an image becomes token ids."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.explain import ExplainPrompts


class TritonPythonModel:
    """PROMPTS [P] and options -> INPUT_IDS [n, T], PLAN [6]."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = ExplainPrompts(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

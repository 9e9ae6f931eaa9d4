"""explain_prompts: what is asked of an image becomes token ids."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import explain as explain_handlers
from siglip_serve.serving import respond as serving


class TritonPythonModel:
    """PROMPTS [P] and options -> INPUT_IDS [n, T], PLAN [6]."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = explain_handlers.ExplainPrompter(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

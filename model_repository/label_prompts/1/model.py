"""label_prompts: labels and templates become prompts."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import respond as serving
from siglip_serve.serving import siglip_vision as handlers


class TritonPythonModel:
    """LABELS [L], optional TEMPLATE [K] BYTES -> PROMPTS [L * K, 1], TEMPLATE_COUNT [1]."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = handlers.LabelPrompter(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

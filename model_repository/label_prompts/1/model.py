"""label_prompts: labels and templates become prompts."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.label import LabelPrompts


class TritonPythonModel:
    """LABELS [L], optional TEMPLATE [K] BYTES -> PROMPTS [L * K, 1], TEMPLATE_COUNT [1]."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = LabelPrompts(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

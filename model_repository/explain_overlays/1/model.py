"""explain_overlays: maps become pictures to look at."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import explain as explain_handlers
from siglip_serve.serving import respond as serving


class TritonPythonModel:
    """HEAT [P, G, G], INPUT_IMAGE [1, 1] -> OVERLAY [P], PNG files."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = explain_handlers.ExplainOverlays(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

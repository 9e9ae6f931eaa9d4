"""explain_overlays: maps become pictures to look at."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.explain import ExplainOverlays


class TritonPythonModel:
    """HEAT [P, G, G], INPUT_IMAGE [1, 1] -> OVERLAY [P], PNG files."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = ExplainOverlays(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

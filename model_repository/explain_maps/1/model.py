"""explain_maps: maps on the patch grid become maps over the picture."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import explain as explain_handlers
from siglip_serve.serving import respond as serving


class TritonPythonModel:
    """Maps on the patch grid -> HEATMAPS [P, H, W], SCORES [P], UNATTRIBUTED [P], PATCH_MAPS, HEAT."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = explain_handlers.ExplainMapper(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

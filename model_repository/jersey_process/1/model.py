"""jersey_process: crops, or a frame and boxes, become the pixels of jerseys."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import respond as serving
from siglip_serve.serving import team as team_handlers


class TritonPythonModel:
    """CROPS [n], or FRAME [1] or RAW_FRAME [H, W, C] and BOXES [n, 4] -> PIXEL_VALUES [n, S, S, 3] UINT8."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = team_handlers.JerseyReader(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

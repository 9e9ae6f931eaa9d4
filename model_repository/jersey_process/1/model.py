"""jersey_process: crops, or a frame and boxes, become the pixels of jerseys."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.team import JerseyProcess


class TritonPythonModel:
    """CROPS [n], or FRAME [1] or RAW_FRAME [H, W, C] and BOXES [n, 4] -> PIXEL_VALUES [n, S, S, 3] UINT8."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = JerseyProcess(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

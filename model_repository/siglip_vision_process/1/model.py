"""siglip_vision_process: the bytes of images become pixels."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import images as image_handlers
from siglip_serve.serving import respond as serving


class TritonPythonModel:
    """INPUT_IMAGE [n, 1] BYTES -> PIXEL_VALUES [n, S, S, 3] UINT8."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return serving.fill_dims(config)

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = image_handlers.ImageReader(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

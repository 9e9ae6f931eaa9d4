"""siglip_vision_process: the bytes of images become pixels."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import fill_dims, open_context
from siglip_serve.serving.siglip_vision import SiglipVisionProcess


class TritonPythonModel:
    """INPUT_IMAGE [n, 1] BYTES -> PIXEL_VALUES [n, S, S, 3] UINT8."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return fill_dims(config)

    def initialize(self, args: dict[str, str]) -> None:
        self.model = SiglipVisionProcess(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

    def finalize(self) -> None:
        self.model.close()

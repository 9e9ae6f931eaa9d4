"""siglip_vision_model: pixels become embeddings."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import fill_dims, open_context
from siglip_serve.serving.siglip_vision import SiglipVisionModel


class TritonPythonModel:
    """PIXEL_VALUES [n, S, S, 3] -> EMBEDDING [n, D], MEAN_EMBEDDING [n, D], PATCH_EMBEDDINGS [n, T, D].

    PIXEL_VALUES [1, S, S, 3], PROMPT_VECTORS [1, P, D] -> PATCH_MAPS [1, P, T], UNATTRIBUTED [1, P],
    EMBEDDING [1, D].
    """

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return fill_dims(config)

    def initialize(self, args: dict[str, str]) -> None:
        self.model = SiglipVisionModel(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

    def finalize(self) -> None:
        self.model.close()

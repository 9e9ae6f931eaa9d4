"""siglip_base_model: the pixels of jerseys become mean-pooled embeddings."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import respond as serving
from siglip_serve.serving import siglip_vision as handlers


class TritonPythonModel:
    """PIXEL_VALUES [n, S, S, 3] -> MEAN_EMBEDDING [n, D]."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return serving.fill_dims(config)

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = handlers.VisionEmbedder(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

    def finalize(self) -> None:
        self.handler.close()

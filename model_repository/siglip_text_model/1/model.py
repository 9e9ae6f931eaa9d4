"""siglip_text_model: token ids become embeddings."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving import respond as serving
from siglip_serve.serving import siglip_vision as handlers


class TritonPythonModel:
    """INPUT_IDS [n, T] INT64 -> EMBEDDING [n, P]."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return serving.fill_dims(config)

    def initialize(self, args: dict[str, str]) -> None:
        self.handler = handlers.TextEmbedder(serving.open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.handler.answer(requests)

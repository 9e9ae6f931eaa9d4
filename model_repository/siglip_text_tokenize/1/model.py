"""siglip_text_tokenize: texts become token ids."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import fill_dims, open_context
from siglip_serve.serving.siglip_text import SiglipTextTokenize


class TritonPythonModel:
    """INPUT_TEXT [n, 1] BYTES -> INPUT_IDS [n, T] INT64."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return fill_dims(config)

    def initialize(self, args: dict[str, str]) -> None:
        self.model = SiglipTextTokenize(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

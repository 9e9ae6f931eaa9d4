"""explain_maps: maps on the patch grid become maps over the picture."""

from __future__ import annotations

from typing import Any

from siglip_serve.serving.context import open_context
from siglip_serve.serving.explain import ExplainMaps


class TritonPythonModel:
    """Maps on the patch grid -> HEATMAPS [P, H, W], SCORES [P], UNATTRIBUTED [P], PATCH_MAPS, HEAT."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = ExplainMaps(open_context(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)

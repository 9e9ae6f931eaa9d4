"""Towers as their checkpoint stores them, for engines that do without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

from siglip_serve.checkpoint.model_config import ClipVisionConfig, ModelConfig, TextConfig, VisionConfig
from siglip_serve.towers.parameters import Parameters, read_parameters, text_shapes, vision_shapes

if TYPE_CHECKING:
    from siglip_serve.towers.clip import ClipVisionTower
    from siglip_serve.towers.siglip import VisionTower

__all__ = ["StoredText", "StoredVision"]


@dataclass(frozen=True)
class StoredVision:
    """A vision tower that is not in torch yet."""

    parameters: Parameters
    config: VisionConfig

    @classmethod
    def open(cls, config: ModelConfig) -> Self:
        """Open the vision tower of a checkpoint.

        Raises:
            CheckpointError: as of `towers.load.load_vision`.
        """
        shapes = vision_shapes(config.vision)
        return cls(read_parameters(config.path, "vision", shapes), config.vision)

    @cached_property
    def tower(self) -> VisionTower | ClipVisionTower:
        """The tower in torch. It shares the memory of the parameters where these lie in one piece."""
        from siglip_serve.towers.clip import ClipVisionTower
        from siglip_serve.towers.siglip import VisionTower
        from siglip_serve.towers.weights import fill, without_values

        config = self.config
        with without_values():
            tower = ClipVisionTower(config) if isinstance(config, ClipVisionConfig) else VisionTower(config)
        fill(tower, self.parameters)
        self.parameters.leave_memory()  # what was read to be put together
        return tower


@dataclass(frozen=True)
class StoredText:
    """A text tower that is not in torch."""

    parameters: Parameters
    config: TextConfig

    @classmethod
    def open(cls, config: ModelConfig) -> Self:
        """Open the text tower of a checkpoint.

        Raises:
            CheckpointError: as of `towers.load.load_text`.
        """
        return cls(read_parameters(config.path, "text", text_shapes(config.text)), config.text)

"""Embed one text or one picture in this process, as the engines of a server do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import limit_patches, load_config, tensor_dims
from siglip_serve.checkpoint.files import fingerprint, public_name, resolve
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.config import Settings, load_settings
from siglip_serve.engine.engines import NaflexEngine, open_text, open_vision
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import SettingsError
from siglip_serve.images.patches import grid_of
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.machine import available_cores, gpu_capabilities
from siglip_serve.texts.tokenizer import load_tokenizer

__all__ = ["QueryEmbedder"]


@dataclass(frozen=True)
class QueryEmbedder:
    """A checkpoint that embeds single texts and pictures. A tower is loaded when it is called.

    Args:
        config: the checkpoint's JSON files.
        name, revision: of the checkpoint, as a server tells them.
        settings: arithmetic of the towers, and how images are read.
    """

    config: ModelConfig
    name: str
    revision: str
    settings: Settings

    @classmethod
    def open(cls, checkpoint: str, settings: Mapping[str, str]) -> QueryEmbedder:
        """Read the JSON files of a checkpoint: a directory, a hub id or `<hub id>@<revision>`.

        Args:
            settings: by name, those of `siglip_serve.config.Settings` that the stored vectors were made with.

        Raises:
            CheckpointError: there is no such checkpoint, or it is of a family that is not served.
            SettingsError: a setting is unknown, or has a value that it cannot have.
        """
        known = load_settings({}, {"checkpoint": checkpoint, **settings})
        path = resolve(checkpoint)
        name, revision = public_name(checkpoint, path)
        return cls(limit_patches(load_config(path), known.max_num_patches), name, revision, known)

    @property
    def fingerprint(self) -> str:
        """A digest of the weights."""
        return fingerprint(self.config.path)

    @property
    def width(self) -> int:
        """D, the numbers of an embedding."""
        return int(tensor_dims(self.config)["EMBEDDING"][0])

    def text(self, text: str, truncation: bool = False) -> NDArray[np.float32]:
        """Embed a text: float32 [D], not scaled to length 1.

        Args:
            truncation: cut a text that has too many tokens.

        Raises:
            CheckpointError: the weights do not belong to the configuration.
            SettingsError: the checkpoint has no text tower.
            TextError: too many tokens, or an empty text.
        """
        if self.config.vision_only:
            raise SettingsError(f"{self.name}: has no text tower, so only pictures can be searched for")
        ids = load_tokenizer(self.config)(text, truncation)
        engine = open_text(self.config, self._plan())
        return _one(engine(np.asarray(ids, np.int64)[None]).rows(0, 1)["EMBEDDING"])

    def image(self, data: bytes) -> NDArray[np.float32]:
        """Embed an image file: float32 [D], not scaled to length 1.

        Raises:
            CheckpointError: the weights do not belong to the configuration.
            SettingsError: the checkpoint has no vision tower.
            ImageError, ImageTooLargeError: not a decodable image, or one beyond the default limits.
        """
        config = self.config
        if config.text_only:
            raise SettingsError(f"{self.name}: has no vision tower, so only texts can be searched for")
        mode = self.settings.preprocess
        reader = Preprocessor(config.image, "fast" if mode == "gpu" else mode, color=self.settings.color)
        try:
            picture = reader.read(data)
        finally:
            reader.close()
        engine = open_vision(config, self._plan())
        if isinstance(engine, NaflexEngine):
            grids = np.array([grid_of(config, *picture.size)])
            return _one(engine(PatchRows(picture.pixels[None], grids)).rows(0, 1)["EMBEDDING"])
        return _one(engine(picture.pixels[None]).rows(0, 1)["EMBEDDING"])

    def _plan(self) -> Plan:
        own = self.settings
        device = "cuda:0" if gpu_capabilities() and _torch_sees_gpus() else "cpu"
        # The others are of one kind of device, or need images to calibrate: the query does without.
        dtype = own.dtype if own.dtype in ("float32", "bfloat16") else "auto"
        return Plan(device, dtype, threads=available_cores(), cache=own.cache_folder)


def _torch_sees_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _one(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows[0].copy()

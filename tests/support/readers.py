"""Preprocessors that tests share, because each starts a process for the files that are costly to decode."""

from __future__ import annotations

from functools import lru_cache

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.config import Color
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.preprocess import Preprocessor, ReadMode

__all__ = ["reader"]


@lru_cache(maxsize=8)
def reader(
    image: ImageConfig, mode: ReadMode, limits: ImageLimits | None = None, color: Color = "stored"
) -> Preprocessor:
    """Return the preprocessor of these arguments, for all tests the same one."""
    return Preprocessor(image, mode, limits or ImageLimits(), color)

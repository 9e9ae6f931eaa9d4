"""Rules of CLIP beside its layers, for towers in torch and engines without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from siglip_serve.checkpoint.model_config import ClipTextConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["QUICK_GELU", "end_places"]

QUICK_GELU = 1.702  # slope of its sigmoid

Ids = TypeVar("Ids", "Tensor", NDArray[Any])


def end_places(config: ClipTextConfig, ids: Ids) -> Ids:
    """Find the place [B] of the token whose output becomes the embedding, in ids [B, T] int64.

    It is the first end token, or the first of the largest id where the checkpoint asks for that. In ids
    without an end token it is the first of all.
    """
    return (ids if config.pools_largest_id else (ids == config.eos_token_id) * 1).argmax(1)

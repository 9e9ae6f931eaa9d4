"""Texts of a batch without the tokens that no embedding depends on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.model_config import ClipTextConfig, TextConfig
from siglip_serve.towers.clip_rules import end_places

__all__ = ["embedded_places", "round_up", "shorten"]

# An engine prepares itself for each length that it meets, so few lengths are used.
_STEP = 8


def embedded_places(config: TextConfig, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find the token of each text that becomes its embedding.

    Args:
        config: of the text tower.
        ids: [N, T].

    Returns:
        [N] places: the end token for CLIP, else the last token.
    """
    if isinstance(config, ClipTextConfig):
        return end_places(config, ids)
    return np.full(len(ids), ids.shape[1] - 1)


def round_up(counts: NDArray[np.int64], lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return the least of the ascending `lengths` that each count fits into."""
    return np.asarray(lengths)[np.searchsorted(lengths, counts)]


def shorten(
    config: TextConfig, ids: NDArray[np.int64], lengths: Sequence[int] | None = None
) -> NDArray[np.int64]:
    """Leave out tokens that come after all end tokens, since no token of a CLIP sees a later one.

    Args:
        config: of the text tower.
        ids: [N, T], at least one row.
        lengths: the numbers of tokens that the engine has, in ascending order, T the last.

    Returns:
        A view [N, t] with t one of `lengths`, without them a multiple of 8, or T. Embeddings and places are
        those of the whole rows.
    """
    longest = int(embedded_places(config, ids).max()) + 1
    if lengths:
        return ids[:, : min(length for length in lengths if length >= longest)]
    return ids[:, : -(-longest // _STEP) * _STEP]

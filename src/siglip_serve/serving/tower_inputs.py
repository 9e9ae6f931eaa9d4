"""Read the inputs of a vision tower from requests: pixels of one size, or for NaFlex patches and grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.engine.patches import PatchRows
from siglip_serve.errors import InvalidInputError
from siglip_serve.serving.request import Request
from siglip_serve.serving.rows import RowBuffer

__all__ = ["PatchInput", "PixelInput", "TowerInput"]

Part = TypeVar("Part")


class TowerInput(Protocol[Part]):
    """Reads the rows of requests and joins them for one call of an engine."""

    def read(self, request: Request) -> Part:
        """Return a request's rows, checked."""

    def join(self, parts: Sequence[Part]) -> Part:
        """Concatenate the rows of several requests, which the next call may overwrite."""

    def blank(self) -> Part:
        """Make one black image of the largest size."""


class PixelInput:
    """PIXEL_VALUES [n, S, S, 3] UINT8.

    Args:
        config: the checkpoint's.
        staging: see `RowBuffer`.
    """

    def __init__(self, config: ModelConfig, staging: NDArray[np.uint8] | None) -> None:
        self._shape = tensor_dims(config)["PIXEL_VALUES"]
        self._buffer = RowBuffer(staging)

    def read(self, request: Request) -> NDArray[np.uint8]:
        """Return a request's pixels."""
        return request.array("PIXEL_VALUES", self._shape, np.uint8)

    def join(self, parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Concatenate pixels."""
        return self._buffer.join(parts)

    def blank(self) -> NDArray[np.uint8]:
        """Make one black image."""
        return np.zeros((1, *self._shape), dtype=np.uint8)


class PatchInput:
    """PIXEL_VALUES [n, T, 3 P P] UINT8 and PATCH_GRID [n, 2] INT32. Arguments as for `PixelInput`."""

    def __init__(self, config: ModelConfig) -> None:
        self._shape = tensor_dims(config)["PIXEL_VALUES"]
        self._buffer = RowBuffer()

    def read(self, request: Request) -> PatchRows:
        """Return a request's patches."""
        patches: NDArray[Any] = request.array("PIXEL_VALUES", self._shape, np.uint8)
        grids = request.array("PATCH_GRID", [2], np.int32).astype(np.int64)
        if len(grids) != len(patches):
            raise InvalidInputError(f"PATCH_GRID: {len(grids)} rows, expected {len(patches)} as PIXEL_VALUES")
        wrong = np.flatnonzero((grids.min(axis=1) < 1) | (grids.prod(axis=1) > self._shape[0]))
        if len(wrong):
            raise InvalidInputError(
                f"PATCH_GRID[{wrong[0]}]: got {grids[wrong[0]].tolist()}, expected rows and columns above 0 "
                f"and at most {self._shape[0]} patches"
            )
        return PatchRows(patches, grids)

    def join(self, parts: Sequence[PatchRows]) -> PatchRows:
        """Concatenate patches."""
        grids = np.concatenate([part.grids for part in parts])
        return PatchRows(self._buffer.join([part.patches for part in parts]), grids)

    def blank(self) -> PatchRows:
        """Make one black image of one row of patches."""
        patches = np.zeros((1, *self._shape), dtype=np.uint8)
        return PatchRows(patches, np.array([[1, self._shape[0]]]))

"""Read the packed art back."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Pack", "load_pack", "premultiplied"]


@dataclass(frozen=True)
class Pack:
    """Every drawing, still encoded.

    Attributes:
        concept, style: int64 [N].
        styles, concepts: rows of the pack's metadata.
        classes: concepts that make up the benchmark, ascending.
        never_trained: the tenth of `classes` that no training may show.
        size: pixels per side.
    """

    blob: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    concept: npt.NDArray[np.int64]
    style: npt.NDArray[np.int64]
    styles: list[dict[str, Any]]
    concepts: list[dict[str, Any]]
    classes: list[int]
    never_trained: list[int]
    size: int

    def of_role(self, role: str) -> npt.NDArray[np.int64]:
        """Numbers of the drawings whose style has this role."""
        wanted = [number for number, style in enumerate(self.styles) if style["role"] == role]
        return np.flatnonzero(np.isin(self.style, wanted))

    def of_style(self, name: str) -> npt.NDArray[np.int64]:
        """Numbers of the drawings of one style."""
        wanted = [number for number, style in enumerate(self.styles) if style["name"] == name]
        return np.flatnonzero(np.isin(self.style, wanted))

    def mono(self, drawings: npt.NDArray[np.int64]) -> Tensor:
        """bool [n]: which of these drawings carry shape only."""
        table = np.array([style["mono"] for style in self.styles])
        return torch.from_numpy(table[self.style[drawings]])

    def rgba(self, drawings: npt.NDArray[np.int64], workers: int = 2) -> Tensor:
        """Decode drawings: uint8 [n, 4, size, size], not premultiplied."""
        out = np.empty((len(drawings), 4, self.size, self.size), np.uint8)

        def decode(row: int) -> None:
            start, end = self.offsets[drawings[row] : drawings[row] + 2]
            with Image.open(io.BytesIO(self.blob[start:end].tobytes())) as image:
                out[row] = np.asarray(image.convert("RGBA")).transpose(2, 0, 1)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(decode, range(len(drawings)), chunksize=64))
        return torch.from_numpy(out)


def load_pack(path: Path) -> Pack:
    """Open a file that `build_data` wrote."""
    with np.load(path) as data:
        meta = json.loads(str(data["meta"]))
        return Pack(
            blob=data["blob"],
            offsets=data["offsets"],
            concept=data["concept"].astype(np.int64),
            style=data["style"].astype(np.int64),
            styles=meta["styles"],
            concepts=meta["concepts"],
            classes=meta["classes"],
            never_trained=meta["never_trained"],
            size=meta["size"],
        )


def premultiplied(rgba: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [n, 4, S, S] -> premultiplied 0..1 of `dtype`."""
    art = rgba.to(dtype) / 255
    return torch.cat([art[:, :3] * art[:, 3:], art[:, 3:]], 1)

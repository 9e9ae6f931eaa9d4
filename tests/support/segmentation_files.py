"""A file in the format of ImageNet-Segmentation, as MATLAB writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = ["write_segments"]


def write_segments(
    path: Path, images: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]], **left_out: Any
) -> Path:
    """Write (name, picture [H, W, 3], mask [H, W]) of each image, without the columns named in `left_out`."""
    with h5py.File(path, "w") as file:
        columns = {
            name: file.create_dataset(f"value/{name}", (len(images), 1), dtype=h5py.ref_dtype)
            for name in ("gt", "id", "img")
            if name not in left_out
        }
        for index, (name, picture, mask) in enumerate(images):
            cell = file.create_dataset(f"#refs#/c{index}", (1, 1), dtype=h5py.ref_dtype)
            cell[0, 0] = file.create_dataset(f"#refs#/m{index}", data=mask.T.astype(np.uint8)).ref
            text = np.array([[ord(letter)] for letter in name], dtype=np.uint16)
            stored = {
                "img": file.create_dataset(f"#refs#/i{index}", data=picture.transpose(2, 1, 0)),
                "id": file.create_dataset(f"#refs#/n{index}", data=text),
                "gt": cell,
            }
            for column, dataset in columns.items():
                dataset[index, 0] = stored[column].ref
    return path

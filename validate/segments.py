"""ImageNet-Segmentation as it is published: photographs with the pixels of their object.

The file `gtsegs_ijcv.mat` is HDF5 (MATLAB 7.3), which holds columns of references, one row per image:

    value/img  [N, 1] -> uint8 [3, W, H], the photograph
    value/gt   [N, 1] -> [1, 1] -> uint8 [W, H], 0 or 1, the object
    value/id   [N, 1] -> uint16 [L, 1], characters: the synset and a number, as n01440764_10026

MATLAB counts the last dimension first, so that both are transposed here. Source: "ImageNet Auto-Annotation
with Segmentation Propagation" (Guillaumin, Küttel and Ferrari, IJCV 2014).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from validate.errors import DatasetError

__all__ = ["Segment", "Segments"]

_COLUMNS = ("img", "gt", "id")
_SYNSET = re.compile(r"(n\d{8})(_.*)?")


@dataclass(frozen=True)
class Segment:
    """One photograph.

    Attributes:
        name: as n01440764_10026.
        picture: uint8 [H, W, 3].
        mask: bool [H, W], the object.
    """

    name: str
    picture: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    @property
    def synset(self) -> str:
        """Synset of its class."""
        return self.name.partition("_")[0]


class Segments:
    """The images of a file, read as they are asked for. It is a context manager.

    Raises:
        DatasetError: h5py is not installed, or this is not that file.
    """

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise DatasetError(
                "h5py is needed: `.venv/bin/pip install -e '.[segmentation]'` in the checkout"
            ) from error
        try:
            self._file: Any = h5py.File(path, "r")
        except OSError as error:
            raise DatasetError(f"{path}: cannot be opened as HDF5 ({error})") from error
        self._path, self._columns = path, {}
        try:
            self._columns = {name: self._column(name) for name in _COLUMNS}
            if len({len(column) for column in self._columns.values()}) != 1:
                lengths = {name: len(column) for name, column in self._columns.items()}
                raise DatasetError(f"{path}: its columns are not of one length: {lengths}")
        except DatasetError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._columns["img"])

    def __getitem__(self, index: int) -> Segment:
        """Image number `index`.

        Raises:
            DatasetError: it is not of the form above.
        """
        try:
            picture = np.asarray(self._follow("img", index))
            mask = np.asarray(self._file[self._follow("gt", index)[0, 0]])
            name = "".join(map(chr, np.asarray(self._follow("id", index)).ravel()))
        except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
            raise DatasetError(f"{self._path}: image {index} cannot be read ({error})") from error
        if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != np.uint8:
            got = f"{picture.dtype} {list(picture.shape)}"
            raise DatasetError(f"{self._path}: value/img[{index}]: got {got}, expected uint8 [3, W, H]")
        if mask.shape != picture.shape[1:]:
            expected = list(picture.shape[1:])
            raise DatasetError(
                f"{self._path}: value/gt[{index}]: got {list(mask.shape)}, expected {expected}"
            )
        if not _SYNSET.fullmatch(name):
            raise DatasetError(f"{self._path}: value/id[{index}]: got {name!r}, expected as n01440764_10026")
        return Segment(name, np.ascontiguousarray(picture.transpose(2, 1, 0)), mask.T != 0)

    def _column(self, name: str) -> Any:
        column = self._file.get(f"value/{name}")
        if column is None or len(getattr(column, "shape", ())) != 2:
            found = "nothing" if column is None else f"{column}"
            raise DatasetError(f"{self._path}: value/{name}: expected references [N, 1], found {found}")
        return column

    def _follow(self, name: str, index: int) -> Any:
        return self._file[self._columns[name][index, 0]]

"""Shorter vectors by a linear projection that is fitted to stored embeddings: principal components.

SigLIP and CLIP are not trained so that the first values of a vector are a vector of their own, so vectors are
not cut. They are multiplied with a matrix whose rows are the principal components of a collection, those of
most variance first. The first k rows serve every k up to K, so one matrix serves all widths.

The embeddings of images and those of texts lie in different cones. Both are multiplied with the same matrix,
which keeps the inner product of a text with an image as far as the image's component lies within the rows.
No mean is subtracted when vectors are projected: the mean of the images is not that of the texts.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.compact import unit

__all__ = ["Moments", "Projection", "read_projection", "write_projection"]

_FORMAT = 1
_ORTHONORMAL = 1e-3  # most that the inner products of two rows may differ from 0, and those of one from 1


@dataclass(frozen=True, eq=False)
class Projection:
    """Principal components of a collection of embeddings.

    Attributes:
        matrix: [K, D] float32, orthonormal rows, most variance first.
        explained: [K] float64, the share of the collection's variance along each row.
        rows: number of embeddings that it was fitted to.
        checkpoint, revision: the checkpoint that made the embeddings.
    """

    matrix: NDArray[np.float32]
    explained: NDArray[np.float64]
    rows: int
    checkpoint: str
    revision: str = ""

    @property
    def most(self) -> int:
        """K, the largest width of a projected vector."""
        return int(self.matrix.shape[0])

    @property
    def width(self) -> int:
        """D, the width of the vectors that it projects."""
        return int(self.matrix.shape[1])

    def project(
        self, vectors: NDArray[np.float32], dimensions: int, *, normalized: bool = True
    ) -> NDArray[np.float32]:
        """Vectors [N, D] float32 of images or texts with fewer dimensions: [N, dimensions] float32.

        Args:
            normalized: scale each to length 1 afterwards.

        Raises:
            ValueError: the vectors have another width, or `dimensions` is not within 1 and K.
        """
        if vectors.shape[-1] != self.width:
            raise ValueError(f"vectors of width {vectors.shape[-1]}, expected {self.width}")
        if not 1 <= dimensions <= self.most:
            raise ValueError(f"dimensions: {dimensions}, expected 1 to {self.most}")
        short = (vectors.astype(np.float64) @ self.matrix[:dimensions].T.astype(np.float64)).astype(
            np.float32
        )
        return unit(short) if normalized else short


class Moments:
    """Count, mean and covariance of embeddings that arrive in blocks. It keeps D x D numbers, in float64.

    Each embedding is scaled to length 1 first, as a search by cosine does.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Take a block [N, D] of finite vectors of a length above 0.

        Raises:
            ValueError: a vector is not. The message begins with its index in the block.
        """
        block = vectors.astype(np.float64)
        lengths = np.linalg.norm(block, axis=1)
        bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
        if bad.size:
            what = "a vector of zeros" if lengths[bad[0]] == 0 else "a vector with a value that is not finite"
            raise ValueError(f"{bad[0]}: {what}")
        block /= lengths[:, None]
        self.count += len(block)
        self._sum += block.sum(0)
        self._products += block.T @ block

    def fit(self, dimensions: int, checkpoint: str, revision: str = "") -> Projection:
        """The principal components of all blocks.

        Raises:
            ValueError: there are fewer components than `dimensions`.
        """
        mean = self._sum / max(self.count, 1)
        covariance = self._products / max(self.count, 1) - np.outer(mean, mean)
        values, columns = np.linalg.eigh(covariance)
        values, rows = np.maximum(values[::-1], 0), columns.T[::-1]
        # Of N vectors around their mean at most N - 1 directions vary.
        most = min(len(values), self.count - 1)
        if not 1 <= dimensions <= most:
            raise ValueError(f"{dimensions} dimensions, but {self.count} vectors give 1 to {max(most, 0)}")
        rows = rows[:dimensions]
        # The sign of a component is free. This makes equal collections give equal files.
        largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
        share = values / values.sum() if values.sum() > 0 else values
        matrix = (rows * np.sign(largest)).astype(np.float32)
        return Projection(matrix, share[:dimensions], self.count, checkpoint, revision)


def write_projection(projection: Projection, file: IO[bytes]) -> None:
    """Write a projection as an .npz file."""
    about = {
        "format": _FORMAT,
        "checkpoint_name": projection.checkpoint,
        "checkpoint_revision": projection.revision,
        "rows": projection.rows,
    }
    np.savez(
        file,
        projection=projection.matrix,
        explained_variance=projection.explained,
        about=np.array(json.dumps(about)),
    )


def read_projection(path: Path | str) -> Projection:
    """Read a file of `siglip-serve fit-projection`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or a damaged one.
    """
    Path(path).open("rb").close()  # an OSError says why it cannot be read
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("no .npz file")
        with np.load(path, allow_pickle=False) as content:
            matrix, explained = content["projection"], content["explained_variance"]
            about: dict[str, Any] = json.loads(str(content["about"]))
    except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a file of `siglip-serve fit-projection`: {error}") from None
    if about.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {about.get('format')}, expected {_FORMAT}")
    if matrix.ndim != 2 or matrix.dtype != np.float32 or explained.shape != matrix.shape[:1]:
        raise ValueError(f"{path}: projection {matrix.dtype}{list(matrix.shape)}, expected float32[K, D]")
    products = matrix.astype(np.float64) @ matrix.T.astype(np.float64)
    if not len(matrix) or not np.allclose(products, np.eye(len(matrix)), atol=_ORTHONORMAL):
        raise ValueError(f"{path}: the rows of the projection are not orthonormal")
    return Projection(
        matrix, explained, int(about["rows"]), about["checkpoint_name"], about["checkpoint_revision"]
    )

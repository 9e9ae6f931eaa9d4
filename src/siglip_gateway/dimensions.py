"""The field `dimensions` of requests: which widths are answered, and vectors of these widths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.projection import Projection

from siglip_gateway.backend import Checkpoint
from siglip_gateway.refusals import Refusal

__all__ = ["Dimensions", "mismatch"]

_LOCAL = {"", "local"}  # revisions that tell nothing


class Dimensions:
    """Answers of a gateway to requests for a width.

    Args:
        projection: of a file of `siglip-serve fit-projection`, or None.
    """

    def __init__(self, projection: Projection | None) -> None:
        self._projection = projection

    @property
    def most(self) -> int | None:
        """The largest width of a projected vector, or None without a projection."""
        return None if self._projection is None else self._projection.most

    def check(self, asked: int | None, field: str, checkpoint: Checkpoint) -> None:
        """Check the width that a request asks for, before anything is computed.

        Args:
            field: its name in the request.

        Raises:
            Refusal: 400, it is not served. 500, the projection belongs to another checkpoint.
        """
        if asked in (None, checkpoint.width):
            return
        have = f"vectors of {checkpoint.name} have {checkpoint.width} dimensions"
        if self._projection is None:
            reason = (
                f"but {have} and no projection shortens them; `siglip-serve fit-projection` fits one to your "
                "embeddings, and `siglip-serve gateway --projection FILE` takes it"
            )
        elif problem := mismatch(self._projection, checkpoint):
            raise Refusal(500, problem, param=field, code="projection_mismatch")
        elif asked is not None and 1 <= asked <= self._projection.most:
            return
        else:
            reason = f"expected 1 to {self._projection.most}, or {checkpoint.width}: {have}"
        raise Refusal(400, f"{field}: {asked}, {reason}", param=field, code="invalid_value")

    def cut(self, vectors: NDArray[np.float32], asked: int | None, normalized: bool) -> NDArray[np.float32]:
        """Vectors [N, D] float32 with the width that a request asks for and that passed `check`.

        Raises:
            Refusal: 503, Triton has changed its checkpoint meanwhile.
        """
        if asked is None or asked == vectors.shape[1] or self._projection is None:
            return vectors
        if vectors.shape[1] != self._projection.width:
            raise Refusal(503, "the inference server has another checkpoint now", retry_after=1)
        return self._projection.project(vectors, asked, normalized=normalized)


def mismatch(projection: Projection, checkpoint: Checkpoint) -> str:
    """Say why a projection does not fit to a checkpoint, or "" if it does."""
    theirs = projection.checkpoint, projection.width
    revisions = {projection.revision, checkpoint.revision} - _LOCAL
    if theirs == (checkpoint.name, checkpoint.width) and len(revisions) < 2:
        return ""
    fitted = _described(*theirs, projection.revision)
    served = _described(checkpoint.name, checkpoint.width, checkpoint.revision)
    return f"the projection is of {fitted}, but Triton serves {served}"


def _described(name: str, width: int, revision: str) -> str:
    of_hub = f" (revision {revision})" if revision not in _LOCAL else ""
    return f"{name}{of_hub} with width {width}"

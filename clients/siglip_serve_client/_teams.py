"""Teams of football players: what the client sends to `fit_teams` and `classify_teams`, and gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import ArrayLike, NDArray

from siglip_serve_client._images import ColorOrder, ImageLike, encoded, raw
from siglip_serve_client._shared_memory import Regions
from siglip_serve_client._wire import Wire
from siglip_serve_client.errors import ServerError

__all__ = ["Link", "TeamFit", "TeamImages", "Teams", "ask_fit", "ask_teams", "hint_inputs"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Teams:
    """What the server says of N crops, in their order.

    Attributes:
        labels: int32 [N], the team, from 0; -1: not assigned.
        margin: float32 [N], from 0 (half-way between two teams) to 1 (at a team's centre).
        outlier_score: float32 [N]; 1 is typical, larger is unlike either team.
        coordinates: float32 [N, 2], a projection to plot.
        region_fallback: bool [N]; the jersey region was empty and the whole crop was used.
    """

    labels: NDArray[np.int32]
    margin: NDArray[np.float32]
    outlier_score: NDArray[np.float32]
    coordinates: NDArray[np.float32]
    region_fallback: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False, kw_only=True)
class TeamFit(Teams):
    """A fit, and what it says of the crops that it was made from.

    Attributes:
        state: what `classify_teams` and later fits need; any server of the same checkpoint reads it. Empty
            if no teams were found.
        status: ("OK",), or one or more of LOW_SUPPORT, LOW_SEPARATION, DEGENERATE, ANCHOR_CONFLICT.
    """

    state: bytes
    status: tuple[str, ...]


class TeamImages(TypedDict, total=False):
    """The arguments of `fit_teams` and `classify_teams` that are pictures."""

    crops: Sequence[ImageLike]
    frame: ImageLike
    boxes: ArrayLike
    color_order: ColorOrder


@dataclass(frozen=True)
class Link:
    """How requests reach the server; `regions` are for raw frames if they go through shared memory."""

    wire: Wire
    regions: Regions | None = None

    def close(self) -> None:
        """Remove the regions, and close the connection."""
        if self.regions is not None:
            self.regions.close()
        self.wire.close()


@dataclass(frozen=True)
class _Request:
    """Inputs and parameters of a request; `raw` is a frame that is not among the inputs yet."""

    inputs: list[triton.InferInput]
    parameters: Mapping[str, str | bool] = field(default_factory=dict)
    raw: NDArray[np.uint8] | None = None


def ask_fit(link: Link, images: TeamImages, hints: Sequence[triton.InferInput]) -> TeamFit:
    """See `Client.fit_teams`."""
    request = _request(**images)
    answer = _infer(link, "fit_teams", request, hints)
    return TeamFit(
        **_said_of_crops(answer),
        state=_output(answer, "STATE").item(),
        status=tuple(word.decode() for word in _output(answer, "STATUS")),
    )


def ask_teams(link: Link, images: TeamImages, state: bytes) -> Teams:
    """See `Client.classify_teams`."""
    answer = _infer(link, "classify_teams", _request(**images), [_bytes("STATE", "state", [state])])
    return Teams(**_said_of_crops(answer))


def hint_inputs(
    *,
    track_ids: ArrayLike | None,
    roles: Sequence[str] | None,
    anchors: ArrayLike | None,
    prev_state: bytes | None,
    k: int,
) -> list[triton.InferInput]:
    """The inputs of `fit_teams` beside the pictures; what is None is left out.

    Raises:
        TypeError, ValueError: not whole numbers, or not of a size that can be sent.
    """
    inputs = [_integers("K", "k", [k], np.int32)]
    if track_ids is not None:
        inputs.append(_integers("TRACK_ID", "track_ids", track_ids, np.int64))
    if roles is not None:
        inputs.append(_bytes("ROLE", "roles", [role.encode() for role in roles]))
    if anchors is not None:
        inputs.append(_integers("ANCHOR", "anchors", anchors, np.int32))
    if prev_state is not None:
        inputs.append(_bytes("PREV_STATE", "prev_state", [prev_state]))
    return inputs


def _request(
    *,
    crops: Sequence[ImageLike] | None = None,
    frame: ImageLike | None = None,
    boxes: ArrayLike | None = None,
    color_order: ColorOrder | None = None,
) -> _Request:
    if crops is not None and frame is None and boxes is None:
        files = [encoded(crop, f"crops[{row}]", color_order) for row, crop in enumerate(crops)]
        return _Request([_bytes("CROPS", "crops", files)])
    if frame is None or boxes is None or crops is not None:
        raise ValueError("expected either crops, or frame and boxes")
    corners = np.asarray(boxes, dtype=np.float32)
    places = _tensor("BOXES", corners if corners.size else corners.reshape(0, 4), "FP32")
    if isinstance(frame, bytes | Path):
        return _Request([_bytes("FRAME", "frame", [encoded(frame, "frame", None)]), places])
    pixels, order = raw(frame, "frame", color_order)
    return _Request([places], {"color_order": order} if order else {}, pixels)


def _infer(
    link: Link, model: str, request: _Request, others: Sequence[triton.InferInput]
) -> triton.InferResult:
    inputs = [*request.inputs, *others]
    if request.raw is None:
        return link.wire.infer(model, inputs, request.parameters)
    if link.regions is None:
        frame = _tensor("RAW_FRAME", request.raw, "UINT8")
        return link.wire.infer(model, [frame, *inputs], request.parameters)
    try:
        with link.regions.holding("RAW_FRAME", request.raw) as frame:
            return link.wire.infer(model, [frame, *inputs], request.parameters)
    except ServerError as error:
        if not link.regions.lost(error):
            raise
    # The server was started anew, and knows none of the earlier regions.
    link.regions.clear()
    with link.regions.holding("RAW_FRAME", request.raw) as frame:
        return link.wire.infer(model, [frame, *inputs], request.parameters)


def _said_of_crops(answer: triton.InferResult) -> dict[str, Any]:
    names = ("LABELS", "MARGIN", "OUTLIER_SCORE", "COORDINATES", "REGION_FALLBACK")
    return {name.lower(): _output(answer, name).copy() for name in names}


def _output(answer: triton.InferResult, name: str) -> NDArray[Any]:
    array = answer.as_numpy(name)
    if array is None:
        raise ServerError(f"the answer has no output {name}")
    return np.asarray(array)


def _tensor(name: str, array: NDArray[Any], datatype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor


def _bytes(name: str, argument: str, values: Sequence[bytes]) -> triton.InferInput:
    for value in values:
        if not isinstance(value, bytes):
            raise TypeError(f"{argument}: {type(value).__name__}, expected bytes")
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return _tensor(name, array, "BYTES")


def _integers(name: str, argument: str, values: ArrayLike, dtype: type[np.integer[Any]]) -> triton.InferInput:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{argument}: array of {array.dtype}, expected whole numbers; -1 stands for unknown")
    limits = np.iinfo(dtype)
    if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise ValueError(
            f"{argument}: {array.min()} to {array.max()}, expected numbers of {limits.bits} bits"
        )
    return _tensor(name, array.astype(dtype), f"INT{limits.bits}")

"""Teams of football players: requests to `fit_teams` and `classify_teams`, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siglip_serve_client._operations.encoding import ColorOrder, ImageLike, encoded, raw, refuse_one_image
from siglip_serve_client._operations.link import Link
from siglip_serve_client._operations.requests import (
    Answer,
    Call,
    Tensor,
    output,
    refuse_single,
    refuse_unknown,
    strings,
    utf8,
)

__all__ = ["TeamFit", "TeamImages", "Teams", "ask_fit", "ask_teams", "hint_inputs"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Teams:
    """The teams of N crops, in their order.

    Attributes:
        labels: int32 [N], the team, from 0; -1 is not assigned.
        margin: float32 [N], from 0 (half-way between two teams) to 1 (at a team's centre).
        outlier_score: float32 [N]; 1 is typical, larger is less like any team.
        coordinates: float32 [N, 2], to plot: the place along the line between the teams, and across it.
        region_fallback: bool [N], True where the jersey region was empty and the whole crop was used.
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
    """A fit, and the teams of the crops that it was made from.

    Attributes:
        state: for `classify_teams` and later fits. Any server of the same checkpoint reads it. Empty if no
            teams were found.
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
class _Request:
    """Inputs and parameters of a request. `raw` is a frame that is not among the inputs yet."""

    inputs: list[Tensor]
    parameters: Mapping[str, str | bool] = field(default_factory=dict)
    raw: NDArray[np.uint8] | None = None


async def ask_fit(link: Link, images: TeamImages, hints: Sequence[Tensor]) -> TeamFit:
    """A fit of teams. See `Client.fit_teams`."""
    refuse_unknown("fit_teams", images, TeamImages.__annotations__)
    request = await asyncio.to_thread(partial(_request, **images))
    answer = await _infer(link, "fit_teams", request, hints)
    return TeamFit(
        **_said_of_crops(answer),
        state=output(answer, "STATE").item(),
        status=tuple(word.decode() for word in output(answer, "STATUS")),
    )


async def ask_teams(link: Link, images: TeamImages, state: bytes) -> Teams:
    """The teams of players. See `Client.classify_teams`."""
    refuse_unknown("classify_teams", images, TeamImages.__annotations__)
    stated = strings("STATE", "state", [state])
    request = await asyncio.to_thread(partial(_request, **images))
    answer = await _infer(link, "classify_teams", request, [stated])
    return Teams(**_said_of_crops(answer))


def hint_inputs(
    *,
    track_ids: ArrayLike | None,
    roles: Sequence[str] | None,
    anchors: ArrayLike | None,
    prev_state: bytes | None,
    k: int,
) -> list[Tensor]:
    """The inputs of `fit_teams` other than the pictures, without those that are None.

    Raises:
        TypeError, ValueError: not whole numbers, or not of a size that can be sent.
    """
    inputs = [_integers("K", "k", [k], np.int32)]
    if track_ids is not None:
        inputs.append(_integers("TRACK_ID", "track_ids", track_ids, np.int64))
    if roles is not None:
        inputs.append(strings("ROLE", "roles", utf8("roles", roles)))
    if anchors is not None:
        inputs.append(_integers("ANCHOR", "anchors", anchors, np.int32))
    if prev_state is not None:
        inputs.append(strings("PREV_STATE", "prev_state", [prev_state]))
    return inputs


def _request(
    *,
    crops: Sequence[ImageLike] | None = None,
    frame: ImageLike | None = None,
    boxes: ArrayLike | None = None,
    color_order: ColorOrder | None = None,
) -> _Request:
    if crops is not None and frame is None and boxes is None:
        refuse_one_image("crops", crops)
        files = [encoded(crop, f"crops[{row}]", color_order) for row, crop in enumerate(crops)]
        return _Request([strings("CROPS", "crops", files)])
    if frame is None or boxes is None or crops is not None:
        raise ValueError("expected either crops, or frame and boxes")
    refuse_single("boxes", boxes, "boxes")
    corners = np.asarray(boxes, dtype=np.float32)
    places = _tensor("BOXES", corners if corners.size else corners.reshape(0, 4), "FP32")
    if isinstance(frame, bytes | str | Path):
        return _Request([strings("FRAME", "frame", [encoded(frame, "frame", None)]), places])
    pixels, order = raw(frame, "frame", color_order)
    return _Request([places], {"color_order": order} if order else {}, pixels)


async def _infer(link: Link, model: str, request: _Request, others: Sequence[Tensor]) -> Answer:
    call = Call(model, [*request.inputs, *others], request.parameters, link.timeout)
    if request.raw is None:
        return await link.transport.infer(call)
    if link.regions is not None:
        return await link.regions.ask(call, "RAW_FRAME", "UINT8", request.raw.shape, [request.raw])
    frame = _tensor("RAW_FRAME", request.raw, "UINT8")
    return await link.transport.infer(replace(call, inputs=[frame, *call.inputs]))


def _said_of_crops(answer: Answer) -> dict[str, Any]:
    names = ("LABELS", "MARGIN", "OUTLIER_SCORE", "COORDINATES", "REGION_FALLBACK")
    return {name.lower(): output(answer, name).copy() for name in names}


def _tensor(name: str, array: NDArray[Any], datatype: str) -> Tensor:
    return Tensor(name, datatype, array.shape, np.ascontiguousarray(array))


def _integers(name: str, argument: str, values: ArrayLike, dtype: type[np.integer[Any]]) -> Tensor:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{argument}: array of {array.dtype}, expected whole numbers; -1 stands for unknown")
    limits = np.iinfo(dtype)
    if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise ValueError(
            f"{argument}: {array.min()} to {array.max()}, expected numbers of {limits.bits} bits"
        )
    return _tensor(name, array.astype(dtype), f"INT{limits.bits}")

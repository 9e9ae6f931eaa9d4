"""Teams of football players in the gateway's own API: a fit, and teams by the state of an earlier fit."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client import TeamFit, TeamImages, Teams
from starlette.requests import Request
from starlette.responses import Response

from siglip_gateway.apis.fields import integer, listed, texts_of, wrong
from siglip_gateway.inputs import Text
from siglip_gateway.pictures import file_of, picture_of, standard_base64
from siglip_gateway.refusals import Refusal
from siglip_gateway.service import Service, json_object, json_response

__all__ = ["teams"]

_FIELDS = {
    "CROPS": "crops",
    "FRAME[0]": "image",
    "BOXES": "boxes",
    "TRACK_ID": "track_ids",
    "ROLE": "roles",
    "ANCHOR": "anchors",
    "PREV_STATE[0]": "prev_state",
    "STATE[0]": "state",
    "K[0]": "k",
}
_OF_FITS = ("track_ids", "roles", "anchors", "prev_state", "k")
_TOWER = "siglip_base_model"  # the image tower of the teams


async def teams(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /teams`: without `state` a fit of teams, with it the team of each crop."""
    fields = json_object(body)
    fit = fields.get("state") is None
    hints = _hints(fields) if fit else {}
    for name in () if fit else _OF_FITS:
        if fields.get(name) is not None:
            raise Refusal(400, f"{name}: belongs to a fit, leave it out or leave state out", param=name)
    state = b"" if fit else _state(fields, "state")
    images = await _images(service, fields)
    found: Teams
    if fit:
        found = await service.backend.ask(lambda client: client.fit_teams(**hints, **images), _FIELDS)
    else:
        found = await service.backend.ask(
            lambda client: client.classify_teams(state=state, **images), _FIELDS
        )
    checkpoint = await service.backend.described(_TOWER)
    service.counters.inputs(0, len(found))
    answer = {"model": checkpoint["checkpoint_name"], "note": checkpoint["checkpoint_note"] or None}
    return json_response({**answer, **_answer(found)})


def _answer(found: Teams) -> dict[str, Any]:
    answer: dict[str, Any] = {
        name: np.ascontiguousarray(getattr(found, name))
        for name in ("labels", "margin", "outlier_score", "coordinates", "region_fallback")
    }
    if isinstance(found, TeamFit):
        answer["state"] = base64.b64encode(found.state).decode()
        answer["status"] = found.status
    return answer


async def _images(service: Service, fields: Mapping[str, Any]) -> TeamImages:
    """The crops, or the frame and its boxes."""
    crops = fields.get("crops") is not None
    frame = fields.get("image") is not None
    if crops == frame or crops == (fields.get("boxes") is not None):
        raise Refusal(
            400,
            "expected either crops, or image and boxes",
            param="boxes" if frame and not crops else "crops",
            code="missing_input",
        )
    if not crops:
        picture = picture_of(fields["image"], "image")
        boxes = _boxes(listed(fields, "boxes"), service.options.max_crops)
        (file,) = await _files(service, [picture])
        return TeamImages(frame=file, boxes=boxes)
    rows = listed(fields, "crops")
    _refuse_many("crops", len(rows), service.options.max_crops)
    pictures = [picture_of(crop, f"crops[{index}]") for index, crop in enumerate(rows)]
    return TeamImages(crops=await _files(service, pictures))


async def _files(service: Service, pictures: Sequence[Any]) -> list[bytes]:
    resolved = await service.resolve(pictures, most_pictures=service.options.max_crops)
    found = [picture for picture in resolved if not isinstance(picture, Text)]
    return await asyncio.to_thread(lambda: [file_of(picture) for picture in found])


def _refuse_many(name: str, count: int, most: int) -> None:
    if count > most:
        raise Refusal(400, f"{name}: {count} crops, at most {most} are allowed", param=name)


def _boxes(rows: Sequence[Any], most: int) -> NDArray[np.float32]:
    _refuse_many("boxes", len(rows), most)
    for index, box in enumerate(rows):
        place, expected = f"boxes[{index}]", "a list of left, top, right and bottom in pixels"
        if not isinstance(box, list):
            raise wrong(place, box, expected)
        if len(box) != 4:
            raise Refusal(400, f"{place}: {len(box)} elements, expected {expected}", param=place)
        for corner, value in enumerate(box):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise wrong(f"{place}[{corner}]", value, "a number of pixels")
    with np.errstate(over="ignore"):  # Triton refuses what becomes infinite
        return np.array(rows, np.float64).reshape(-1, 4).astype(np.float32)


def _hints(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of the crops, as `AsyncClient.fit_teams` takes it."""
    hints: dict[str, Any] = {}
    for name, bits in (("track_ids", 64), ("anchors", 32)):
        if fields.get(name) is not None:
            rows = listed(fields, name)
            hints[name] = np.array(
                [integer(value, f"{name}[{index}]", bits) for index, value in enumerate(rows)],
                np.int64,
            )
    if fields.get("roles") is not None:
        hints["roles"] = texts_of(fields, "roles")
    if fields.get("k") is not None:
        hints["k"] = integer(fields["k"], "k", 32)
    if fields.get("prev_state") is not None:
        hints["prev_state"] = _state(fields, "prev_state")
    return hints


def _state(fields: Mapping[str, Any], name: str) -> bytes:
    value = fields[name]
    if not isinstance(value, str):
        raise wrong(name, value, "a state as base64 text")
    if not value.strip():
        raise Refusal(400, f"{name}: empty, because the fit found no teams", param=name)
    return base64.b64decode(standard_base64(value, name))

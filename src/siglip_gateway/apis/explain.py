"""Heatmaps in the gateway's own API: where in a picture the score of each prompt comes from."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from siglip_serve_client import ExplainOptions, Explanation
from siglip_serve_client.compact import as_base64
from starlette.requests import Request
from starlette.responses import Response

from siglip_gateway.apis.fields import boolean, chosen, number, shown, texts_of, wrong
from siglip_gateway.inputs import Input, Text
from siglip_gateway.pictures import file_of, picture_of
from siglip_gateway.refusals import Refusal
from siglip_gateway.service import Service, json_object, json_response

__all__ = ["explain"]

_FIELDS = {
    "INPUT_IMAGE[0]": "image",
    "PROMPTS": "prompts",
    "TEMPLATE": "templates",
    "BACKGROUND": "background",
    "MODE[0]": "mode",
    "NORMALIZE[0]": "normalize",
    "SIZE": "size",
    "COLORMAP[0]": "colormap",
    "OPACITY[0]": "opacity",
}
_WORDS = ("mode", "normalize", "colormap")  # Triton knows the choices
_MOST_NUMBERS = 4 * 2**20  # of heatmaps that are written as text: 50 MB
_AT_ONCE = 2**16  # numbers that are written before other requests get their turn
_LONGEST_SIDE = 2**31


@dataclass(frozen=True)
class _Asked:
    """A request, without its picture.

    Attributes:
        encoded: heatmaps are written as base64.
        heatmaps: they are wanted.
    """

    prompts: list[str]
    options: ExplainOptions
    encoded: bool
    heatmaps: bool

    def check_size(self, height: int, width: int) -> None:
        """Check that maps of this size can be written.

        Raises:
            Refusal: 400, they would be too long as text.
        """
        numbers = len(self.prompts) * height * width
        if self.heatmaps and not self.encoded and numbers > _MOST_NUMBERS:
            raise Refusal(
                400,
                f"encoding_format: {numbers} numbers of heatmaps as float, at most {_MOST_NUMBERS} are "
                "allowed; choose base64, or a smaller size",
                param="encoding_format",
                code="invalid_value",
            )


async def explain(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /explain`: heatmaps of prompts over a picture, with their scores."""
    fields = json_object(body)
    asked = _asked(fields)
    if "size" in asked.options:
        asked.check_size(*asked.options["size"])
    inputs: list[Input] = [picture_of(fields.get("image"), "image")]
    for name in ("prompts", "templates", "background"):
        inputs += [Text(f"{name}[{index}]", text) for index, text in enumerate(texts_of(fields, name))]
    picture, *_ = await service.resolve(inputs)
    if isinstance(picture, Text):
        raise TypeError("a picture became a text")
    file = file_of(picture)
    found = await service.backend.ask(
        lambda client: client.explain(file, asked.prompts, **asked.options), _FIELDS
    )
    asked.check_size(*found.heatmaps.shape[1:])
    checkpoint = await service.backend.checkpoint()
    service.counters.inputs(len(asked.prompts), 1)
    return json_response({"model": checkpoint.name, **await _answer(found, asked)})


def _asked(fields: Mapping[str, Any]) -> _Asked:
    prompts = texts_of(fields, "prompts")
    if not prompts:
        raise Refusal(400, "prompts: missing, expected a list of texts", param="prompts")
    options: dict[str, Any] = {
        "overlays": boolean(fields, "overlays", False),
        "truncation": boolean(fields, "truncate", False),
    }
    for name in ("templates", "background"):
        if fields.get(name) is not None:
            options[name] = texts_of(fields, name)
    for name in _WORDS:
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "a text")
        if value is not None:
            options[name] = value
    if fields.get("size") is not None:
        options["size"] = _size(fields["size"])
    opacity = number(fields, "opacity", 0.0, 1.0)
    if opacity is not None:
        options["opacity"] = opacity
    encoding = fields.get("encoding_format")
    encoded = encoding is not None and chosen(encoding, "encoding_format", ("float", "base64")) == "base64"
    return _Asked(prompts, cast(ExplainOptions, options), encoded, bool(boolean(fields, "heatmaps", True)))


def _size(value: object) -> tuple[int, int]:
    expected = "a list of height and width, whole numbers of at least 1"
    if not isinstance(value, list):
        raise wrong("size", value, expected)
    whole = [side for side in value if isinstance(side, int) and not isinstance(side, bool)]
    if len(value) != 2 or len(whole) != 2 or not all(0 < side < _LONGEST_SIDE for side in whole):
        raise Refusal(400, f"size: {shown(value)}, expected {expected}", param="size", code="invalid_value")
    return whole[0], whole[1]


async def _answer(found: Explanation, asked: _Asked) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "prompts": found.prompts,
        "scores": np.ascontiguousarray(found.scores),
        "unattributed": np.ascontiguousarray(found.unattributed),
        "image_size": found.heatmaps.shape[1:],
        "patch_maps": await _numbers(found.patch_maps),
    }
    if asked.heatmaps and asked.encoded:
        flat = found.heatmaps.reshape(len(found.heatmaps), -1)
        answer["heatmaps"] = await asyncio.to_thread(as_base64, flat)
    elif asked.heatmaps:
        answer["heatmaps"] = await _numbers(found.heatmaps)
    if asked.options["overlays"]:
        files = [base64.b64encode(file).decode() for file in found.overlay_files]
        answer["overlays"] = [f"data:image/png;base64,{file}" for file in files]
    return answer


async def _numbers(maps: NDArray[np.float32]) -> list[list[orjson.Fragment]]:
    """Maps [Q, H, W] as JSON, some rows at a time, so that other requests are answered meanwhile."""
    rows = max(1, _AT_ONCE // maps.shape[2])
    written = []
    for heatmap in maps:
        parts = []
        for start in range(0, len(heatmap), rows):
            block = np.ascontiguousarray(heatmap[start : start + rows], np.float32)
            text = orjson.dumps(block, option=orjson.OPT_SERIALIZE_NUMPY)
            parts.append(orjson.Fragment(text[1:-1]))
            await asyncio.sleep(0)
        written.append(parts)
    return written

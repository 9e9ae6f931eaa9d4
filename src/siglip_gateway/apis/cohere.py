"""Cohere's `POST /v2/embed`."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.compact import COMPACT, as_base64, compact
from starlette.requests import Request
from starlette.responses import Response

from siglip_gateway.apis.fields import chosen, listed, texts_of, whole, wrong
from siglip_gateway.apis.openai import part_of_content
from siglip_gateway.inputs import Input, Text
from siglip_gateway.pictures import picture_of, read_header
from siglip_gateway.refusals import Refusal
from siglip_gateway.service import Dialect, Service, json_object, json_response

__all__ = ["COHERE", "embed", "inputs_of"]

_KINDS = ("float", *COMPACT, "base64")


def _error(refusal: Refusal) -> Mapping[str, Any]:
    return {"id": str(uuid.uuid4()), "message": refusal.message}


COHERE = Dialect("cohere", _error)


async def embed(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /v2/embed`."""
    asked = json_object(body)
    kinds = [
        chosen(kind, f"embedding_types[{index}]", _KINDS)
        for index, kind in enumerate(listed(asked, "embedding_types"))
    ] or ["float"]
    truncate = asked.get("truncate")
    cut = chosen(truncate, "truncate", ("NONE", "END")) if truncate is not None else "END"
    inputs = inputs_of(asked)
    width = whole(asked, "output_dimension")
    checkpoint = await service.backend.checkpoint()
    service.dimensions.check(width, "output_dimension", checkpoint)
    resolved = await service.resolve(inputs)
    vectors = await service.embed(resolved, truncation=cut == "END", dimensions=width)
    pictures = [item for item in resolved if not isinstance(item, Text)]
    return json_response(
        {
            "id": str(uuid.uuid4()),
            "response_type": "embeddings_by_type",
            "embeddings": {kind: _written(vectors, kind) for kind in kinds},
            "texts": [item.text for item in resolved if isinstance(item, Text)],
            "images": [asdict(read_header(picture)) for picture in pictures],
            "meta": {"api_version": {"version": "2"}, "billed_units": {"images": len(pictures)}},
        }
    )


def inputs_of(body: Mapping[str, Any]) -> list[Input]:
    """The texts, the images or the mixed inputs of a request.

    Raises:
        Refusal: 400, none or more than one of these, or a malformed one. The message names the index.
    """
    given = [name for name in ("texts", "images", "inputs") if body.get(name)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise Refusal(400, f"expected one of texts, images and inputs, got {found}")
    if given == ["texts"]:
        return [Text(f"texts[{index}]", text) for index, text in enumerate(texts_of(body, "texts"))]
    if given == ["images"]:
        return [picture_of(image, f"images[{index}]") for index, image in enumerate(listed(body, "images"))]
    return [_of_input(value, f"inputs[{index}]") for index, value in enumerate(listed(body, "inputs"))]


def _of_input(value: object, where: str) -> Input:
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(content, list):
        raise wrong(where, value, "an object with a list named content")
    if len(content) != 1:
        raise Refusal(
            400,
            f"{where}: {len(content)} parts in content, expected 1: each part has a vector of its own",
        )
    return part_of_content(content[0], where)


def _written(vectors: NDArray[np.float32], kind: str) -> Sequence[str] | NDArray[Any]:
    if kind == "float":
        return vectors
    return as_base64(vectors) if kind == "base64" else compact(vectors, kind)

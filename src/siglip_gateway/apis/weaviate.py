"""The inference API of Weaviate's module multi2vec-clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from siglip_gateway.apis.fields import listed, texts_of
from siglip_gateway.inputs import Input, Text
from siglip_gateway.pictures import picture_of
from siglip_gateway.refusals import Refusal
from siglip_gateway.service import Dialect, Service, json_object, json_response

__all__ = ["WEAVIATE", "live", "meta", "ready", "vectorize"]


def _error(refusal: Refusal) -> Mapping[str, Any]:
    return {"error": refusal.message}


WEAVIATE = Dialect("weaviate", _error)


async def vectorize(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /vectorize`. Texts that are too long are cut, as Weaviate's own container does."""
    asked = json_object(body)
    texts, images = texts_of(asked, "texts"), listed(asked, "images")
    inputs: list[Input] = [Text(f"texts[{index}]", text) for index, text in enumerate(texts)]
    inputs += [picture_of(image, f"images[{index}]") for index, image in enumerate(images)]
    vectors: Any = await service.embed(inputs, truncation=True) if inputs else []
    return json_response({"textVectors": vectors[: len(texts)], "imageVectors": vectors[len(texts) :]})


async def meta(service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /meta`."""
    checkpoint = await service.backend.checkpoint()
    return json_response({"model": checkpoint.name, "dimensions": checkpoint.width, "note": checkpoint.note})


async def live(_service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /.well-known/live`: this process answers."""
    return Response(status_code=204)


async def ready(service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /.well-known/ready`: Triton computes."""
    await service.backend.healthy()
    return Response(status_code=204)

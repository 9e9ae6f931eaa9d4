"""The gateway's own API: labels, health and metrics."""

from __future__ import annotations

from siglip_serve_client.errors import ClientError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from siglip_gateway.apis.fields import boolean, texts_of
from siglip_gateway.apis.openai import error_object
from siglip_gateway.inputs import Text
from siglip_gateway.pictures import picture_of
from siglip_gateway.refusals import Refusal, refusal_of
from siglip_gateway.service import Dialect, Service, json_object, json_response

__all__ = ["OWN", "classify", "health", "metrics"]

OWN = Dialect("own", error_object)


async def classify(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /classify`: the probabilities of labels for a picture."""
    asked = json_object(body)
    labels = texts_of(asked, "labels")
    if not labels:
        raise Refusal(400, "labels: missing, expected a list of texts", param="labels")
    templates = texts_of(asked, "templates") or None
    softmax = bool(boolean(asked, "softmax"))
    (picture,) = await service.resolve([picture_of(asked.get("image"), "image")])
    if isinstance(picture, Text):
        raise TypeError("a picture became a text")
    scores = await service.backend.classify(picture, labels, templates, softmax)
    checkpoint = await service.backend.checkpoint()
    service.counters.inputs(0, 1)
    return json_response({"model": checkpoint.name, "labels": labels, "probabilities": scores})


async def health(service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /health`: 200 after a real inference, which calls within a second share, or 503."""
    try:
        width = await service.backend.healthy()
        checkpoint = await service.backend.checkpoint()
    except ClientError as error:
        return json_response({"status": "unhealthy", "reason": refusal_of(error).message}, 503)
    return json_response({"status": "healthy", "model": checkpoint.name, "dimensions": width})


async def metrics(service: Service, request: Request, _body: bytes) -> Response:
    """Answer `GET /metrics` in the text format of Prometheus."""
    service.keys.check(request.headers)
    text = service.counters.text(service.turns.running, service.turns.waiting)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

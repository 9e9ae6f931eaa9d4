"""The gateway's own API: labels, health and metrics."""

from __future__ import annotations

import re

from siglip_serve_client.errors import ClientError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from siglip_gateway.apis.fields import boolean, texts_of
from siglip_gateway.apis.openai import OPENAI
from siglip_gateway.inputs import Input, Text
from siglip_gateway.pictures import file_of, picture_of
from siglip_gateway.refusals import Refusal, refusal_of
from siglip_gateway.service import Dialect, Service, json_object, json_response

__all__ = ["OWN", "classify", "health", "metrics"]

# The bundled checkpoints say so in the first part of their note.
_DRAWINGS_ONLY = re.compile(r"^[^;]*\bdraw(n|ings)\b[^;]*\bonly\b")

_FIELDS = {"INPUT_IMAGE[0]": "image", "LABELS": "labels", "TEMPLATE": "templates"}

OWN = Dialect("own", OPENAI.error)


async def classify(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /classify`: the probabilities of labels for a picture."""
    asked = json_object(body)
    labels = texts_of(asked, "labels")
    if not labels:
        raise Refusal(400, "labels: missing, expected a list of texts", param="labels")
    templates = texts_of(asked, "templates") or None
    softmax, truncation = bool(boolean(asked, "softmax")), bool(boolean(asked, "truncate"))
    inputs: list[Input] = [picture_of(asked.get("image"), "image")]
    inputs += [Text(f"labels[{index}]", label) for index, label in enumerate(labels)]
    picture, *_ = await service.resolve(inputs)
    if isinstance(picture, Text):
        raise TypeError("a picture became a text")
    file = file_of(picture)
    scores = await service.backend.ask(
        lambda client: client.classify(
            file, labels, templates=templates, softmax=softmax, truncation=truncation
        ),
        _FIELDS,
    )
    checkpoint = await service.backend.checkpoint()
    service.counters.inputs(0, 1)
    return json_response({"model": checkpoint.name, "labels": labels, "probabilities": scores})


async def health(service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /health`: 200 after a real inference of both towers, or 503 with those that failed.

    Calls within a second share an inference.
    """
    found = await service.backend.health()
    failed = {name: refusal_of(error).message for name, error in found.failed.items()}
    checkpoint = None
    try:
        if not failed:
            checkpoint = await service.backend.checkpoint()
    except ClientError as error:
        failed = {"description": refusal_of(error).message}
    towers = {name: "failed" if name in failed else "healthy" for name in ("image", "text")}
    towers |= dict.fromkeys(found.missing, "not served")
    if checkpoint is None:
        reason = "; ".join(f"{name}: {message}" for name, message in failed.items())
        return json_response(
            {"status": "unhealthy", "reason": reason, "failed": list(failed), "towers": towers}, 503
        )
    return json_response(
        {
            "status": "healthy",
            "model": checkpoint.name,
            "dimensions": checkpoint.width,
            "towers": towers,
            "drawings_only": bool(_DRAWINGS_ONLY.search(checkpoint.note)),
            "note": checkpoint.note or None,
        }
    )


async def metrics(service: Service, request: Request, _body: bytes) -> Response:
    """Answer `GET /metrics` in the text format of Prometheus."""
    service.keys.check(request.headers)
    text = service.counters.text(service.turns.running, service.turns.waiting)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

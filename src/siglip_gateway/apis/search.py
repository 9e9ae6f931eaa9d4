"""Search by text or picture in the gateway's own API, over the output of `siglip-serve embed`."""

from __future__ import annotations

from contextlib import suppress

from siglip_serve_client.errors import ClientError
from starlette.requests import Request
from starlette.responses import Response

from siglip_gateway.apis.fields import whole
from siglip_gateway.apis.openai import parse
from siglip_gateway.refusals import Refusal
from siglip_gateway.search import Search
from siglip_gateway.service import Service, json_object, json_response

__all__ = ["IMAGES", "describe", "image", "search"]

IMAGES = "/search/image/"
_DEFAULT, _MOST = 20, 100  # results
_HEADERS = {
    "cache-control": "private, no-cache",  # another index gives a number to another picture
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
}


async def describe(service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /search`: if there is an index, its size, and the checkpoint that it was made with."""
    found = service.search
    if found is None:
        missing = "no index; --search names an output of siglip-serve embed"
        return json_response({"available": False, "count": 0, "dimensions": 0, "reason": missing})
    reason = None
    with suppress(ClientError):  # nothing is known: the checkpoint is compared again at the first search
        reason = found.mismatch(await service.backend.checkpoint())
    answer = {
        "available": reason is None,
        "count": len(found.index),
        "dimensions": found.index.width,
        "model": found.index.checkpoint or None,
        "images": found.pictures is not None,
    }
    return json_response(answer if reason is None else {**answer, "reason": reason})


async def search(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /search`: the rows of the index that are nearest to a text or a picture, best first."""
    fields = json_object(body)
    found = _available(service)
    count = whole(fields, "k")
    if count is None:
        count = _DEFAULT
    if not 1 <= count <= _MOST:
        raise Refusal(400, f"k: {count}, expected 1 to {_MOST}", param="k", code="invalid_value")
    asked = parse(fields)
    if len(asked.inputs) != 1:
        raise Refusal(400, f"input: {len(asked.inputs)} inputs, expected one", param="input")
    checkpoint = await service.backend.checkpoint()
    if reason := found.mismatch(checkpoint):
        raise Refusal(501, reason, code="index_mismatch")
    vectors = await service.embed(asked.inputs, normalized=True, truncation=asked.truncation)
    results = []
    for hit, name, has_picture in await found.find(vectors[0], count):
        result = {"name": name, "score": hit.score, "index": hit.index}
        results.append({**result, "image": f"{IMAGES}{hit.index}"} if has_picture else result)
    return json_response({"model": checkpoint.name, "results": results})


async def image(service: Service, request: Request, _body: bytes) -> Response:
    """Answer `GET /search/image/{index}`: the picture of a row, as its file is."""
    found = _available(service)
    index = request.path_params["index"]
    if not index.isdecimal() or not index.isascii() or len(index) > 18:
        raise Refusal(404, f"index: {index[:40]!r}, expected the number of a row", param="index")
    data, kind = await found.picture(int(index), service.options.max_download)
    return Response(data, media_type=kind, headers=_HEADERS)


def _available(service: Service) -> Search:
    if service.search is None:
        raise Refusal(
            501,
            "there is no index to search; --search of the gateway names an output of siglip-serve embed",
            code="no_index",
        )
    return service.search

"""The API of Immich's machine learning service: its CLIP tasks, with all others relayed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import parse_qsl

import aiohttp
import orjson
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from siglip_gateway.inputs import File, Text
from siglip_gateway.pictures import read_header
from siglip_gateway.refusals import Refusal
from siglip_gateway.service import Dialect, Service, json_response

__all__ = ["IMMICH", "ping", "predict"]


def _error(refusal: Refusal) -> Mapping[str, Any]:
    return {"detail": refusal.message}


IMMICH = Dialect("immich", _error)


async def ping(_service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /ping`."""
    return PlainTextResponse("pong")


async def predict(service: Service, request: Request, body: bytes) -> Response:
    """Answer `POST /predict`. Texts that are too long are cut, as Immich does."""
    form = await _form(request, body)
    try:
        return await _answered(service, request, body, form)
    finally:
        await form.close()


async def _answered(service: Service, request: Request, body: bytes, form: FormData) -> Response:
    entries = _entries(form)
    if set(entries) != {"clip"}:
        return await _relayed(service, request, body, entries)
    tasks = entries["clip"]
    if not isinstance(tasks, Mapping) or len(tasks) != 1 or not set(tasks) <= {"visual", "textual"}:
        raise Refusal(400, "entries.clip: expected one of visual and textual")
    if "textual" in tasks:
        text = form.get("text")
        if not isinstance(text, str):
            raise Refusal(400, "text: missing")
        (vector,) = await service.embed([Text("text", text)], truncation=True)
        return json_response({"clip": orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY).decode()})
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise Refusal(400, "image: missing")
    picture = File("image", await image.read())
    (vector,) = await service.embed([picture])
    header = read_header(picture)
    return json_response(
        {
            "clip": orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY).decode(),
            "imageHeight": header.height,
            "imageWidth": header.width,
        }
    )


async def _form(request: Request, body: bytes) -> FormData:
    kind = request.headers.get("content-type", "")
    if kind.startswith("application/x-www-form-urlencoded"):
        return FormData(dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)))
    if not kind.startswith("multipart/form-data"):
        raise Refusal(422, "expected a form of the type multipart/form-data")

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=4, max_fields=16, max_part_size=2**20)
    parser.spool_max_size = len(body) + 1  # nothing is written to a disk
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise Refusal(422, f"the form is malformed: {error}") from None


def _entries(form: FormData) -> dict[str, Any]:
    text = form.get("entries")
    if not isinstance(text, str):
        raise Refusal(422, "entries: missing")
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Refusal(422, f"entries: not JSON: {error}") from None
    if not isinstance(entries, dict) or not entries:
        raise Refusal(422, "entries: expected an object with a task")
    return entries


async def _relayed(service: Service, request: Request, body: bytes, entries: Mapping[str, Any]) -> Response:
    """The answer of Immich's own service to tasks that are not CLIP's. The body is passed on unchanged."""
    upstream = service.options.immich_upstream
    tasks = ", ".join(entries)[:200]
    if "clip" in entries:
        raise Refusal(400, f"the tasks {tasks} in one request: send clip in a request of its own")
    if upstream is None:
        raise Refusal(501, f"the task {tasks} is not served here, and no --immich-upstream is set")
    headers = {"content-type": request.headers["content-type"]}
    limit = aiohttp.ClientTimeout(total=service.options.timeout)
    try:
        async with (
            aiohttp.ClientSession(timeout=limit, auto_decompress=False) as session,
            session.post(
                f"{upstream.rstrip('/')}/predict", data=body, headers=headers, allow_redirects=False
            ) as answer,
        ):
            content = await answer.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Refusal(502, f"the service for {tasks} does not answer: {type(error).__name__}") from None
    return Response(content, answer.status, media_type=answer.headers.get("content-type"))

"""The parts that all APIs share, and the way of each request through them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from siglip_serve_client.errors import ClientError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from siglip_gateway.backend import Backend
from siglip_gateway.counters import Counters
from siglip_gateway.dimensions import Dimensions
from siglip_gateway.inputs import Input, Link, Resolved, Text
from siglip_gateway.options import GatewayOptions
from siglip_gateway.protection import Keys, Turns, read_body
from siglip_gateway.refusals import Refusal, refusal_of
from siglip_gateway.search import Search
from siglip_gateway.urls import UrlReader

__all__ = ["Dialect", "Endpoint", "Handler", "Service", "guarded", "json_object", "json_response", "refused"]


class Service:
    """A gateway's parts, one of each per worker process."""

    def __init__(
        self,
        options: GatewayOptions,
        backend: Backend,
        keys: Sequence[str],
        urls: UrlReader,
        dimensions: Dimensions,
        search: Search | None = None,
    ) -> None:
        self.options, self.backend, self.urls = options, backend, urls
        self.dimensions, self.search = dimensions, search
        self.keys = Keys(keys)
        self.turns = Turns(options.max_running, options.max_waiting, options.timeout)
        self.counters = Counters(options.metrics_folder)

    async def close(self) -> None:
        """End: complete what was begun, then close the connections."""
        await self.turns.drain(30.0)
        if self.search is not None:
            self.search.close()
        await self.urls.close()
        await self.backend.close()

    async def embed(
        self,
        inputs: Sequence[Input],
        *,
        normalized: bool | None = None,
        truncation: bool = False,
        dimensions: int | None = None,
    ) -> NDArray[np.float32]:
        """The vectors [N, D] float32 of inputs, in their order.

        Args:
            normalized: scale each to length 1, or None as the gateway's options say.
            dimensions: their width, which has passed `Dimensions.check`, or None for that of the checkpoint.

        Raises:
            Refusal: too many inputs, a text that is too long, or a URL that cannot be read.
            ClientError: as `Backend.embed`.
        """
        resolved = await self.resolve(inputs)
        scaled = self.options.normalized if normalized is None else normalized
        vectors = await self.backend.embed(resolved, scaled, truncation)
        texts = sum(isinstance(item, Text) for item in inputs)
        self.counters.inputs(texts, len(inputs) - texts)
        return self.dimensions.cut(vectors, dimensions, scaled)

    async def resolve(self, inputs: Sequence[Input], *, most_pictures: int | None = None) -> list[Resolved]:
        """Inputs within the limits, with all URLs fetched.

        Args:
            most_pictures: instead of the limits of inputs and pictures. URLs have the usual one nevertheless.

        Raises:
            Refusal: as `embed`.
        """
        options = self.options
        pictures = sum(not isinstance(item, Text) for item in inputs)
        links = sum(isinstance(item, Link) for item in inputs)
        most_inputs = most_pictures or options.max_inputs
        most_pictures = most_pictures or options.max_pictures
        if len(inputs) > most_inputs:
            raise Refusal(400, f"{len(inputs)} inputs, at most {most_inputs} are allowed")
        if pictures > most_pictures:
            raise Refusal(400, f"{pictures} pictures, at most {most_pictures} are allowed")
        if links > options.max_pictures:
            raise Refusal(400, f"{links} pictures as URLs, at most {options.max_pictures} are allowed")
        for item in inputs:
            if isinstance(item, Text) and len(item.text) > options.max_text:
                raise Refusal(
                    400,
                    f"{item.where}: {len(item.text)} characters, at most {options.max_text} are allowed",
                    param=item.where,
                )
        fetched = iter(await self.urls.read_all([item for item in inputs if isinstance(item, Link)]))
        return [next(fetched) if isinstance(item, Link) else item for item in inputs]


@dataclass(frozen=True)
class Dialect:
    """An API's name, and the form of its errors."""

    name: str
    error: Callable[[Refusal], Mapping[str, Any]]


Handler = Callable[[Service, Request, bytes], Coroutine[Any, Any, Response]]
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def guarded(dialect: Dialect, handler: Handler, *, open_to_all: bool = False) -> Endpoint:
    """An endpoint that checks the key, waits for a turn, reads the body, and answers errors in the dialect.

    Args:
        open_to_all: no key is needed and no turn, as for probes.
    """

    async def endpoint(request: Request) -> Response:
        service: Service = request.app.state.service
        try:
            if open_to_all:
                return await handler(service, request, b"")
            return await _in_turn(service, request, handler)
        except ClientDisconnect:
            return Response(status_code=499)
        except ClientError as error:
            return refused(dialect, refusal_of(error))
        except Refusal as refusal:
            return refused(dialect, refusal)

    return endpoint


async def _in_turn(service: Service, request: Request, handler: Handler) -> Response:
    options = service.options
    service.keys.check(request.headers)
    await service.turns.take()
    try:
        body = await read_body(request, options.max_body, options.upload_timeout)
    except BaseException:
        service.turns.give()
        raise
    service.counters.body(len(body))
    return await service.turns.finish(handler(service, request, body))


def refused(dialect: Dialect, refusal: Refusal) -> Response:
    """The answer to a refused request, in the dialect's own form."""
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.status in {408, 413}:
        headers["connection"] = "close"
    return json_response(dialect.error(refusal), refusal.status, headers)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON. Arrays of NumPy become lists."""
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, dict(headers or {}), media_type="application/json")


def json_object(body: bytes) -> dict[str, Any]:
    """The object in a JSON body.

    Raises:
        Refusal: 400, the body is not JSON, or no object.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refusal(
            400, f"the body is a JSON {type(found).__name__}, expected an object", code="invalid_json"
        )
    return found

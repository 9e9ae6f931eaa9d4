"""The application: its routes, what surrounds each request, and how it starts and ends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI
from siglip_serve_client import AsyncClient
from siglip_serve_client.projection import read_projection
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from siglip_gateway.apis import cohere, explain, immich, openai, own, search, teams, weaviate
from siglip_gateway.backend import Backend, TritonClient
from siglip_gateway.dimensions import Dimensions
from siglip_gateway.options import ENVIRONMENT, GatewayOptions, read_keys
from siglip_gateway.page.routes import add_page, is_page
from siglip_gateway.refusals import Refusal
from siglip_gateway.search import open_search
from siglip_gateway.service import Dialect, Endpoint, Handler, Service, guarded, refused
from siglip_gateway.urls import UrlReader

__all__ = ["create_app", "from_environment"]

_LOG = logging.getLogger("siglip_gateway.access")

_ROUTES: Sequence[tuple[str, str, Dialect, Handler, bool]] = (
    ("POST", "/v1/embeddings", openai.OPENAI, openai.embeddings, False),
    ("POST", "/embeddings", openai.OPENAI, openai.embeddings, False),
    ("GET", "/v1/models", openai.OPENAI, openai.models, False),
    ("GET", "/models", openai.OPENAI, openai.models, False),
    ("POST", "/v2/embed", cohere.COHERE, cohere.embed, False),
    ("POST", "/vectorize", weaviate.WEAVIATE, weaviate.vectorize, False),
    ("GET", "/meta", weaviate.WEAVIATE, weaviate.meta, False),
    ("GET", "/.well-known/live", weaviate.WEAVIATE, weaviate.live, True),
    ("GET", "/.well-known/ready", weaviate.WEAVIATE, weaviate.ready, True),
    ("POST", "/predict", immich.IMMICH, immich.predict, False),
    ("GET", "/ping", immich.IMMICH, immich.ping, True),
    ("POST", "/classify", own.OWN, own.classify, False),
    ("POST", "/explain", own.OWN, explain.explain, False),
    ("POST", "/teams", own.OWN, teams.teams, False),
    ("GET", "/search", own.OWN, search.describe, False),
    ("POST", "/search", own.OWN, search.search, False),
    ("GET", f"{search.IMAGES}{{index}}", own.OWN, search.image, False),
    ("GET", "/health", own.OWN, own.health, True),
    ("GET", "/metrics", own.OWN, own.metrics, True),
)
_DIALECTS = {path: dialect for _, path, dialect, _, _ in _ROUTES}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def create_app(
    options: GatewayOptions, client: TritonClient | None = None, urls: UrlReader | None = None
) -> FastAPI:
    """The gateway as an ASGI application.

    Args:
        client: speaks to Triton, or None for an `AsyncClient` of `options.triton`.
        urls: fetches pictures, or None for one that follows `options.url_hosts`.

    Raises:
        OSError, ValueError: the file of keys cannot be read, or holds none. The same for the projection.
        IndexFileError: the index that is to be searched cannot be read.
    """
    keys, index = read_keys(options.api_key_file), open_search(options)
    dimensions = Dimensions(read_projection(options.projection) if options.projection else None)
    if options.access_log:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        _LOG.setLevel(logging.INFO)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        speaker = client or AsyncClient(options.triton, timeout=options.timeout)
        reader = urls or UrlReader(options.url_hosts, options.max_download, options.download_timeout)
        backend = Backend(speaker, options.timeout)
        app.state.service = Service(options, backend, keys, reader, dimensions, index)
        try:
            yield
        finally:
            await app.state.service.close()

    app = FastAPI(
        title="SigLIP Serve gateway",
        description="Embeddings of images and texts, in the APIs that clients already speak.",
        lifespan=lifespan,
        exception_handlers={HTTPException: _not_found, Exception: _failed},
    )
    app.add_middleware(_Direct, endpoints=_add_routes(app))
    add_page(app)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(_Account)
    return app


def from_environment() -> FastAPI:
    """The application of a worker process, with the options that its parent wrote into the environment."""
    return create_app(GatewayOptions.from_json(os.environ[ENVIRONMENT]))


def _add_routes(app: FastAPI) -> dict[tuple[str, str], Endpoint]:
    """Add all paths; return their endpoints by method and path."""
    endpoints: dict[tuple[str, str], Endpoint] = {}
    for method, path, dialect, handler, open_to_all in _ROUTES:
        endpoints[method, path] = endpoint = guarded(dialect, handler, open_to_all=open_to_all)
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_class=Response,
            name=f"{dialect.name} {path}",
            description=handler.__doc__ or "",
            tags=[dialect.name],
            openapi_extra=_body_of(path) if method == "POST" else None,
        )
    return endpoints


def _body_of(path: str) -> dict[str, Any]:
    """The body of a route for the page /docs."""
    media = "multipart/form-data" if path == "/predict" else "application/json"
    return {"requestBody": {"required": True, "content": {media: {"schema": {"type": "object"}}}}}


async def _not_found(request: Request, error: Exception) -> Response:
    """The answer to an unknown path or method, in the dialect of the path."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    problem = {404: "no such path", 405: f"{request.method} is not served"}.get(status, str(error))
    answer = refused(_dialect(request), Refusal(status, f"{problem}: {request.url.path}"))
    if isinstance(error, HTTPException):
        answer.headers.update(error.headers or {})
    return answer


async def _failed(request: Request, _error: Exception) -> Response:
    """The answer to a fault of the gateway. The traceback is in the log."""
    return refused(_dialect(request), Refusal(500, "the gateway failed", code="internal_error"))


def _dialect(request: Request) -> Dialect:
    return _dialect_of(request.url.path) or openai.OPENAI


def _dialect_of(path: str) -> Dialect | None:
    return own.OWN if path.startswith(search.IMAGES) else _DIALECTS.get(path)


class _Account:
    """Counts each request, and writes one line of JSON about it to the log, without its contents."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, size = time.perf_counter(), 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            _account(scope, status, size, time.perf_counter() - begin)


class _Direct:
    """Asks the endpoint of a known path itself: FastAPI's way there is a tenth of a request's CPU time."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        endpoints: Mapping[tuple[str, str], Endpoint],
    ) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI."""
        found = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        answer = await found(Request(scope, receive, send))
        await answer(scope, receive, send)


def _account(scope: Scope, status: int, size: int, seconds: float) -> None:
    path = scope["path"]
    dialect = _dialect_of(path)
    # An unknown path counts as `other`, so that callers cannot make new series.
    name = dialect.name if dialect else "page" if is_page(path) else "other"
    scope["app"].state.service.counters.request(name, status, seconds)
    if _LOG.isEnabledFor(logging.INFO):
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": path[:200],
            "status": status,
            "ms": round(seconds * 1000, 1),
            "bytes": size,
        }
        _LOG.info(orjson.dumps(line).decode())

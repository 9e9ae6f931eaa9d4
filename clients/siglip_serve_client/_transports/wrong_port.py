"""Recognise the ports of a server, for callers that named one port in place of another."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from urllib.parse import urlsplit

from siglip_serve_client._transports.endpoint import Endpoint

__all__ = ["not_grpc", "not_http"]

_TIMEOUT = 2.0  # seconds of one look
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and empty SETTINGS
_FRAME_HEAD, _SETTINGS = 9, 4


async def not_grpc(endpoint: Endpoint) -> str | None:
    """The reason why gRPC found no server at the address, or None if it is not a wrong port."""
    address = endpoint.address
    if reason := await _metrics(endpoint):  # first, as this port answers 200 at every path
        return reason
    if await _get(endpoint, "/v2/health/live") is not None:
        scheme = "https" if endpoint.tls else "http"
        return (
            f"{address} is an HTTP port, expected the gRPC port (8001 by default), "
            f"or the address {scheme}://{address} for HTTP"
        )
    return None


async def not_http(endpoint: Endpoint) -> str | None:
    """The reason why an answer is not that of the HTTP port, or None if it is not a wrong port."""
    if await _speaks_http2(endpoint):
        scheme = "grpcs" if endpoint.tls else "grpc"
        return (
            f"{endpoint.address} is a gRPC port, expected the HTTP port (8000 by default), "
            f"or the address {scheme}://{endpoint.address} for gRPC"
        )
    return await _metrics(endpoint)


async def _metrics(endpoint: Endpoint) -> str | None:
    body = await _get(endpoint, "/metrics")
    if body is None or b"nv_inference_" not in body:
        return None
    return f"{endpoint.address} is the metrics port; by default 8001 is the gRPC port, and 8000 the HTTP port"


async def _get(endpoint: Endpoint, path: str) -> bytes | None:
    """The body of an answer of status 200, or None."""
    import aiohttp

    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT)) as session,
            session.get(
                endpoint.base + path,
                headers=endpoint.headers,
                ssl=endpoint.context() or True,
                allow_redirects=False,
            ) as answer,
        ):
            return await answer.read() if answer.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None


async def _speaks_http2(endpoint: Endpoint) -> bool:
    """Tell if the first frame of the other side is that of HTTP/2, which gRPC is made of."""
    place = urlsplit(endpoint.base)
    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ssl.SSLError):
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await asyncio.open_connection(place.hostname, place.port, ssl=endpoint.context())
            try:
                writer.write(_PREFACE)
                return (await reader.readexactly(_FRAME_HEAD))[3] == _SETTINGS
            finally:
                writer.close()
    return False

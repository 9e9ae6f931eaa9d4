"""Probes of the proxy in `docker/front`, where nginx is installed."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import socket
import ssl
import tempfile
import urllib.error
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from front import Front, run_front
from programs import PROGRAM_PATH

from tests.chaos.canaries import requests
from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.messages import http_parts
from tests.chaos.processes import HELPER

__all__ = ["run"]

_PATH = "/v2/models/embed_image/infer"
_RAW = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
_CLOSED: tuple[str, ...] = (
    "/v2/repository/index",
    "/v2/repository/models/embed_image/unload",
    "/v2/systemsharedmemory/status",
)
_CLOSED += ("/v2/logging", "/v2/trace/setting", "/metrics", "/v2/models/embed_image/stats", "/docs")


def _status(front: Front, path: str, body: bytes, headers: dict[str, str], key: str | None = None) -> str:
    try:
        return str(front.post(path, body, headers, key)[0])
    except (urllib.error.URLError, OSError):
        return "closed"


def _plain(front: Front) -> str:
    with socket.create_connection(("127.0.0.1", front.port), 10) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = connection.recv(100)
    return answer[9:12].decode() or "closed"


def _raw(front: Front, sent: bytes) -> str:
    """The status of raw bytes over TLS; `closed` for none."""
    context = ssl.create_default_context(cafile=front.certificate)
    with (
        socket.create_connection(("127.0.0.1", front.port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
        suppress(OSError),
    ):
        secure.sendall(sent)
        return secure.recv(100)[9:12].decode("latin-1") or "closed"
    return "closed"


def _smuggled(front: Front) -> str:
    head = f"POST {_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {front.key}\r\n"
    return _raw(
        front, f"{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics".encode()
    )


def _closed(path: str, front: Front) -> str:
    return _status(front, path, b"{}", {})


def _nested(depth: int) -> Callable[[Front], str]:
    body = b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}"
    return lambda front: _status(front, _PATH, body, {"Content-Type": "application/json"})


def _probes() -> Sequence[tuple[str, tuple[str, ...], Callable[[Front], str]]]:
    """Name, allowed results, and the probe."""
    refused = ("400", "403", "404", "405", "413", "415", "closed")
    about, data = http_parts(requests()["embed_image jpeg"])
    text = json.dumps(about).encode()
    whole, size = text + data, {"Inference-Header-Content-Length": str(len(text))}
    packed = gzip.compress(bytes(3 * 10**8), 1)
    probes: list[tuple[str, tuple[str, ...], Callable[[Front], str]]] = [
        ("an honest request", ("200",), lambda front: _status(front, _PATH, whole, size)),
        ("no key", ("401",), lambda front: _status(front, _PATH, whole, size, "")),
        ("a wrong key", ("401",), lambda front: _status(front, _PATH, whole, size, "0" * 64)),
        ("no TLS", ("400", "closed"), _plain),
        ("a body of 100 MB", refused, lambda front: _status(front, _PATH, bytes(10**8), _RAW)),
        ("JSON 200,000 deep", refused, _nested(200_000)),
        (
            "gzip of 300 MB",
            refused,
            lambda front: _status(front, _PATH, packed, {**_RAW, "Content-Encoding": "gzip"}),
        ),
        (
            "gzip of an honest body",
            refused,
            lambda f: _status(f, _PATH, gzip.compress(whole), {**size, "Content-Encoding": "gzip"}),
        ),
        ("two lengths of a body", refused, _smuggled),
        (
            "a JSON length of 10**9",
            refused,
            lambda f: _status(f, _PATH, whole, {"Inference-Header-Content-Length": "9" * 10}),
        ),
    ]
    probes += [(f"closed {path}", refused, partial(_closed, path)) for path in _CLOSED]
    return probes


async def run(context: Context) -> None:
    """Run the proxy before a server, and probe it."""
    missing = [name for name in ("nginx", "openssl") if shutil.which(name, path=PROGRAM_PATH) is None]
    if missing:
        context.report.add("front", "skipped", f"{', '.join(missing)} not installed")
        return
    async with context.site("front") as site:
        if not site.target.http:
            context.report.add("front", "skipped", "needs the server's HTTP")
            return
        await asyncio.to_thread(_probe, context, site)
        took = await wait_until_right(site, 60)
        context.report.add(
            "front", "the server answers right after the probes", took is not None, "True", took is None
        )
        deaths = [death.kind for death in site.target.deaths() if not death.kind.endswith(HELPER)]
        context.report.add("front", "deaths of processes", len(deaths), "0", bool(deaths))


def _probe(context: Context, site: Site) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="chaos-front-") as folder,
        run_front(site.target.http, site.target.grpc, Path(folder)) as front,
    ):
        for name, allowed, probe in _probes():
            got = probe(front)
            context.report.add("front", name, got, " or ".join(allowed), got not in allowed)

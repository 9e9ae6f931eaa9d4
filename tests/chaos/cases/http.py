"""Cases of HTTP: request lines, headers and bodies that are wrong, cut, compressed or chunked."""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections.abc import Callable
from typing import TypeAlias

from images import mutations

from tests.chaos.cases.base import Sent, World, chance
from tests.chaos.cases.protocol import simple_request
from tests.chaos.messages import http_parts, http_request

__all__ = ["broken_http"]

_STATIC: tuple[str, ...] = (
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/embed_image",
    "/v2/models/embed_image/config",
)
_STATIC += (
    "/v2/models/embed_image/stats",
    "/v2/models/stats",
    "/v2/repository/index",
    "/v2/systemsharedmemory/status",
)
_STATIC += (
    "/v2/logging",
    "/v2/trace/setting",
    "/metrics",
    "/",
    "//",
    "/v2/models//infer",
    "/v2/models/%00/infer",
)
_STATIC += (
    "/v2/models/embed_image/versions/x/infer",
    "/v2/models/../infer",
    "/v3",
    "/v2/models/" + "a" * 9000,
)


_Sender: TypeAlias = Callable[[random.Random, str, dict[str, str], bytes], tuple[str, Sent]]


def broken_http(rng: random.Random, world: World) -> tuple[str, Sent]:
    """Make a request whose line, headers or body are wrong or unusual."""
    request = simple_request(rng, world)
    about, data = http_parts(request)
    text = json.dumps(about).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return rng.choice(_SENDERS)(rng, f"/v2/models/{request.model}/infer", headers, text + data)


def _cannot_be_read(data: bytes) -> Sent:
    """Let the server close the connection, or wait for more."""
    return Sent("http", data, framed=False, whole=False)


def _other_method(rng: random.Random, *_: object) -> tuple[str, Sent]:
    path = rng.choice(_STATIC)
    method = rng.choice(("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS"))
    sent = http_request(path, b"" if method in {"GET", "HEAD"} else b"{}", {}, method)
    # An answer to HEAD has a length but no body, so nothing else may follow on the connection.
    return f"{method} {path[:60]}", _cannot_be_read(sent) if method == "HEAD" else Sent("http", sent)


def _broken_line(rng: random.Random, path: str, headers: dict[str, str], body: bytes) -> tuple[str, Sent]:
    raw = http_request(path, body, headers)
    lines = (
        b"",
        b"POST",
        b"POST  HTTP/1.1",
        b"\0\0",
        b"GET / HTTP/9.9",
        b"x" * 70000,
        b"POST / HTTP/1.1\r\n x",
    )
    return "a broken request line", _cannot_be_read(rng.choice(lines) + raw[raw.index(b"\r\n") :])


def _broken_header(rng: random.Random, path: str, headers: dict[str, str], body: bytes) -> tuple[str, Sent]:
    names = ("X", "X\r\n Y", "\0", "Content-Length", "Content-Length ", "Transfer-Encoding", "Host", "Expect")
    values = ("", "x" * 70000, "-1", "1e3", "chunked, chunked", "100-continue", "\0", "ü", "1" * 40)
    name, value = rng.choice(names), rng.choice(values)
    sent = http_request(path, body, {**headers, name: value})
    return f"header {name!r}: {value[:20]!r}", _cannot_be_read(sent)


def _short_body(rng: random.Random, path: str, headers: dict[str, str], body: bytes) -> tuple[str, Sent]:
    lie = rng.choice((len(body) + 1, len(body) + 10**6, 2**31, 2**40))
    sent = http_request(path, body, headers)
    sent = sent.replace(b"Content-Length: %d\r\n" % len(body), b"Content-Length: %d\r\n" % lie, 1)
    return f"a body of {len(body)} bytes that claims {lie}", Sent("http", sent, whole=False)


def _compressed(rng: random.Random, path: str, headers: dict[str, str], body: bytes) -> tuple[str, Sent]:
    zeros = rng.choice((10**6, 3 * 10**7))
    packed = gzip.compress(body, mtime=0) if chance(rng, 0.7) else _packed_zeros(zeros)
    if chance(rng, 0.3):
        packed = mutations(packed, rng)
    headers["Content-Encoding"] = rng.choice(("gzip", "deflate", "br", "gzip, gzip", "x"))
    about = f"Content-Encoding {headers['Content-Encoding']}, {len(packed)} bytes"
    return about, Sent("http", http_request(path, packed, headers))


@functools.cache
def _packed_zeros(count: int) -> bytes:
    return gzip.compress(bytes(count), mtime=0)


def _chunked(rng: random.Random, path: str, headers: dict[str, str], body: bytes) -> tuple[str, Sent]:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    parts = [body[at : at + 700] for at in range(0, len(body), 700)]
    sizes = [b"%x" % len(part) for part in parts]
    wrong = chance(rng, 0.5)
    if wrong:
        lies = (b"-1", b"x", b"ffffffffffffffff", b"7fffffff", b"", b"0", b"1;" + b"a" * 5000)
        sizes[rng.randrange(len(sizes))] = rng.choice(lies)
    chunks = b"".join(size + b"\r\n" + part + b"\r\n" for size, part in zip(sizes, parts, strict=True))
    sent = "\r\n".join(lines).encode() + b"\r\n\r\n" + chunks + b"0\r\n\r\n"
    return f"{len(parts)} chunks", _cannot_be_read(sent) if wrong else Sent("http", sent)


def _cut(rng: random.Random, path: str, headers: dict[str, str], body: bytes) -> tuple[str, Sent]:
    sent = http_request(path, body, headers)
    cut = sent[: rng.randrange(1, len(sent))]
    return f"cut after {len(cut)} bytes", _cannot_be_read(cut)


def _noise(rng: random.Random, *_: object) -> tuple[str, Sent]:
    return "random bytes", _cannot_be_read(rng.randbytes(rng.choice((1, 100, 5000))))


_SENDERS: tuple[_Sender, ...] = (
    _other_method,
    _broken_line,
    _broken_header,
    _short_body,
    _compressed,
    _chunked,
    _cut,
    _noise,
)

"""The routes of the page: its files, read once, with their types, tags and security headers.

The files need no key. What the page asks the APIs does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["FOLDER", "add_page", "is_page"]

FOLDER = Path(__file__).with_name("static")

_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# Only this origin is loaded from and asked. `blob:` and `data:` are pictures that the user chose.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # A browser asks each time whether its copy is still right, so versions are never mixed.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    """A file of the page as it is sent."""

    content: bytes
    headers: dict[str, str]


def add_page(app: FastAPI) -> None:
    """Add the page's routes to an application: `/`, and `/page/` with the other files."""
    for path in sorted(FOLDER.rglob("*")):
        kind = _TYPES.get(path.suffix)
        if kind is None or not path.is_file():
            continue
        name = path.relative_to(FOLDER).as_posix()
        app.add_api_route(
            "/" if name == _INDEX else f"/page/{name}",
            _sender(_read(path, kind)),
            methods=["GET", "HEAD"],
            response_class=Response,
            include_in_schema=False,
        )


def is_page(path: str) -> bool:
    """True for the paths of the page, for counters."""
    return path == "/" or path.startswith("/page/")


def _read(path: Path, kind: str) -> _File:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:32]
    return _File(content, {**_HEADERS, "content-type": kind, "etag": f'"{tag}"'})


def _sender(file: _File) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def send(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or file.headers["etag"] in (
            tag.strip().removeprefix("W/") for tag in known.split(",")
        ):
            return Response(status_code=304, headers=file.headers)
        # The server answers HEAD with these headers and without the content.
        return Response(file.content, headers=file.headers)

    return send

"""Refusals of the HTTP door, in the form of Triton's own errors."""

from __future__ import annotations

import json

from aiohttp import web

__all__ = ["SERVER", "RefusedError", "error_answer"]

SERVER = "siglip-serve"  # aiohttp would name its version and Python's


class RefusedError(Exception):
    """The door answers a request in place of Triton.

    Args:
        status: of HTTP; 503 tells the caller to ask again.
        message: cause, for the caller.
        close: close the connection, because the rest of the request is not read.
    """

    def __init__(self, status: int, message: str, *, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.close = status, close


def error_answer(status: int, message: str, *, close: bool = False) -> web.Response:
    """An answer with the body `{"error": message}`, as Triton writes it."""
    headers = {"Server": SERVER, "Content-Type": "application/json"}
    if status == 503:
        headers["Retry-After"] = "1"
    answer = web.Response(status=status, body=json.dumps({"error": message}).encode(), headers=headers)
    if close:
        answer.force_close()
    return answer

"""Refusals of requests: a status and a message, from which each dialect makes its own answer."""

from __future__ import annotations

import re

from siglip_serve_client.errors import (
    AccessError,
    ClientError,
    DeadlineError,
    InvalidInputError,
    MissingModelError,
    UnavailableError,
    UnreachableError,
)

__all__ = ["Refusal", "refusal_of"]

# Messages about an input begin with its place in the caller's request, such as `input[3]: `.
_PLACE = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*): ")


class Refusal(Exception):  # noqa: N818  (it is an answer)
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: for the caller. It names the input.
        param: name of the field at fault, if there is one.
        code: a word for programs.
        retry_after: seconds after which a retry may help, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after


def refusal_of(error: ClientError) -> Refusal:
    """The answer to an error of Triton or of the way to it."""
    message = str(error)
    if isinstance(error, InvalidInputError):
        place = _PLACE.match(message)
        return Refusal(400, message, param=place[1] if place else None, code="invalid_input")
    if isinstance(error, DeadlineError):
        return Refusal(504, message, code="timeout", retry_after=1)
    if isinstance(error, UnreachableError):
        return Refusal(503, "the inference server does not answer", code="unavailable", retry_after=5)
    if isinstance(error, UnavailableError):
        return Refusal(503, message, code="unavailable", retry_after=1)
    if isinstance(error, AccessError):
        return Refusal(502, "the inference server refuses this gateway", code="upstream_refused")
    if isinstance(error, MissingModelError):
        return Refusal(501, f"the inference server does not serve this: {message}", code="not_served")
    return Refusal(502, f"the inference server failed: {message}", code="upstream_failed")

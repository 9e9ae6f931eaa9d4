"""One gRPC connection: what the server answers, or a typed error."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from siglip_serve_client.errors import (
    ClientError,
    DeadlineError,
    InvalidInputError,
    ServerError,
    UnavailableError,
    UnreachableError,
)

__all__ = ["Wire", "translate"]

# Seconds before a request is sent again that the server was too busy for.
_BACK_OFF = (0.1, 0.3, 1.0, 3.0)
# What Triton puts before a message, and what says nothing to the caller.
_PREFIX = re.compile(r"^(\[request id: \S+\] |in ensemble '[^']*', )+")


class Wire:
    """A connection to `url` (`host:port`); `timeout` is in seconds, for one request."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self.timeout = timeout
        self.triton = triton.InferenceServerClient(url)

    def infer(
        self,
        model: str,
        inputs: Sequence[triton.InferInput],
        parameters: Mapping[str, str | bool] | None = None,
    ) -> triton.InferResult:
        """The model's answer; a server that is too busy is asked again, a few times.

        Raises:
            ClientError: as the server answers, or does not.
        """
        for pause in (*_BACK_OFF, None):
            try:
                return self.triton.infer(
                    model,
                    list(inputs),
                    parameters=dict(parameters) if parameters else None,
                    client_timeout=self.timeout,
                )
            except InferenceServerException as error:
                translated = translate(error, self.url)
                if pause is None or type(translated) is not UnavailableError:
                    raise translated from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close the connection."""
        self.triton.close()


def translate(error: InferenceServerException, url: str) -> ClientError:
    """The error of this package that says what `error` does."""
    status, message = str(error.status() or ""), _PREFIX.sub("", str(error.message() or error))
    if status.endswith("INVALID_ARGUMENT"):
        return InvalidInputError(message)
    if status.endswith("UNAVAILABLE"):
        if "connect" in message.lower():
            return UnreachableError(f"no server answers at {url}")
        return UnavailableError(message)
    if status.endswith("DEADLINE_EXCEEDED"):
        return DeadlineError(f"{url} did not answer in time")
    return ServerError(f"{status or 'no status'}: {message}")

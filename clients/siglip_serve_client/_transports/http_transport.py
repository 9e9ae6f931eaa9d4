"""How steps reach the server: gRPC and HTTP, each waited for by a thread or by an event loop."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tritonclient.utils import InferenceServerException

from siglip_serve_client._operations.requests import Answer, Call, Describe, Register, Tensor, Withdraw
from siglip_serve_client.errors import (
    AccessError,
    ClientError,
    DeadlineError,
    InvalidInputError,
    ServerError,
    UnavailableError,
    UnreachableError,
)

__all__ = [
    "AsyncTransport",
    "Endpoint",
    "Request",
    "Transport",
    "check_status",
    "connect",
    "connect_async",
    "error_of",
    "http_answer",
    "http_request",
]

# What Triton puts before a message, and what says nothing to the caller.
_PREFIX = re.compile(r"^(\[request id: \S+\] |in ensemble '[^']*', )+")
_STATUS: Mapping[str, type[ClientError]] = {
    "INVALID_ARGUMENT": InvalidInputError,
    "RESOURCE_EXHAUSTED": InvalidInputError,
    "400": InvalidInputError,
    "413": InvalidInputError,
    "UNAUTHENTICATED": AccessError,
    "PERMISSION_DENIED": AccessError,
    "401": AccessError,
    "403": AccessError,
    "UNAVAILABLE": UnavailableError,
    "429": UnavailableError,
    "502": UnavailableError,
    "503": UnavailableError,
    "504": UnavailableError,
}
_CONTROL_TIMEOUT = 30.0  # seconds for registering a region


class Transport(Protocol):
    """Performs steps and waits; safe with several threads."""

    def infer(self, call: Call) -> Answer:
        """The model's answer, or a ClientError."""

    def describe(self, step: Describe) -> dict[str, str]:
        """See `Describe`."""

    def register(self, step: Register) -> None:
        """See `Register`."""

    def withdraw(self, step: Withdraw) -> None:
        """See `Withdraw`."""

    def close(self) -> None:
        """Close the connections."""


class AsyncTransport(Protocol):
    """The same for an event loop."""

    async def infer(self, call: Call) -> Answer:
        """The model's answer, or a ClientError."""

    async def describe(self, step: Describe) -> dict[str, str]:
        """See `Describe`."""

    async def register(self, step: Register) -> None:
        """See `Register`."""

    async def withdraw(self, step: Withdraw) -> None:
        """See `Withdraw`."""

    async def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True)
class Endpoint:
    """Where the server is.

    Attributes:
        address: host:port.
        http: HTTP instead of gRPC.
        tls: the connection is encrypted.
        api_key: what a front proxy asks for.
        ca_file: certificates that are trusted instead of the system's.
    """

    address: str
    http: bool
    tls: bool
    api_key: str | None = None
    ca_file: Path | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None, ca_file: Path | str | None) -> Endpoint:
        """From `host:port` (gRPC), or a URL of the schemes grpc, grpcs, http, https.

        Raises:
            ValueError: anything else.
        """
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        wrong = f"url: {url!r}, expected host:port, or grpc://, grpcs://, http:// or https:// before it"
        if (
            parts.scheme not in {"grpc", "grpcs", "http", "https"}
            or parts.path.strip("/")
            or not parts.hostname
        ):
            raise ValueError(wrong)
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(wrong) from error
        default = {"http": 80, "https": 443}.get(parts.scheme)
        if port is None and default is None:
            raise ValueError(wrong)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        tls = parts.scheme in {"grpcs", "https"}
        return cls(
            f"{host}:{port or default}",
            parts.scheme.startswith("http"),
            tls,
            api_key,
            Path(ca_file) if ca_file is not None else None,
        )

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def base(self) -> str:
        """The URL of HTTP."""
        return f"{'https' if self.tls else 'http'}://{self.address}"

    def context(self) -> ssl.SSLContext | None:
        """Which certificates HTTP trusts; None without TLS."""
        return ssl.create_default_context(cafile=self.ca_file) if self.tls else None


def connect(endpoint: Endpoint, connections: int) -> Transport:
    """A transport for threads; `connections` are those that HTTP keeps open."""
    return _Http(endpoint, connections) if endpoint.http else _Grpc(endpoint)


def connect_async(endpoint: Endpoint, connections: int) -> AsyncTransport:
    """A transport for the running event loop."""
    return _AsyncHttp(endpoint, connections) if endpoint.http else _AsyncGrpc(endpoint)


def error_of(status: str, message: str, address: str) -> ClientError:
    """The error of this package for a status of gRPC, by its name, or HTTP, by its number."""
    status, message = status.removeprefix("StatusCode."), _PREFIX.sub("", message)
    if status == "DEADLINE_EXCEEDED":
        return DeadlineError(f"{address} did not answer in time")
    if status == "UNAVAILABLE" and "restricted" in message:
        return AccessError(message)
    if status == "UNAVAILABLE" and "connect" in message.lower() and "Connection reset" not in message:
        return UnreachableError(f"no server answers at {address}")
    kind = _STATUS.get(status)
    return kind(message) if kind else ServerError(f"{status or 'no status'}: {message}")


# ---- gRPC


def _grpc_call(call: Call) -> dict[str, Any]:
    import tritonclient.grpc as triton

    return {
        "model_name": call.model,
        "inputs": [_infer_input(triton, tensor) for tensor in call.inputs],
        "parameters": dict(call.parameters) or None,
        "client_timeout": call.timeout,
        "outputs": [triton.InferRequestedOutput(name) for name in call.outputs] or None,
    }


def _infer_input(triton: Any, tensor: Tensor) -> Any:
    made = triton.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
    if tensor.array is None:
        made.set_shared_memory(tensor.region, tensor.size)
    else:
        made.set_data_from_numpy(tensor.array)
    return made


def _grpc_options(endpoint: Endpoint) -> dict[str, Any]:
    roots = str(endpoint.ca_file) if endpoint.ca_file else None
    return {"url": endpoint.address, "ssl": endpoint.tls, "root_certificates": roots}


@contextmanager
def _translated(endpoint: Endpoint) -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        status, message = str(error.status() or ""), str(error.message() or error)
        raise error_of(status, message, endpoint.address) from error


class _Grpc:
    def __init__(self, endpoint: Endpoint) -> None:
        import tritonclient.grpc as triton

        self._endpoint, self._headers = endpoint, endpoint.headers or None
        self._client = triton.InferenceServerClient(**_grpc_options(endpoint))

    def infer(self, call: Call) -> Answer:
        with _translated(self._endpoint):
            answer: Answer = self._client.infer(**_grpc_call(call), headers=self._headers)
        return answer

    def describe(self, step: Describe) -> dict[str, str]:
        with _translated(self._endpoint):
            answer = self._client.get_model_config(
                step.model, headers=self._headers, client_timeout=step.timeout
            )
        return {name: value.string_value for name, value in answer.config.parameters.items()}

    def register(self, step: Register) -> None:
        with _translated(self._endpoint):
            self._client.register_system_shared_memory(
                step.name, step.name, step.size, headers=self._headers, client_timeout=_CONTROL_TIMEOUT
            )

    def withdraw(self, step: Withdraw) -> None:
        with _translated(self._endpoint):
            self._client.unregister_system_shared_memory(
                step.name, headers=self._headers, client_timeout=_CONTROL_TIMEOUT
            )

    def close(self) -> None:
        self._client.close()


class _AsyncGrpc:
    def __init__(self, endpoint: Endpoint) -> None:
        import tritonclient.grpc.aio as triton

        self._endpoint, self._headers = endpoint, endpoint.headers or None
        self._client = triton.InferenceServerClient(**_grpc_options(endpoint))

    async def infer(self, call: Call) -> Answer:
        with _translated(self._endpoint):
            answer: Answer = await self._client.infer(**_grpc_call(call), headers=self._headers)
        return answer

    async def describe(self, step: Describe) -> dict[str, str]:
        with _translated(self._endpoint):
            answer = await self._client.get_model_config(
                step.model, headers=self._headers, client_timeout=step.timeout
            )
        return {name: value.string_value for name, value in answer.config.parameters.items()}

    async def register(self, step: Register) -> None:
        with _translated(self._endpoint):
            await self._client.register_system_shared_memory(
                step.name, step.name, step.size, headers=self._headers, client_timeout=_CONTROL_TIMEOUT
            )

    async def withdraw(self, step: Withdraw) -> None:
        with _translated(self._endpoint):
            await self._client.unregister_system_shared_memory(
                step.name, headers=self._headers, client_timeout=_CONTROL_TIMEOUT
            )

    async def close(self) -> None:
        await self._client.close()


# ---- HTTP


@dataclass(frozen=True)
class Request:
    """A request over HTTP, whoever sends it."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    method: str = "POST"


def http_request(call: Call) -> Request:
    """The POST of a call: JSON that describes the inputs, and behind it their bytes."""
    import tritonclient.http as triton

    inputs = [_infer_input(triton, tensor) for tensor in call.inputs]
    body, size = triton.InferenceServerClient.generate_request_body(
        inputs,
        outputs=[triton.InferRequestedOutput(name, binary_data=True) for name in call.outputs] or None,
        parameters=dict(call.parameters) or None,
    )
    headers = {"Content-Type": "application/octet-stream"} | (
        {} if size is None else {"Inference-Header-Content-Length": str(size)}
    )
    return Request(f"/v2/models/{call.model}/infer", body, headers)


def _http_control(step: Register | Withdraw) -> Request:
    path = f"/v2/systemsharedmemory/region/{step.name}"
    if isinstance(step, Withdraw):
        return Request(f"{path}/unregister", b"", {})
    about = {"key": step.name, "offset": 0, "byte_size": step.size}
    return Request(f"{path}/register", json.dumps(about).encode(), {"Content-Type": "application/json"})


def _http_describe(step: Describe) -> Request:
    return Request(f"/v2/models/{step.model}/config", b"", {}, "GET")


def _parameters(body: bytes) -> dict[str, str]:
    described = json.loads(body).get("parameters", {})
    return {name: value["string_value"] for name, value in described.items()}


def http_answer(body: bytes, headers: Mapping[str, str]) -> Answer:
    """What the body of status 200 holds."""
    import tritonclient.http as triton

    size = headers.get("Inference-Header-Content-Length")
    answer: Answer = triton.InferenceServerClient.parse_response_body(
        body, header_length=None if size is None else int(size)
    )
    return answer


def check_status(status: int, body: bytes, endpoint: Endpoint) -> None:
    """Raise the error of this package, with the message in the body, unless the status is 200."""
    if status == 200:
        return
    text = body.decode(errors="replace")
    try:
        message = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        message = re.sub(r"<[^>]*>|\s+", " ", text).strip()[:300] or f"HTTP status {status}"
    raise error_of(str(status), message, endpoint.address)


class _Http:
    def __init__(self, endpoint: Endpoint, connections: int) -> None:
        import tritonclient.http  # noqa: F401 - here, before there are threads: it sets up gevent
        import urllib3

        self._endpoint = endpoint
        context = endpoint.context()
        self._pool = urllib3.PoolManager(maxsize=connections, retries=False, ssl_context=context)

    def infer(self, call: Call) -> Answer:
        return http_answer(*self._send(http_request(call), call.timeout))

    def describe(self, step: Describe) -> dict[str, str]:
        return _parameters(self._send(_http_describe(step), step.timeout)[0])

    def register(self, step: Register) -> None:
        self._send(_http_control(step), _CONTROL_TIMEOUT)

    def withdraw(self, step: Withdraw) -> None:
        self._send(_http_control(step), _CONTROL_TIMEOUT)

    def close(self) -> None:
        self._pool.clear()

    def _send(self, request: Request, timeout: float) -> tuple[bytes, Mapping[str, str]]:
        from urllib3 import Timeout, exceptions

        address = self._endpoint.address
        try:
            answer = self._pool.request(
                request.method,
                self._endpoint.base + request.path,
                body=request.body,
                headers={**self._endpoint.headers, **request.headers},
                timeout=Timeout(total=timeout),
            )
        except (exceptions.NewConnectionError, exceptions.ConnectTimeoutError) as error:
            raise UnreachableError(f"no server answers at {address}") from error
        except exceptions.TimeoutError as error:
            raise DeadlineError(f"{address} did not answer in time") from error
        except exceptions.SSLError as error:
            raise UnreachableError(f"{address} is not trusted: {error}") from error
        except (exceptions.HTTPError, OSError) as error:  # the connection broke: the server may be restarting
            raise UnavailableError(f"{address} broke the connection: {error}") from error
        check_status(answer.status, answer.data, self._endpoint)
        return answer.data, answer.headers


class _AsyncHttp:
    def __init__(self, endpoint: Endpoint, connections: int) -> None:
        import aiohttp

        self._endpoint = endpoint
        connector = aiohttp.TCPConnector(limit=connections, ssl=endpoint.context() or True)
        self._session = aiohttp.ClientSession(connector=connector, headers=endpoint.headers)

    async def infer(self, call: Call) -> Answer:
        return http_answer(*await self._send(http_request(call), call.timeout))

    async def describe(self, step: Describe) -> dict[str, str]:
        return _parameters((await self._send(_http_describe(step), step.timeout))[0])

    async def register(self, step: Register) -> None:
        await self._send(_http_control(step), _CONTROL_TIMEOUT)

    async def withdraw(self, step: Withdraw) -> None:
        await self._send(_http_control(step), _CONTROL_TIMEOUT)

    async def close(self) -> None:
        await self._session.close()

    async def _send(self, request: Request, timeout: float) -> tuple[bytes, Mapping[str, str]]:
        import aiohttp

        address = self._endpoint.address
        limit = aiohttp.ClientTimeout(total=timeout)
        url = self._endpoint.base + request.path
        try:
            async with self._session.request(
                request.method, url, data=request.body, headers=request.headers, timeout=limit
            ) as answer:
                body = await answer.read()
        except aiohttp.ClientSSLError as error:
            raise UnreachableError(f"{address} is not trusted: {error}") from error
        except aiohttp.ClientConnectorError as error:
            raise UnreachableError(f"no server answers at {address}") from error
        except TimeoutError as error:
            raise DeadlineError(f"{address} did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"{address} broke the connection: {error}") from error
        check_status(answer.status, body, self._endpoint)
        return body, answer.headers

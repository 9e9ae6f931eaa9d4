"""Requests over HTTP, with aiohttp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from siglip_serve_client._operations.requests import CONTROL_TIMEOUT, Answer, Call
from siglip_serve_client._transports.endpoint import Endpoint
from siglip_serve_client._transports.http_messages import (
    HttpAnswer,
    HttpRequest,
    infer_request,
    parameters_request,
    read_parameters,
    register_request,
    withdraw_request,
)
from siglip_serve_client._transports.status import check_status, is_triton
from siglip_serve_client._transports.wrong_port import not_http
from siglip_serve_client.errors import DeadlineError, RestartingError, UnavailableError, UnreachableError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["HttpTransport"]


class HttpTransport:
    """Connections that are kept open. They belong to the event loop of the first request.

    Args:
        connections: limit of open connections, or 0 for none.
    """

    def __init__(self, endpoint: Endpoint, connections: int) -> None:
        self._endpoint, self._connections = endpoint, connections
        self._session: aiohttp.ClientSession | None = None

    async def infer(self, call: Call) -> Answer:
        """Send a request and return the model's answer."""
        return HttpAnswer(*await self._send(infer_request(call), call.timeout))

    async def parameters(self, model: str, timeout: float) -> dict[str, str]:
        """The string parameters in the configuration of a model."""
        return read_parameters((await self._send(parameters_request(model), timeout))[0])

    async def register(self, name: str, size: int) -> None:
        """Let the server know a region of shared memory."""
        await self._send(register_request(name, size), CONTROL_TIMEOUT)

    async def withdraw(self, name: str) -> None:
        """Let the server forget a region."""
        await self._send(withdraw_request(name), CONTROL_TIMEOUT)

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _connected(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:  # here and not earlier: a session belongs to the running loop
            endpoint = self._endpoint
            connector = aiohttp.TCPConnector(limit=self._connections, ssl=endpoint.context() or True)
            # Triton compresses for clients that accept it, which takes longer than sending an embedding.
            headers = {"Accept-Encoding": "identity", **endpoint.headers}
            self._session = aiohttp.ClientSession(connector=connector, headers=headers)
        return self._session

    async def _send(self, request: HttpRequest, timeout: float) -> tuple[bytes, Mapping[str, str]]:
        import aiohttp

        address = self._endpoint.address
        try:
            async with self._connected().request(
                request.method,
                self._endpoint.base + request.path,
                data=request.body,
                headers=request.headers,
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as answer:
                body = await answer.read()
        except aiohttp.ClientSSLError as error:
            if "WRONG_VERSION_NUMBER" in str(error):
                raise UnreachableError(f"{address} does not speak TLS, expected http://{address}") from error
            raise UnreachableError(f"{address} is not trusted: {error}") from error
        except aiohttp.ClientConnectorError as error:
            raise UnreachableError(f"no server answers at {address}") from error
        except TimeoutError as error:
            raise DeadlineError(f"{address} did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:  # the connection broke: the server may be restarting
            if reason := await not_http(self._endpoint):
                raise UnreachableError(reason) from error
            # An answer that is not HTTP came from another program.
            kind = UnavailableError if isinstance(error, aiohttp.ClientResponseError) else RestartingError
            raise kind(f"{address} broke the connection: {error}") from error
        if not is_triton(answer.status, body) and (reason := await not_http(self._endpoint)):
            raise UnreachableError(reason)
        check_status(answer.status, body, address)
        return body, answer.headers

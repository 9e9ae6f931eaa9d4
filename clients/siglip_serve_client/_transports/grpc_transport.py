"""Requests over gRPC, with tritonclient's asynchronous client."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tritonclient.utils import InferenceServerException

from siglip_serve_client._operations.requests import CONTROL_TIMEOUT, Answer, Call, Tensor
from siglip_serve_client._transports.endpoint import Endpoint
from siglip_serve_client._transports.status import error_of
from siglip_serve_client._transports.wrong_port import not_grpc
from siglip_serve_client.errors import UnavailableError, UnreachableError

__all__ = ["GrpcTransport"]

_BROKEN = re.compile("connect|socket|closed|goaway", re.IGNORECASE)
# Messages of any size, and pauses between two attempts to connect that suit a server that is started again
# within seconds. The default of gRPC reaches two minutes.
_CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class GrpcTransport:
    """A channel, which belongs to the event loop of its first request."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self._headers = endpoint, endpoint.headers or None
        self._client: Any = None

    async def infer(self, call: Call) -> Answer:
        """Send a request and return the model's answer."""
        import tritonclient.grpc as triton

        async with self._connected() as client:
            answer: Answer = await client.infer(
                call.model,
                [_input(tensor) for tensor in call.inputs],
                parameters=dict(call.parameters) or None,
                timeout=call.microseconds,
                client_timeout=call.timeout,
                outputs=[triton.InferRequestedOutput(name) for name in call.outputs] or None,
                headers=self._headers,
            )
        return answer

    async def parameters(self, model: str, timeout: float) -> dict[str, str]:
        """The string parameters in the configuration of a model."""
        async with self._connected() as client:
            answer = await client.get_model_config(model, headers=self._headers, client_timeout=timeout)
        return {name: value.string_value for name, value in answer.config.parameters.items()}

    async def register(self, name: str, size: int) -> None:
        """Let the server know a region of shared memory."""
        async with self._connected() as client:
            await client.register_system_shared_memory(
                name, name, size, headers=self._headers, client_timeout=CONTROL_TIMEOUT
            )

    async def withdraw(self, name: str) -> None:
        """Let the server forget a region."""
        async with self._connected() as client:
            await client.unregister_system_shared_memory(
                name, headers=self._headers, client_timeout=CONTROL_TIMEOUT
            )

    async def close(self) -> None:
        """Close the channel."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        """The client, whose errors become those of this package."""
        import tritonclient.grpc.aio as triton

        if self._client is None:  # here and not earlier: a channel belongs to the running loop
            endpoint = self._endpoint
            roots = str(endpoint.ca_file) if endpoint.ca_file else None
            self._client = triton.InferenceServerClient(
                endpoint.address, ssl=endpoint.tls, root_certificates=roots, channel_args=list(_CHANNEL)
            )
        try:
            yield self._client
        except InferenceServerException as error:
            status, message = str(error.status() or ""), str(error.message() or error)
            found = error_of(status, message, self._endpoint.address)
            # Another protocol's server may refuse the connection, or close it without a word.
            broken = isinstance(found, UnavailableError) and _BROKEN.search(message)
            reason = await not_grpc(self._endpoint) if broken else None
            raise (UnreachableError(reason) if reason else found) from error


def _input(tensor: Tensor) -> Any:
    import tritonclient.grpc as triton

    made = triton.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
    if tensor.array is None:
        made.set_shared_memory(tensor.region, tensor.size)
    else:
        made.set_data_from_numpy(tensor.array)
    return made

"""Clients of little cost: requests are made once, answers are read only when they are checked.

A client shares its machine's cores with the server that it measures, so its own cost is missing there.
"""

from __future__ import annotations

import json
import queue
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Answer",
    "Client",
    "HttpClient",
    "JsonForm",
    "Kind",
    "Target",
    "TritonHttpClient",
    "connect",
    "http_answer",
    "infer_request",
    "triton_embedding",
]

Kind = Literal["grpc", "grpc_texts", "tritonclient", "triton_http", "http"]
JsonForm = Literal["openai", "weaviate", "triton_json"]  # of `json_clients`, whose requests are complete
Answer = tuple[int, str, Any]  # the request's number; its error status, "" if there is none; its body

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: host:port.
        where: for Triton the name of the model, for another server and for JSON the path.
    """

    kind: Kind | JsonForm
    url: str
    where: str


class Client(Protocol):
    """Sends without waiting, and waits for whatever ends."""

    def send(self, ticket: int, picture: int) -> None:
        """Send one picture by its index."""

    def wait(self, timeout: float) -> list[Answer]:
        """Answers that have come, none if `timeout` seconds pass without one."""

    def embedding(self, body: Any) -> NDArray[np.float32] | None:
        """The one row of an answer, or with texts all its rows, or None if it holds something else."""

    def close(self) -> None:
        """End the connection."""


def connect(target: Target, pictures: Sequence[bytes]) -> Client:
    """A client of the target's kind. For one of JSON, `pictures` are the bodies of requests."""
    from benchmarks.json_clients import JSON_CLIENTS

    kinds: dict[Kind | JsonForm, Callable[[Target, Sequence[bytes]], Client]] = {
        "grpc": GrpcClient,
        "grpc_texts": GrpcTextClient,
        "tritonclient": TritonClient,
        "triton_http": TritonHttpClient,
        "http": HttpClient,
        **JSON_CLIENTS,
    }
    return kinds[target.kind](target, pictures)


def infer_request(model: str, rows: Sequence[bytes], name: str = "INPUT_IMAGE") -> bytes:
    """A serialised ModelInferRequest of some pictures or texts."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name=name, datatype="BYTES")
    tensor.shape.extend([len(rows), 1])
    request.raw_input_contents.append(b"".join(len(row).to_bytes(4, "little") + row for row in rows))
    serialized: bytes = request.SerializeToString()
    return serialized


def triton_embeddings(body: bytes) -> NDArray[np.float32] | None:
    """The rows of EMBEDDING in a serialised ModelInferResponse, or None if they are not of FP32."""
    from google.protobuf.message import DecodeError
    from tritonclient.grpc import service_pb2

    try:
        response = service_pb2.ModelInferResponse.FromString(body)
    except DecodeError:
        return None
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if tensor.name == "EMBEDDING" and tensor.datatype == "FP32" and len(tensor.shape) == 2:
            rows, width = tensor.shape
            whole = len(raw) == 4 * rows * width
            return np.frombuffer(raw, np.float32).reshape(rows, width) if whole else None
    return None


def triton_embedding(body: bytes) -> NDArray[np.float32] | None:
    """The row of EMBEDDING in a serialised ModelInferResponse, or None if it is not one row of FP32."""
    found = triton_embeddings(body)
    return found[0] if found is not None and len(found) == 1 else None


class _Queued:
    """Base of the gRPC clients: answers come in callbacks of another thread."""

    def __init__(self) -> None:
        self.ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def wait(self, timeout: float) -> list[Answer]:
        try:
            answers = [self.ended.get(timeout=max(timeout, 0.0))]
        except queue.Empty:
            return []
        while not self.ended.empty():
            answers.append(self.ended.get())
        return answers


class GrpcClient(_Queued):
    """gRPC with requests that were serialised before, and answers left as they came."""

    def __init__(self, target: Target, pictures: Sequence[bytes]) -> None:
        import grpc  # type: ignore[import-untyped]

        super().__init__()
        self._channel = grpc.insecure_channel(target.url, _UNLIMITED)
        self._call = self._channel.unary_unary(_METHOD)
        self._requests = [self._serialize(target.where, picture) for picture in pictures]

    def send(self, ticket: int, picture: int) -> None:
        self._call.future(self._requests[picture]).add_done_callback(partial(self._done, ticket))

    def _done(self, ticket: int, future: Any) -> None:
        code = future.code().name
        self.ended.put((ticket, "" if code == "OK" else code, future.result() if code == "OK" else b""))

    def embedding(self, body: bytes) -> NDArray[np.float32] | None:
        return triton_embedding(body)

    def close(self) -> None:
        self._channel.close()

    def _serialize(self, model: str, picture: bytes) -> bytes:
        return infer_request(model, [picture])


class GrpcTextClient(GrpcClient):
    """`GrpcClient` with texts. What it calls a picture are the texts of one request, one per line."""

    def embedding(self, body: bytes) -> NDArray[np.float32] | None:
        return triton_embeddings(body)

    def _serialize(self, model: str, picture: bytes) -> bytes:
        return infer_request(model, picture.split(b"\n"), "INPUT_TEXT")


class TritonClient(_Queued):
    """tritonclient as its documentation shows it, but for the tensors, which are made once."""

    def __init__(self, target: Target, pictures: Sequence[bytes]) -> None:
        import tritonclient.grpc as triton

        super().__init__()
        self._client = triton.InferenceServerClient(target.url)
        self._model = target.where
        self._tensors = []
        for picture in pictures:
            tensor = triton.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[picture]], dtype=np.object_))
            self._tensors.append(tensor)

    def send(self, ticket: int, picture: int) -> None:
        self._client.async_infer(self._model, [self._tensors[picture]], callback=partial(self._done, ticket))

    def _done(self, ticket: int, result: Any, error: Any) -> None:
        status = "" if error is None else str(error.status()).removeprefix("StatusCode.")
        self.ended.put((ticket, status, result))

    def embedding(self, body: Any) -> NDArray[np.float32] | None:
        row: NDArray[np.float32] = body.as_numpy("EMBEDDING")
        return row[0] if row is not None and row.ndim == 2 and len(row) == 1 else None

    def close(self) -> None:
        self._client.close()


def http_answer(data: bytes | bytearray) -> tuple[int, bytes] | None:
    """Status and body of a complete HTTP/1.1 answer, or None while some of it is missing."""
    head, separator, body = bytes(data).partition(b"\r\n\r\n")
    if not separator:
        return None
    lines = head.split(b"\r\n")
    lengths = [line.split(b":", 1)[1] for line in lines[1:] if line.lower().startswith(b"content-length:")]
    if len(lengths) != 1:
        raise ValueError(f"an answer without Content-Length: {head[:200]!r}")
    return (int(lines[0].split()[1]), body) if len(body) >= int(lengths[0]) else None


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    ticket: int
    unsent: memoryview
    received: bytearray


class HttpClient:
    """POST of the bytes over HTTP/1.1, as many connections as there are requests in flight, kept open."""

    headers = "Content-Type: image/jpeg\r\n"

    def __init__(self, target: Target, pictures: Sequence[bytes]) -> None:
        host, _, port = target.url.rpartition(":")
        self._address = (host, int(port))
        head = f"POST {self._path(target)} HTTP/1.1\r\nHost: {target.url}\r\n{self.headers}"
        self._requests = [
            f"{head}Content-Length: {len(picture)}\r\n\r\n".encode() + picture for picture in pictures
        ]
        self._selector = selectors.EpollSelector()
        self._free: list[_Connection] = []
        self._failed: list[Answer] = []

    def send(self, ticket: int, picture: int) -> None:
        try:
            connection = self._free.pop() if self._free else self._open()
        except OSError as error:
            self._failed.append((ticket, type(error).__name__, b""))
            return
        connection.ticket = ticket
        connection.unsent = memoryview(self._requests[picture])
        connection.received.clear()
        self._write(connection)

    def wait(self, timeout: float) -> list[Answer]:
        answers, self._failed = self._failed, []
        end = time.perf_counter() + timeout
        while not answers and (left := end - time.perf_counter()) > 0:
            for key, events in self._selector.select(left):
                if events & selectors.EVENT_WRITE:
                    self._write(key.data)
                if events & selectors.EVENT_READ and key.data.socket.fileno() >= 0:
                    answers += self._read(key.data)
            answers += self._failed
            self._failed = []
        return answers

    def embedding(self, body: bytes) -> NDArray[np.float32] | None:
        return np.frombuffer(body, np.float32) if body and len(body) % 4 == 0 else None

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.socket.close()
        self._selector.close()

    def _path(self, target: Target) -> str:
        return target.where

    def _open(self) -> _Connection:
        opened = socket.create_connection(self._address, timeout=30)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setblocking(False)
        connection = _Connection(opened, -1, memoryview(b""), bytearray())
        self._selector.register(opened, selectors.EVENT_READ, connection)
        return connection

    def _write(self, connection: _Connection) -> None:
        wanted = selectors.EVENT_READ
        try:
            connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(connection, error)
            return
        if connection.unsent:
            wanted |= selectors.EVENT_WRITE
        if self._selector.get_key(connection.socket).events != wanted:
            self._selector.modify(connection.socket, wanted, connection)

    def _read(self, connection: _Connection) -> list[Answer]:
        try:
            data = connection.socket.recv(2**18)
        except OSError as error:
            self._drop(connection, error)
            return []
        if not data:
            self._drop(connection, ConnectionResetError())
            return []
        connection.received += data
        answer = http_answer(connection.received)
        if answer is None:
            return []
        self._free.append(connection)
        status, body = answer
        return [(connection.ticket, "" if status == 200 else f"HTTP_{status}", body)]

    def _drop(self, connection: _Connection, error: OSError) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection in self._free:  # the server closed it while nothing was asked
            self._free.remove(connection)
        else:
            self._failed.append((connection.ticket, type(error).__name__, b""))


class TritonHttpClient(HttpClient):
    """Triton's own raw call: the bytes of an image, answered by JSON and behind it the tensor's bytes."""

    headers = "Content-Type: application/octet-stream\r\nInference-Header-Content-Length: 0\r\n"

    def _path(self, target: Target) -> str:
        return f"/v2/models/{target.where}/infer"

    def embedding(self, body: bytes) -> NDArray[np.float32] | None:
        try:
            described, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
            output = described["outputs"][0]
            width, size = output["shape"][-1], output["parameters"]["binary_data_size"]
        except (ValueError, KeyError, IndexError):
            return None
        if output["datatype"] != "FP32" or output["shape"] != [1, width] or size != 4 * width:
            return None
        return np.frombuffer(body[-size:], np.float32)

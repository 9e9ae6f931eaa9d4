"""The server over gRPC with plain tritonclient: who it is, and embeddings of images and texts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from validate.errors import RefusedError, ServerError

__all__ = ["UNKNOWN", "Server", "ServerInfo"]

UNKNOWN = "unknown"
_VISION_MODEL = "siglip_vision_model"
_IDENTITY = {
    "checkpoint": "checkpoint_name",
    "revision": "checkpoint_revision",
    "dtype": "dtype",
    "preprocess": "preprocess",
}
_RETRY_AFTER_S = (0.2, 0.4, 0.8, 1.6, 3.2)
_NO_SERVER = ("failed to connect", "errors resolving", "http/2", "socket closed", "connection re")


@dataclass(frozen=True)
class ServerInfo:
    """Facts that the server says of itself, `unknown` where it does not."""

    url: str
    version: str
    checkpoint: str
    revision: str
    dtype: str
    preprocess: str

    def as_dict(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)


class Server:
    """A server at `url` (`host:port` of its gRPC endpoint), usable from several threads.

    Raises:
        ServerError: from every method, in one line, when the server cannot be reached, lacks the
            model or fails; RefusedError when it calls the input invalid.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        self.url = url.removeprefix("grpc://").rstrip("/")
        if "://" in self.url or ":" not in self.url:
            raise ServerError(f"--url {url}: expected host:port of the gRPC endpoint, such as 127.0.0.1:8001")
        self._timeout = timeout
        self._local = threading.local()

    def info(self) -> ServerInfo:
        """Version of the server, and the checkpoint and settings that the vision model's parameters name."""
        version = self._call(lambda client: client.get_server_metadata(client_timeout=self._timeout)).version
        try:
            parameters = self._config(_VISION_MODEL).parameters
        except ServerError:
            parameters = {}
        named = {
            name: parameters[key].string_value or UNKNOWN if key in parameters else UNKNOWN
            for name, key in _IDENTITY.items()
        }
        return ServerInfo(url=self.url, version=version, **named)

    def require(self, models: Sequence[str]) -> None:
        """Raise ServerError unless every one of `models` is ready."""
        for model in models:
            if not self._call(
                lambda client, name=model: client.is_model_ready(name, client_timeout=self._timeout)
            ):
                raise ServerError(f"{self.url} does not serve the model {model}, or it is not ready")

    def rows_per_request(self, model: str) -> int:
        """The most rows that one request to `model` may have; 0 is no limit."""
        return int(self._config(model).max_batch_size)

    def embed_images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Embeddings [n, d], not normalised, of encoded images."""
        return self._embed("embed_image", "INPUT_IMAGE", images, {})

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [n, d], not normalised. Text that does not fit the context is cut."""
        return self._embed(
            "embed_text", "INPUT_TEXT", [text.encode() for text in texts], {"truncation": True}
        )

    def _embed(
        self, model: str, name: str, rows: Sequence[bytes], parameters: dict[str, Any]
    ) -> NDArray[np.float32]:
        tensor = grpcclient.InferInput(name, [len(rows), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(list(rows), dtype=np.object_)[:, None])
        result = self._call(
            lambda client: client.infer(model, [tensor], parameters=parameters, client_timeout=self._timeout)
        )
        embeddings = result.as_numpy("EMBEDDING")
        if embeddings is None or embeddings.ndim != 2 or len(embeddings) != len(rows):
            shape = None if embeddings is None else list(embeddings.shape)
            raise ServerError(f"{model} at {self.url}: sent {len(rows)} rows, got EMBEDDING {shape}")
        return np.asarray(embeddings, dtype=np.float32)

    def _config(self, model: str) -> Any:
        return self._call(lambda client: client.get_model_config(model, client_timeout=self._timeout)).config

    def _call(self, function: Any) -> Any:
        pauses = iter(_RETRY_AFTER_S)
        while True:
            if not hasattr(self._local, "client"):
                self._local.client = grpcclient.InferenceServerClient(self.url)
            try:
                return function(self._local.client)
            except InferenceServerException as error:
                pause = next(pauses, None) if _kind(error) == "overload" else None
                if pause is None:
                    raise self._readable(error) from error
            time.sleep(pause)

    def _readable(self, error: InferenceServerException) -> ServerError:
        text = " ".join((error.message() or "no message").split())
        kind = _kind(error)
        if kind == "INVALID_ARGUMENT":
            return RefusedError(text)
        if kind == "unreachable":
            return ServerError(f"no gRPC server answers at {self.url}: is it running, is this its gRPC port?")
        if kind == "DEADLINE_EXCEEDED":
            return ServerError(f"{self.url}: no answer within {self._timeout:g} s (--timeout)")
        return ServerError(f"{self.url}: {kind}: {text}")


def _kind(error: InferenceServerException) -> str:
    """The gRPC status, with UNAVAILABLE told apart: no server, no model, or a full queue to wait for."""
    status = str(error.status() or "FAILED").removeprefix("StatusCode.")
    text = (error.message() or "").lower()
    if status != "UNAVAILABLE" or "unknown model" in text or "not ready" in text:
        return status
    return "unreachable" if any(word in text for word in _NO_SERVER) else "overload"

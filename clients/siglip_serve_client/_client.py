"""A gRPC client: images in, embeddings out, in the caller's order."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException

from siglip_serve_client.errors import (
    ClientError,
    DeadlineError,
    InvalidInputError,
    ServerError,
    UnavailableError,
    UnreachableError,
)

__all__ = ["Client"]

# Seconds before an image is sent again that the server was too busy for.
_BACK_OFF = (0.1, 0.3, 1.0, 3.0)


class Client:
    """Talks to a SigLIP Serve at `url`; use it as a context manager.

    Args:
        url: `host:port` of the gRPC endpoint.
        concurrency: requests in flight; the server batches what arrives together.
        timeout: seconds for one request.
    """

    def __init__(self, url: str = "127.0.0.1:8001", concurrency: int = 16, timeout: float = 120.0) -> None:
        self.url = url
        self.concurrency = concurrency
        self.timeout = timeout
        self._triton = triton.InferenceServerClient(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._triton.close()

    def embed_image(self, image: bytes | Path, normalized: bool = False) -> NDArray[np.float32]:
        """The embedding [D] float32 of one image, given as the bytes or the path of an image file.

        A server that is too busy is asked again, a few times.

        Raises:
            InvalidInputError, UnavailableError, ServerError: as the server answers.
            OSError: the path cannot be read.
        """
        data = image.read_bytes() if isinstance(image, Path) else image
        tensor = triton.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[data]], dtype=np.object_))
        parameters = {"normalized": True} if normalized else None
        for pause in (*_BACK_OFF, None):
            try:
                result = self._triton.infer(
                    "embed_image", [tensor], parameters=parameters, client_timeout=self.timeout
                )
            except InferenceServerException as error:
                translated = _translate(error, self.url)
                if pause is None or type(translated) is not UnavailableError:
                    raise translated from error
                time.sleep(pause)
            else:
                return np.asarray(result.as_numpy("EMBEDDING")[0])
        raise AssertionError("the last attempt returns or raises")

    def embed_images(
        self, images: Iterable[bytes | Path], normalized: bool = False
    ) -> Iterator[NDArray[np.float32] | ClientError | OSError]:
        """The embeddings of many images, in their order, `concurrency` requests in flight.

        An image that fails yields its error in its place; the others are not affected.
        """
        window: deque[Future[NDArray[np.float32]]] = deque()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for image in images:
                    window.append(pool.submit(self.embed_image, image, normalized))
                    if len(window) >= 2 * self.concurrency:
                        yield _outcome(window.popleft())
                while window:
                    yield _outcome(window.popleft())
            finally:
                for waiting in window:
                    waiting.cancel()

    def check_health(self) -> int:
        """Embed a small picture; the width of the embedding.

        A server can be ready while a model process is dead: only an inference tells.

        Raises:
            ClientError: it was not answered, or not with finite numbers.
        """
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), (90, 120, 60)).save(picture, "PNG")
        embedding = self.embed_image(picture.getvalue())
        if not np.isfinite(embedding).all():
            raise ServerError("the server answered with numbers that are not finite")
        return int(embedding.size)


def _outcome(future: Future[NDArray[np.float32]]) -> NDArray[np.float32] | ClientError | OSError:
    try:
        return future.result()
    except (ClientError, OSError) as error:
        return error


def _translate(error: InferenceServerException, url: str) -> ClientError:
    status, message = str(error.status() or ""), str(error.message() or error)
    if status.endswith("INVALID_ARGUMENT"):
        return InvalidInputError(message)
    if status.endswith("UNAVAILABLE"):
        if "connect" in message.lower():
            return UnreachableError(f"no server answers at {url}")
        return UnavailableError(message)
    if status.endswith("DEADLINE_EXCEEDED"):
        return DeadlineError(f"{url} did not answer in time")
    return ServerError(f"{status or 'no status'}: {message}")

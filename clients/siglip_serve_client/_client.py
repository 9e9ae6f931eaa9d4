"""A gRPC client: images in, embeddings out, in the caller's order."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from siglip_serve_client._shared_memory import Regions
from siglip_serve_client._teams import Link, TeamFit, TeamImages, Teams, ask_fit, ask_teams, hint_inputs
from siglip_serve_client._wire import Wire
from siglip_serve_client.errors import ClientError, ServerError

__all__ = ["Client"]


class Client:
    """Talks to a SigLIP Serve at `url`; use it as a context manager.

    Args:
        url: `host:port` of the gRPC endpoint.
        concurrency: requests in flight; the server batches what arrives together.
        timeout: seconds for one request.
        shared_memory: hand raw frames over through /dev/shm; the server runs on this machine, as the same
            user, and was started with `--shared-memory`.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        concurrency: int = 16,
        timeout: float = 120.0,
        *,
        shared_memory: bool = False,
    ) -> None:
        self.concurrency = concurrency
        wire = Wire(url, timeout)
        self._link = Link(wire, Regions(wire) if shared_memory else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what lies in shared memory, and close the connection."""
        self._link.close()

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
        result = self._link.wire.infer("embed_image", [tensor], parameters)
        return np.asarray(result.as_numpy("EMBEDDING")[0])

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

    def fit_teams(
        self,
        *,
        track_ids: ArrayLike | None = None,
        roles: Sequence[str] | None = None,
        anchors: ArrayLike | None = None,
        prev_state: bytes | None = None,
        k: int = 2,
        **images: Unpack[TeamImages],
    ) -> TeamFit:
        """Find the teams in N pictures of football players.

        60 crops of 10 players or more, over several frames, make a good fit; 8 are the least.

        Args:
            track_ids: [N] whole numbers; crops of one number show one player, negative ones are unknown.
                They improve a fit much.
            roles: [N] of "player", "goalkeeper", "referee"; "" is a player. Only players are clustered.
            anchors: [N], the team that a crop is known to be, -1 where it is not: decides the teams' ids.
            prev_state: of an earlier fit, whose teams keep their ids.
            k: how many teams.
            **images: `crops=`, a sequence of N encoded images (bytes), `pathlib.Path`s, PIL images or uint8
                arrays [H, W] or [H, W, 1, 3 or 4]; or `frame=`, one such image, and `boxes=`, [N, 4] of
                x0, y0, x1, y1 in its pixels. With arrays of colours also `color_order=`, "RGB" or "BGR"
                (OpenCV).
                PIL images and arrays reach the server without loss.

        Raises:
            InvalidInputError: what the server refuses; its message names the crop.
            UnavailableError, ServerError: as the server answers.
            SharedMemoryError: the frame cannot go through shared memory as `shared_memory=True` asks.
            OSError: a path cannot be read.
            TypeError, ValueError: arguments that do not belong together, or of the wrong kind.
        """
        hints = hint_inputs(track_ids=track_ids, roles=roles, anchors=anchors, prev_state=prev_state, k=k)
        return ask_fit(self._link, images, hints)

    def classify_teams(self, *, state: bytes, **images: Unpack[TeamImages]) -> Teams:
        """The teams of N pictures of football players; N may be 0.

        Args:
            state: of a fit.
            **images: `crops=`, or `frame=` and `boxes=`, and `color_order=`, as for `fit_teams`.

        Raises:
            ClientError, OSError, TypeError, ValueError: as for `fit_teams`.
        """
        return ask_teams(self._link, images, state)

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

"""A client that waits: images, texts and frames in, embeddings, probabilities, heatmaps and teams out."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siglip_serve_client._operations.concurrency import Turns
from siglip_serve_client._operations.encoding import ColorOrder, ImageLike, refuse_one_image
from siglip_serve_client._operations.explain import ExplainOptions, Explanation, ask_explanation
from siglip_serve_client._operations.images import (
    ask_embedding,
    ask_embeddings,
    ask_probabilities,
    label_flags,
    label_tensors,
)
from siglip_serve_client._operations.link import Link, Outcome, Progress
from siglip_serve_client._operations.retries import RESTART_WAIT, PersistentTransport
from siglip_serve_client._operations.server import ask_description, ask_health
from siglip_serve_client._operations.shared_memory import Regions
from siglip_serve_client._operations.teams import TeamFit, TeamImages, Teams, ask_fit, ask_teams, hint_inputs
from siglip_serve_client._operations.texts import ask_text_embeddings, text_chunks
from siglip_serve_client._transports import connect
from siglip_serve_client._transports.background_loop import BackgroundLoop
from siglip_serve_client._transports.endpoint import Endpoint

__all__ = ["Client"]

S = TypeVar("S")
T = TypeVar("T")


class Client:
    """Embeds and classifies with a SigLIP Serve at `url`. Use it as a context manager.

    Several threads may share a client. All requests run in an event loop in a thread of its own.

    Args:
        url: `host:port` of the gRPC endpoint, or a URL of the scheme grpc, grpcs, http or https.
        concurrency: requests in flight of one iteration. The server batches requests that arrive together.
        timeout: seconds for one request, with its repetitions when the server is too busy or is being
            started again. The server drops a request that still waits shortly before.
        shared_memory: hand raw frames over through /dev/shm. The server must run on this machine, as the
            same user, and with `--shared-memory`.
        api_key: key for a proxy in front of the server; sent as `authorization: Bearer ...`.
        ca_file: PEM file of the certificates to trust with grpcs and https, instead of the system's.
        restart_wait: seconds to wait for a server that answered before and was lost, within each request's
            `timeout`. 0 raises UnreachableError at once, as for a server that never answered.

    Raises:
        ValueError: the URL has another form.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        concurrency: int = 16,
        timeout: float = 120.0,
        *,
        shared_memory: bool = False,
        api_key: str | None = None,
        ca_file: Path | str | None = None,
        restart_wait: float = RESTART_WAIT,
    ) -> None:
        self.concurrency = concurrency
        # No limit of connections: each iteration has its own limit, and each of the caller's threads waits.
        sender = connect(Endpoint.parse(url, api_key, ca_file), 0)
        transport = PersistentTransport(sender, restart_wait)
        self._link = Link(transport, timeout, Regions(transport) if shared_memory else None)
        # A client that is not closed, as in short scripts, is closed when it is collected.
        weakref.finalize(self, BackgroundLoop.close_later, self._link).atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the frames in shared memory, and close the connections."""
        self._run(self._link.close())

    def embed_image(
        self, image: ImageLike, normalized: bool = False, *, color_order: ColorOrder | None = None
    ) -> NDArray[np.float32]:
        """The embedding [D] float32 of one image.

        Args:
            image: an image file as bytes or path, or a PIL image, or a uint8 array [H, W] or
                [H, W, 1, 3 or 4], which travel without loss and uncompressed.
            normalized: scale it to length 1.
            color_order: of an array with colours, "RGB" or "BGR" (OpenCV).

        Raises:
            InvalidInputError, UnavailableError, AccessError, ServerError: as the server answers.
            SharedMemoryError: the frame cannot go through shared memory as `shared_memory=True` asks.
            OSError: the path cannot be read.
            TypeError, ValueError: not an image of these kinds.
        """
        return self._run(ask_embedding(self._link, image, normalized, color_order))

    def embed_images(
        self,
        images: Iterable[ImageLike],
        normalized: bool = False,
        *,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Outcome]:
        """The embeddings of any number of images, in their order, with `concurrency` requests in flight.

        An image that fails yields its error in its place, and the others are not affected. Images are taken
        from the iterable as they are needed. `progress` is called with the number of results so far.
        """
        refuse_one_image("images", images)
        link = self._link
        return self._each(
            iter(images), lambda image: ask_embedding(link, image, normalized, color_order), progress
        )

    def embed_image_batch(
        self, images: Sequence[bytes], normalized: bool = False, *, base64_encoded: bool = False
    ) -> NDArray[np.float32]:
        """The embeddings [N, D] float32 of image files in one request, or [0, 0] for none.

        One bad image fails the whole request. `embed_images` sends one request per image instead.

        Args:
            images: image files, at most 128.
            normalized: scale each embedding to length 1.
            base64_encoded: the files are base64 text.

        Raises:
            InvalidInputError: an image is refused. The message names its index.
            ClientError, TypeError: as for `embed_image`.
        """
        return self._run(ask_embeddings(self._link, images, normalized, base64_encoded))

    def embed_text(
        self, text: str, normalized: bool = False, *, truncation: bool = False
    ) -> NDArray[np.float32]:
        """The embedding [D] float32 of one text. See `embed_texts`."""
        return np.asarray(self._run(ask_text_embeddings(self._link, [text], 0, normalized, truncation))[0])

    def embed_texts(
        self,
        texts: Iterable[str],
        normalized: bool = False,
        *,
        truncation: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """The embeddings [N, D] float32 of any number of texts, or [0, 0] for none.

        Args:
            truncation: cut a text that has too many tokens, instead of refusing it.
            progress: called with the number of texts that are done.

        Raises:
            InvalidInputError: a text is refused. The message names its index.
            ClientError, TypeError: as for `embed_image`.
        """
        parts: list[NDArray[np.float32]] = []

        def operation(chunk: tuple[int, list[str]]) -> Awaitable[NDArray[np.float32]]:
            return ask_text_embeddings(self._link, chunk[1], chunk[0], normalized, truncation)

        for part in self._each(text_chunks(texts), operation):
            if isinstance(part, Exception):
                raise part
            parts.append(part)
            if progress is not None:
                progress(sum(map(len, parts)))
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)

    def classify(
        self,
        image: ImageLike,
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
        truncation: bool = False,
        color_order: ColorOrder | None = None,
    ) -> NDArray[np.float32]:
        """The probabilities [L] float32 of the labels of one image.

        Args:
            image: as for `embed_image`.
            templates: texts with `{}` for the label, averaged, or the bare label if None.
            softmax: the labels compete and sum to 1, as they always do for CLIP. Otherwise each label has a
                probability of its own.
            truncation: cut a label that has too many tokens, instead of refusing it.

        Raises:
            ClientError, OSError, TypeError, ValueError: as for `embed_image`.
        """
        tensors, flags = label_tensors(labels, templates), label_flags(softmax, truncation)
        return self._run(ask_probabilities(self._link, image, tensors, flags, color_order))

    def classify_images(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
        truncation: bool = False,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Outcome]:
        """The probabilities [L] float32 for each of many images, in order. Errors as in `embed_images`."""
        tensors, flags = label_tensors(labels, templates), label_flags(softmax, truncation)
        refuse_one_image("images", images)
        link = self._link
        return self._each(
            iter(images),
            lambda image: ask_probabilities(link, image, tensors, flags, color_order),
            progress,
        )

    def explain(
        self, image: ImageLike, prompts: Sequence[str], **options: Unpack[ExplainOptions]
    ) -> Explanation:
        """Heatmaps: the places in an image from which the scores of P prompts come.

        Args:
            image: as for `embed_image`.
            prompts: at least one.
            **options: `templates=`, texts with `{}` for the prompt, averaged. `background=`, texts that
                prompts are compared with. Without it the mean of all prompts, or of general words for one
                prompt. `mode=` "relative" (to the background) or "absolute". `normalize=` of the heatmaps,
                "none", "prompt" or "joint". `size=`, height and width of the heatmaps. Without it the image's
                own, at most 512 on its longer side. `overlays=True` for pictures, with `colormap=` "bwr",
                "jet", "viridis" or "cividis" and `opacity=` 0 to 1. `truncation=True` cuts a prompt with too
                many tokens, instead of refusing it. `color_order=` as for `embed_image`.

        Raises:
            InvalidInputError: the server refuses an input. The message names the prompt.
            ClientError, OSError, TypeError, ValueError: as for `embed_image`.
        """
        return self._run(ask_explanation(self._link, image, prompts, options))

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

        60 crops of 10 players or more, over several frames, make a good fit. The minimum is 8 crops.

        Args:
            track_ids: [N] whole numbers. Crops of one number show one player, and negative numbers are
                unknown. They improve a fit much.
            roles: [N] of "player", "goalkeeper", "referee"; "" is a player. Only players are clustered.
            anchors: [N], the known team of a crop, or -1. They decide the ids of the teams.
            prev_state: the state of an earlier fit, whose teams keep their ids.
            k: number of teams.
            **images: `crops=`, a sequence of N images, each as for `embed_image`, or `frame=`, one such
                image, and `boxes=`, [N, 4] of x0, y0, x1, y1 in its pixels. With arrays of colours also
                `color_order=`, "RGB" or "BGR" (OpenCV).

        Raises:
            InvalidInputError: the server refuses an input. The message names the crop.
            ClientError, OSError, TypeError, ValueError: as for `embed_image`.
        """
        hints = hint_inputs(track_ids=track_ids, roles=roles, anchors=anchors, prev_state=prev_state, k=k)
        return self._run(ask_fit(self._link, images, hints))

    def classify_teams(self, *, state: bytes, **images: Unpack[TeamImages]) -> Teams:
        """The teams of N pictures of football players, where N may be 0.

        Args:
            state: the state of a fit.
            **images: `crops=`, or `frame=` and `boxes=`, and `color_order=`, as for `fit_teams`.

        Raises:
            ClientError, OSError, TypeError, ValueError: as for `fit_teams`.
        """
        return self._run(ask_teams(self._link, images, state))

    def describe(self, model: str = "siglip_vision_model") -> dict[str, str]:
        """The checkpoint and the settings of a model, by default of the one that embeds images.

        Args:
            model: a model with a checkpoint. `siglip_base_model` looks at the jerseys of teams.

        Returns:
            `checkpoint_name`, `checkpoint_revision`, `dtype`, `preprocess`, `color`, and `checkpoint_note`:
            the limits of the checkpoint, as in "knows drawings only". Values that the server does not give
            are "".

        Raises:
            ClientError: as for `embed_image`.
        """
        return self._run(ask_description(self._link, model))

    def check_health(self) -> int:
        """Embed a small picture, and return the width of the embedding.

        A server can be ready while a model process is dead, so this makes an inference.

        Raises:
            ClientError: the server did not answer, or not with finite numbers.
        """
        return self._run(ask_health(self._link))

    def _each(
        self,
        items: Iterator[S],
        operation: Callable[[S], Awaitable[NDArray[np.float32]]],
        progress: Progress | None = None,
    ) -> Iterator[Outcome]:
        """The outcome of each item, in order. `concurrency` run, and as many again are read ahead."""
        turns, window = Turns(self.concurrency), deque[Future[Outcome]]()
        loop = BackgroundLoop.of(self._link)
        with loop.held():
            try:
                for done in count(1):
                    # Results that are there come first: each change of the thread costs time.
                    if not (window and window[0].done()):
                        new = islice(items, 2 * self.concurrency - len(window))
                        window.extend(loop.submit(turns.outcome(operation, item)) for item in new)
                    if not window:
                        return
                    yield window.popleft().result()
                    if progress is not None:
                        progress(done)
            finally:
                loop.finish(turns.cancel())

    def _run(self, operation: Coroutine[Any, Any, T]) -> T:
        return BackgroundLoop.of(self._link).run(operation)

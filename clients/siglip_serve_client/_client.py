"""A client that waits: images, texts and frames in, embeddings, probabilities, heatmaps and teams out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siglip_serve_client import _operations
from siglip_serve_client._engine import Outcome, Progress, ThreadedEngine
from siglip_serve_client._explain import ExplainOptions, Explanation, ask_explanation
from siglip_serve_client._images import ColorOrder, ImageLike
from siglip_serve_client._operations import Link
from siglip_serve_client._shared_memory import Regions
from siglip_serve_client._steps import Call, Describe, Operation, Pause, Register, Step, Work
from siglip_serve_client._teams import TeamFit, TeamImages, Teams, ask_fit, ask_teams, hint_inputs
from siglip_serve_client._transports import Endpoint, connect

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Talks to a SigLIP Serve at `url`; use it as a context manager. Safe with several threads.

    Args:
        url: `host:port` of the gRPC endpoint, or a URL of the scheme grpc, grpcs, http or https.
        concurrency: requests in flight; the server batches what arrives together.
        timeout: seconds for one request, in which a server that is too busy is asked again, a few times.
        shared_memory: hand raw frames over through /dev/shm; the server runs on this machine, as the same
            user, and was started with `--shared-memory`.
        api_key: of a proxy in front of the server; sent as `authorization: Bearer ...`.
        ca_file: PEM file of the certificates to trust with grpcs and https, instead of the system's.

    Raises:
        ValueError: the URL is none of these.
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
    ) -> None:
        self.concurrency = concurrency
        self._endpoint = Endpoint.parse(url, api_key, ca_file)
        self._transport = connect(self._endpoint, concurrency)
        self._link = Link(timeout, Regions() if shared_memory else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what lies in shared memory, and close the connection."""
        if self._link.regions is not None:
            self._run(self._link.regions.close())
        self._transport.close()

    def embed_image(
        self, image: ImageLike, normalized: bool = False, *, color_order: ColorOrder | None = None
    ) -> NDArray[np.float32]:
        """The embedding [D] float32 of one image.

        Args:
            image: an image file as bytes or path; or a PIL image, or a uint8 array [H, W] or
                [H, W, 1, 3 or 4], which travel without loss and uncompressed.
            normalized: scale it to length 1.
            color_order: of an array with colours, "RGB" or "BGR" (OpenCV).

        Raises:
            InvalidInputError, UnavailableError, AccessError, ServerError: as the server answers.
            SharedMemoryError: the frame cannot go through shared memory as `shared_memory=True` asks.
            OSError: the path cannot be read.
            TypeError, ValueError: not an image of these kinds.
        """
        return self._run(_operations.embed_image(self._link, image, normalized, color_order))

    def embed_images(
        self,
        images: Iterable[ImageLike],
        normalized: bool = False,
        *,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Outcome]:
        """The embeddings of any number of images, in their order, `concurrency` requests in flight.

        An image that fails yields its error in its place; the others are not affected. Images are taken
        from the iterable as they are needed. `progress` is called with the number of results so far.
        """
        link = self._link
        return self._each(
            (_operations.embed_image(link, image, normalized, color_order) for image in images), progress
        )

    def embed_text(
        self, text: str, normalized: bool = False, *, truncation: bool = False
    ) -> NDArray[np.float32]:
        """The embedding [D] float32 of one text; see `embed_texts`."""
        return np.asarray(
            self._run(_operations.embed_texts(self._link, [text], 0, normalized, truncation))[0]
        )

    def embed_texts(
        self,
        texts: Iterable[str],
        normalized: bool = False,
        *,
        truncation: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """The embeddings [N, D] float32 of any number of texts; [0, 0] for none.

        Args:
            truncation: cut a text that has too many tokens, instead of refusing it.
            progress: called with the number of texts that are done.

        Raises:
            InvalidInputError: a text is refused; the message names its index.
            ClientError, TypeError: as for `embed_image`.
        """
        parts: list[NDArray[np.float32]] = []
        operations = (
            _operations.embed_texts(self._link, chunk, first, normalized, truncation)
            for first, chunk in _operations.chunks(texts)
        )
        for part in self._each(operations):
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
        color_order: ColorOrder | None = None,
    ) -> NDArray[np.float32]:
        """The probabilities [L] float32 of the labels of one image.

        Args:
            image: as for `embed_image`.
            templates: texts with `{}` where a label goes, averaged; none: the bare label.
            softmax: the labels compete and sum to 1, as CLIP's always do; else each has a probability of
                its own.

        Raises:
            ClientError, OSError, TypeError, ValueError: as for `embed_image`.
        """
        tensors = _operations.label_tensors(labels, templates)
        return self._run(_operations.classify(self._link, image, tensors, softmax, color_order))

    def classify_images(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Outcome]:
        """What `classify` says of any number of images, in their order; errors as in `embed_images`."""
        tensors = _operations.label_tensors(labels, templates)
        link = self._link
        operations = (_operations.classify(link, image, tensors, softmax, color_order) for image in images)
        return self._each(operations, progress)

    def explain(
        self, image: ImageLike, prompts: Sequence[str], **options: Unpack[ExplainOptions]
    ) -> Explanation:
        """Where in an image the scores of P prompts come from.

        Args:
            image: as for `embed_image`.
            prompts: at least one.
            **options: `templates=`, texts with `{}` where a prompt goes, averaged. `background=`, texts that
                prompts are compared with; without it the mean of all prompts, or of general words for one
                prompt. `mode=` "relative" (to the background) or "absolute". `normalize=` of the heatmaps,
                "none", "prompt" or "joint". `size=`, height and width of the heatmaps; without it the image's
                own, at most 512 on its longer side. `overlays=True` for pictures, with `colormap=` "bwr",
                "jet", "viridis" or "cividis" and `opacity=` 0 to 1. `color_order=` as for `embed_image`.

        Raises:
            InvalidInputError: what the server refuses; its message names the prompt.
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

        60 crops of 10 players or more, over several frames, make a good fit; 8 are the least.

        Args:
            track_ids: [N] whole numbers; crops of one number show one player, negative ones are unknown.
                They improve a fit much.
            roles: [N] of "player", "goalkeeper", "referee"; "" is a player. Only players are clustered.
            anchors: [N], the team that a crop is known to be, -1 where it is not: decides the teams' ids.
            prev_state: of an earlier fit, whose teams keep their ids.
            k: how many teams.
            **images: `crops=`, a sequence of N images, each as for `embed_image`; or `frame=`, one such
                image, and `boxes=`, [N, 4] of x0, y0, x1, y1 in its pixels. With arrays of colours also
                `color_order=`, "RGB" or "BGR" (OpenCV).

        Raises:
            InvalidInputError: what the server refuses; its message names the crop.
            ClientError, OSError, TypeError, ValueError: as for `embed_image`.
        """
        hints = hint_inputs(track_ids=track_ids, roles=roles, anchors=anchors, prev_state=prev_state, k=k)
        return self._run(ask_fit(self._link, images, hints))

    def classify_teams(self, *, state: bytes, **images: Unpack[TeamImages]) -> Teams:
        """The teams of N pictures of football players; N may be 0.

        Args:
            state: of a fit.
            **images: `crops=`, or `frame=` and `boxes=`, and `color_order=`, as for `fit_teams`.

        Raises:
            ClientError, OSError, TypeError, ValueError: as for `fit_teams`.
        """
        return self._run(ask_teams(self._link, images, state))

    def describe(self) -> dict[str, str]:
        """What embeds images: `checkpoint_name`, `checkpoint_revision`, `dtype`, `preprocess`.

        Raises:
            ClientError: as for `embed_image`.
        """
        return self._run(_operations.describe(self._link))

    def check_health(self) -> int:
        """Embed a small picture; the width of the embedding.

        A server can be ready while a model process is dead: only an inference tells.

        Raises:
            ClientError: it was not answered, or not with finite numbers.
        """
        return self._run(_operations.check_health(self._link))

    def _each(
        self, operations: Iterable[Operation[NDArray[np.float32]]], progress: Progress | None = None
    ) -> Iterator[Outcome]:
        """The outcome of each, in order; `concurrency` at a time, as many again read ahead."""
        window: deque[Future[Outcome]] = deque()
        rest = iter(operations)
        with ThreadedEngine(self._endpoint, self.concurrency) as engine:
            for done in count(1):
                # Those that are done come first: each change of the thread costs time.
                if not (window and window[0].done()):
                    window.extend(map(engine.submit, islice(rest, 2 * self.concurrency - len(window))))
                if not window:
                    return
                yield window.popleft().result()
                if progress is not None:
                    progress(done)

    def _run(self, operation: Operation[T]) -> T:
        try:
            step = next(operation)
            while True:
                try:
                    result = self._perform(step)
                except BaseException as error:  # noqa: BLE001 - the operation raises what it does not handle
                    step = operation.throw(error)
                else:
                    step = operation.send(result)
        except StopIteration as end:
            return end.value

    def _perform(self, step: Step) -> Any:
        if isinstance(step, Call):
            return self._transport.infer(step)
        if isinstance(step, Work):
            return step.function()
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Describe):
            return self._transport.describe(step)
        if isinstance(step, Register):
            return self._transport.register(step)
        return self._transport.withdraw(step)

"""A gateway in this process, with a stand-in for Triton whose vectors tell what was embedded."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from programs import free_port
from siglip_serve_client import ExplainOptions, Explanation, TeamFit, TeamImages, Teams
from siglip_serve_client.errors import InvalidInputError, MissingModelError
from starlette.testclient import TestClient
from wire import OPENER

from siglip_gateway.app import create_app
from siglip_gateway.options import GatewayOptions
from siglip_gateway.urls import UrlReader

__all__ = ["PNG", "URI", "WIDTH", "StandIn", "encoded", "gateway", "gateway_process", "vector"]

WIDTH = 16


def _png(color: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), color).save(file, "PNG")
    return file.getvalue()


PNG = _png()
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def encoded(data: bytes) -> str:
    """The bytes as base64 text."""
    return base64.b64encode(data).decode()


def vector(content: str | bytes) -> NDArray[np.float32]:
    """The vector [WIDTH] float32 of length 1 that the stand-in gives to a text or an image file."""
    digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()
    values = np.frombuffer(digest[:WIDTH], np.int8).astype(np.float32) + 0.5
    scaled: NDArray[np.float32] = values / np.linalg.norm(values)
    return scaled.astype(np.float32)


def _teams(labels: NDArray[np.int64]) -> dict[str, Any]:
    values = labels.astype(np.float32)
    return {
        "labels": labels.astype(np.int32),
        "margin": values / 16,
        "outlier_score": 1 + values / 8,
        "coordinates": np.stack([values, -values], axis=1),
        "region_fallback": labels % 3 == 0,
    }


@dataclass
class StandIn:
    """Answers as Triton does: it refuses the text `too long`, and files that are not images.

    Attributes:
        calls: what was asked, in order.
        error: raised instead of an answer.
        broken: raised by one of `image` and `text` alone.
        gate: awaited before an answer, if it is set.
        finished: how many answers were completed.
        note: of the checkpoint.
        missing: there are no models of teams.
    """

    calls: list[Any] = field(default_factory=list)
    error: Exception | None = None
    broken: dict[str, Exception] = field(default_factory=dict)
    gate: asyncio.Event | None = None
    finished: int = 0
    note: str = "for tests"
    missing: bool = False

    async def embed_image_batch(
        self, images: Sequence[bytes], normalized: bool = False, *, base64_encoded: bool = False
    ) -> NDArray[np.float32]:
        """The vectors of image files."""
        self.calls.append(("images", len(images), normalized, base64_encoded))
        await self._wait()
        files = [base64.b64decode(image, validate=True) for image in images] if base64_encoded else images
        bad = [index for index, data in enumerate(files) if data[:4] not in (b"\x89PNG", b"\xff\xd8\xff\xe0")]
        if bad:
            raise InvalidInputError("; ".join(f"INPUT_IMAGE[{index}]: not an image" for index in bad))
        self.finished += 1
        return np.stack([vector(data) for data in files]) * (1 if normalized else 2)

    async def embed_texts(
        self, texts: Sequence[str], normalized: bool = False, *, truncation: bool = False
    ) -> NDArray[np.float32]:
        """The vectors of texts."""
        self.calls.append(("texts", len(texts), normalized, truncation, *texts[:1]))
        await self._wait()
        if "text" in self.broken:
            raise self.broken["text"]
        for index, text in enumerate(texts):
            if text == "too long" and not truncation:
                raise InvalidInputError(f"INPUT_TEXT[{index}]: the text has 301 tokens and 64 fit")
        self.finished += 1
        return np.stack([vector(text) for text in texts]) * (1 if normalized else 2)

    async def classify(
        self,
        image: bytes,
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
        truncation: bool = False,
    ) -> NDArray[np.float32]:
        """Equal probabilities."""
        self.calls.append(("classify", image, list(labels), templates, softmax, truncation))
        await self._wait()
        return np.full(len(labels), 1 / len(labels), np.float32)

    async def explain(
        self, image: bytes, prompts: Sequence[str], **options: Unpack[ExplainOptions]
    ) -> Explanation:
        """Maps of one patch per number of a prompt's vector."""
        self.calls.append(("explain", image, list(prompts), options))
        await self._wait()
        if image[:4] != PNG[:4]:
            raise InvalidInputError("INPUT_IMAGE[0]: not an image")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise InvalidInputError(f"PROMPTS[{index}]: the text is empty")
        vectors = np.stack([vector(prompt) for prompt in prompts])
        patches = vectors.reshape(-1, 4, 4)
        height, width = options.get("size", (6, 8))
        tall = np.resize(vectors, (len(prompts), height, width))
        files = (PNG,) * len(prompts) if options.get("overlays") else ()
        return Explanation(
            tuple(prompts), tall, patches.sum((1, 2)), patches, vectors[:, 0], overlay_files=files
        )

    async def fit_teams(
        self,
        *,
        track_ids: ArrayLike | None = None,
        roles: Sequence[str] | None = None,
        anchors: ArrayLike | None = None,
        prev_state: bytes | None = None,
        k: int = 2,
        **images: Unpack[TeamImages],
    ) -> TeamFit:
        """A fit whose labels count from 0 to k - 1, and whose state is the number of crops."""
        hints = {"track_ids": track_ids, "roles": roles, "anchors": anchors, "prev_state": prev_state}
        self.calls.append(("fit", hints, k, images))
        await self._wait()
        count = self._crops(images)
        if not 2 <= k <= 8:
            raise InvalidInputError(f"K: got {k}, expected 2 to 8")
        return TeamFit(**_teams(np.arange(count) % k), state=b"\0\xff%d" % count, status=("LOW_SUPPORT",))

    async def classify_teams(self, *, state: bytes, **images: Unpack[TeamImages]) -> Teams:
        """Teams whose labels count from 0."""
        self.calls.append(("teams", state, images))
        await self._wait()
        return Teams(**_teams(np.arange(self._crops(images))))

    def _crops(self, images: TeamImages) -> int:
        if self.missing:
            raise MissingModelError("NOT_FOUND: Request for unknown model: 'fit_teams' is not found")
        files = images.get("crops", ())
        bad = [index for index, data in enumerate(files) if data != PNG]
        if bad:
            raise InvalidInputError("; ".join(f"CROPS[{index}]: not an image" for index in bad))
        return len(files) or len(np.asarray(images.get("boxes", ())))

    async def describe(self, model: str = "siglip_vision_model") -> dict[str, str]:
        """A checkpoint's name, one of the teams and one of all else."""
        if model == "siglip_base_model":
            return {"checkpoint_name": "stand-in-teams", "checkpoint_note": "of jerseys"}
        return {"checkpoint_name": "stand-in", "checkpoint_note": self.note}

    async def check_health(self) -> int:
        """The width of vectors."""
        self.calls.append(("health",))
        await self._wait()
        if "image" in self.broken:
            raise self.broken["image"]
        return WIDTH

    async def close(self) -> None:
        """Close nothing."""

    async def _wait(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error


@contextmanager
def gateway(
    stand_in: StandIn | None = None, urls: UrlReader | None = None, **options: Any
) -> Iterator[TestClient]:
    """A gateway with these options, and a client of it."""
    app = create_app(GatewayOptions(**options), stand_in or StandIn(), urls)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@contextmanager
def gateway_process(triton: str, *arguments: str) -> Iterator[str]:
    """`siglip-serve gateway` in front of a real server, as a process of its own: its URL."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("siglip-serve")), "gateway", "--triton", triton]
    process = subprocess.Popen([*command, "--port", str(port), *arguments])
    try:
        _wait(process, f"http://127.0.0.1:{port}/.well-known/live")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(40) == 0


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(300):
        assert process.poll() is None, "the gateway ended"
        try:
            with OPENER.open(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer from {url}")

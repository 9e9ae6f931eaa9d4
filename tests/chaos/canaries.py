"""Honest requests whose right answers are known: what a server under attack answers is compared with them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
from images import encode, photo
from numpy.typing import NDArray
from players import CROPS

from tests.chaos.messages import INFER, Infer, grpc_bytes, http_outputs_of, of_rows, outputs_of
from tests.chaos.server import ChaosError
from tests.chaos.wires import GrpcWire, Outcome

__all__ = ["TOLERANCE", "Canaries", "difference", "requests", "team_state"]

TOLERANCE = 1e-6
_LIMIT = 60.0


def requests(state: bytes = b"") -> dict[str, Infer]:
    """Make one honest request of each kind by a name; that of the teams needs a state."""
    pictures = {
        "jpeg": encode(photo(160, 120, 80), "JPEG"),
        "png": encode(photo(90, 120, 81), "PNG"),
        "webp": encode(photo(120, 90, 82), "WEBP"),
    }
    image = {name: of_rows("INPUT_IMAGE", [data]) for name, data in pictures.items()}
    words = of_rows("LABELS", [b"dog", b"a red shirt", b"car"], [3])
    unit = {"normalized": True}
    found = {f"embed_image {name}": Infer("embed_image", [tensor], unit) for name, tensor in image.items()}
    found["embed_image two rows"] = Infer(
        "embed_image", [of_rows("INPUT_IMAGE", [*pictures.values()][:2])], unit
    )
    found["embed_text"] = Infer("embed_text", [of_rows("INPUT_TEXT", [b"a photo of a dog"])], unit)
    found["embed_text three"] = Infer("embed_text", [of_rows("INPUT_TEXT", [b"dog", b"cat", b"house"])], unit)
    found["classify_image"] = Infer("classify_image", [image["jpeg"], words])
    prompts = of_rows("PROMPTS", [b"dog", b"grass"], [2])
    found["explain_image"] = Infer("explain_image", [image["png"], prompts], {}, ["HEATMAPS", "SCORES"])
    crops = [encode(crop, "JPEG") for crop in CROPS[:10]]
    found["fit_teams"] = Infer("fit_teams", [of_rows("CROPS", crops, [10])], {}, ["LABELS"])
    if state:
        tensors = [of_rows("CROPS", crops[:6], [6]), of_rows("STATE", [state], [1])]
        found["classify_teams"] = Infer("classify_teams", tensors)
    return found


async def team_state(wire: GrpcWire) -> bytes:
    """Let the server fit teams, and return their state.

    Raises:
        ChaosError: it did not.
    """
    crops = of_rows("CROPS", [encode(crop, "JPEG") for crop in CROPS], [len(CROPS)])
    reply = await wire.send(INFER, grpc_bytes(Infer("fit_teams", [crops])), limit=_LIMIT)
    if reply.outcome is not Outcome.ANSWERED:
        raise ChaosError(f"fit_teams: {reply.status} {reply.message}")
    return bytes(outputs_of(reply.body)["STATE"][0])


def difference(got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> float:
    """The largest difference of two answers; infinite where names, shapes, texts or whole numbers differ."""
    if set(got) != set(expected):
        return float("inf")
    largest = 0.0
    for name, right in expected.items():
        array = got[name]
        if array.shape != right.shape:
            return float("inf")
        if right.dtype.kind != "f":
            if not np.array_equal(array, right):
                return float("inf")
        elif right.size:
            apart = np.abs(array.astype(np.float64) - right.astype(np.float64))
            largest = max(largest, float(apart.max()) if np.isfinite(apart).all() else float("inf"))
    return largest


class Canaries:
    """The requests as bytes, and the answers of a quiet server.

    Args:
        tolerance: largest difference of an answer that is right.
    """

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        self.tolerance = tolerance
        self.state = b""
        self.messages: dict[str, bytes] = {}
        self._right: dict[str, dict[str, NDArray[Any]]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the requests, in a fixed order."""
        return list(self.messages)

    @property
    def right(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """The outputs of each request."""
        return self._right

    async def learn(self, wire: GrpcWire) -> None:
        """Ask the quiet server.

        Raises:
            ChaosError: it does not answer, or not twice alike.
        """
        self.state = await team_state(wire)
        self.messages = {name: grpc_bytes(request) for name, request in requests(self.state).items()}
        for name, message in self.messages.items():
            for _ in range(2):
                reply = await wire.send(INFER, message, limit=_LIMIT)
                if reply.outcome is not Outcome.ANSWERED:
                    raise ChaosError(f"{name}: {reply.status} {reply.message}")
                answer = outputs_of(reply.body)
                if difference(answer, self._right.setdefault(name, answer)) > self.tolerance:
                    raise ChaosError(f"{name}: a quiet server gives two answers")

    def learned(self, messages: Mapping[str, bytes], right: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        """Take requests and their right answers from elsewhere."""
        self.messages = dict(messages)
        self._right = {name: dict(outputs) for name, outputs in right.items()}

    def check(self, name: str, body: bytes, via: str = "grpc") -> str:
        """Compare an answer over `grpc` or `http` with the right one; return what is wrong, or ""."""
        found = outputs_of(body) if via == "grpc" else http_outputs_of(body)
        apart = difference(found, self._right[name])
        return "" if apart <= self.tolerance else f"{name}: off by {apart:g}"

    async def all_right(self, wire: GrpcWire, limit: float = 20.0) -> str:
        """Ask all at once; return the first thing that is wrong, or ""."""

        async def ask(name: str) -> str:
            reply = await wire.send(INFER, self.messages[name], limit=limit)
            if reply.outcome is not Outcome.ANSWERED:
                return f"{name}: {reply.outcome} {reply.status} {reply.message[:120]}"
            return self.check(name, reply.body)

        return next(filter(None, await asyncio.gather(*map(ask, self.names))), "")

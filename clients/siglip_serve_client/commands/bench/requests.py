"""Requests of a load, encoded once and sent often, and the checks of their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from siglip_serve_client._operations.requests import Answer, Call, output, strings
from siglip_serve_client.errors import ServerError

__all__ = ["LABELS", "METHOD", "TEXT_MODELS", "Draw", "check_answer", "grpc_body", "make_call"]

METHOD = "/inference.GRPCInferenceService/ModelInfer"
_EXPLAINED = ("HEATMAPS", "SCORES", "UNATTRIBUTED", "PATCH_MAPS")
_CLOSE = 1e-3  # of a cosine
LABELS = (b"a dog", b"a cat", b"a pizza", b"a car", b"a tree")
TEXT_MODELS = ("embed_text", "siglip_text")
_WORDS = ("red", "old", "small", "wet", "quiet", "bright", "wooden", "striped", "broken", "distant")
_THINGS = ("bicycle", "harbour", "lamp", "horse", "bridge", "kettle", "garden", "train", "jersey", "field")

_Encoded = TypeVar("_Encoded")


def make_call(model: str, picture: bytes, rng: Random) -> Call:
    """A request of one row.

    Models of texts get a new text each time, since the server caches texts. classify_image gets the picture
    and five labels that never change, and explain_image has the five as prompts. Other models get the
    picture.
    """
    if model in TEXT_MODELS:
        text = f"a photo of a {rng.choice(_WORDS)} {rng.choice(_THINGS)}, number {rng.getrandbits(63)}"
        return Call(model, [strings("INPUT_TEXT", "text", [text.encode()], columns=True)])
    inputs = [strings("INPUT_IMAGE", "image", [picture], columns=True)]
    if model == "classify_image":
        inputs.append(strings("LABELS", "labels", LABELS))
    if model == "explain_image":
        inputs.append(strings("PROMPTS", "prompts", LABELS))
        return Call(model, inputs, outputs=_EXPLAINED)
    return Call(model, inputs)


class Draw(Generic[_Encoded]):
    """Draws requests: the model by its weight, and its picture by its weight.

    Args:
        models: names and weights.
        pictures: encoded images and weights.
        encode: makes the message of a call, once per model and picture.
    """

    def __init__(
        self,
        models: Sequence[tuple[str, float]],
        pictures: Sequence[tuple[bytes, float]],
        encode: Callable[[Call], _Encoded],
        rng: Random,
    ) -> None:
        self._models, weights = zip(*models, strict=True)
        self._model_bounds = list(accumulate(weights))
        self._pictures, weights = zip(*pictures, strict=True)
        self._picture_bounds = list(accumulate(weights))
        self._encode, self._rng = encode, rng
        self._known: dict[tuple[str, bytes], _Encoded] = {}

    def __call__(self) -> tuple[str, _Encoded]:
        (model,) = self._rng.choices(self._models, cum_weights=self._model_bounds)
        (picture,) = self._rng.choices(self._pictures, cum_weights=self._picture_bounds)
        key = model, picture
        if model in TEXT_MODELS:
            return model, self._encode(make_call(*key, self._rng))
        if key not in self._known:
            self._known[key] = self._encode(make_call(*key, self._rng))
        return model, self._known[key]


def grpc_body(call: Call) -> bytes:
    """A serialised ModelInferRequest."""
    request = service_pb2.ModelInferRequest(model_name=call.model)
    request.parameters["timeout"].int64_param = call.microseconds
    for given in call.inputs:
        tensor = request.inputs.add(name=given.name, datatype=given.datatype)
        tensor.shape.extend(given.shape)
        request.raw_input_contents.append(serialize_byte_tensor(given.array).item())
    for name in call.outputs:
        request.outputs.add(name=name)
    body: bytes = request.SerializeToString()
    return body


def check_answer(model: str, answer: Answer) -> None:
    """Check one row: its name, type and shape, and that its values are finite and in range.

    Raises:
        ServerError: the answer is wrong. The message gives the fault.
    """
    if model == "explain_image":
        _check_explanation(answer)
        return
    name = "PROBABILITIES" if model == "classify_image" else "EMBEDDING"
    values = _read(answer, name)
    width = len(LABELS) if model == "classify_image" else max(values.size, 1)
    if values.dtype != np.float32 or values.shape != (1, width):
        raise ServerError(f"{name}: {values.dtype} of shape {values.shape}, expected one row of float32")
    if not np.isfinite(values).all():
        raise ServerError(f"{name}: values are not finite")
    if model == "classify_image" and not ((values >= 0) & (values <= 1)).all():
        raise ServerError(f"{name}: outside 0 to 1")
    if not values.any():
        raise ServerError(f"{name}: all zeros")


def _read(answer: Answer, name: str) -> NDArray[Any]:
    try:
        return output(answer, name)
    except ValueError as error:
        raise ServerError(f"{name}: the shape does not fit the bytes: {error}") from error


def _check_explanation(answer: Answer) -> None:
    found = {name: _read(answer, name) for name in _EXPLAINED}
    for name, values in found.items():
        axes = 3 if name in ("HEATMAPS", "PATCH_MAPS") else 1
        if values.dtype != np.float32 or values.ndim != axes or len(values) != len(LABELS):
            raise ServerError(
                f"{name}: {values.dtype} of shape {values.shape}, expected float32 of {len(LABELS)} prompts"
            )
        if not np.isfinite(values).all():
            raise ServerError(f"{name}: values are not finite")
    total = found["PATCH_MAPS"].sum((1, 2)) + found["UNATTRIBUTED"]
    if np.abs(total - found["SCORES"]).max() > _CLOSE:
        raise ServerError("PATCH_MAPS: with UNATTRIBUTED they do not sum to SCORES")

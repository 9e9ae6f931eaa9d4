"""Requests to `explain_image` by plain tritonclient, and a picture with a known result."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from images import encode
from numpy.typing import NDArray
from PIL import Image
from wire import TINY, GrpcCaller, HttpCaller

__all__ = ["MAPS", "Answer", "corner", "explain", "explain_inputs", "peak", "png", "stretched"]

Answer: TypeAlias = dict[str, NDArray[Any]]

MAPS = ("HEATMAPS", "SCORES", "UNATTRIBUTED", "PATCH_MAPS")
_TEXTS = ("PROMPTS", "TEMPLATE", "BACKGROUND", "MODE", "NORMALIZE", "COLORMAP")
_SIDE = 384


def explain_inputs(module: Any, image: bytes | Sequence[bytes], inputs: Mapping[str, Any]) -> list[Any]:
    """Make input tensors of tritonclient's `module`; texts are str or bytes."""
    images = [image] if isinstance(image, bytes) else list(image)
    made = module.InferInput("INPUT_IMAGE", [len(images), 1], "BYTES")
    made.set_data_from_numpy(np.array(images, dtype=np.object_).reshape(-1, 1))
    tensors = [made]
    for name, values in inputs.items():
        if name in _TEXTS:
            rows = [value.encode() if isinstance(value, str) else value for value in values]
            array: NDArray[Any] = np.empty(len(rows), dtype=np.object_)
            array[:] = rows
        else:
            array = np.array(values, dtype=np.int32 if name == "SIZE" else np.float32)
        kind = {"O": "BYTES", "i": "INT32", "f": "FP32"}[array.dtype.kind]
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def explain(
    caller: GrpcCaller | HttpCaller,
    image: bytes | Sequence[bytes],
    prompts: Sequence[str | bytes],
    outputs: Sequence[str] = MAPS,
    parameters: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> Answer:
    """Return the named outputs of one request; `inputs` holds further inputs by name."""
    result = caller.client.infer(
        "explain_image",
        explain_inputs(caller.module, image, {"PROMPTS": prompts, **inputs}),
        outputs=[caller.module.InferRequestedOutput(name) for name in outputs],
        parameters=dict(parameters) if parameters else None,
    )
    return {name: result.as_numpy(name) for name in outputs}


@functools.cache
def corner() -> Image.Image:
    """Draw a penguin in the upper right corner of a plain square, so that no two sides look alike."""
    with Image.open(TINY / "samples" / "penguin.png") as file:
        drawing = file.convert("RGB")
    side = min(drawing.size)
    left, part = (drawing.width - side) // 2, _SIDE * 2 // 5
    drawing = drawing.crop((left, 0, left + side, side)).resize((part, part), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (_SIDE, _SIDE), drawing.getpixel((0, 0)))
    square.paste(drawing, (_SIDE - part, 0))
    return square


def peak(heatmap: NDArray[np.float32]) -> tuple[float, float]:
    """Find the maximum of a map: down and across, as fractions of its height and width."""
    row, column = np.unravel_index(int(heatmap.argmax()), heatmap.shape)
    return (float(row) + 0.5) / heatmap.shape[0], (float(column) + 0.5) / heatmap.shape[1]


def stretched(width: int, height: int) -> Image.Image:
    """Stretch the square to another shape; the tower, which takes squares, sees the same."""
    return corner().resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG, with little compression."""
    return encode(image, "PNG", compress_level=1)

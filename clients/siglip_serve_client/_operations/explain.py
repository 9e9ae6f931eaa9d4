"""Heatmaps of prompts, as `Client` and `AsyncClient` ask for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve_client._operations.encoding import ColorOrder, ImageLike
from siglip_serve_client._operations.images import ask_image
from siglip_serve_client._operations.link import Link
from siglip_serve_client._operations.requests import Call, Tensor, output, refuse_unknown, strings, utf8

__all__ = ["COLORMAPS", "MODES", "NORMALIZATIONS", "ExplainOptions", "Explanation", "ask_explanation"]

Mode: TypeAlias = Literal["relative", "absolute"]
Normalization: TypeAlias = Literal["none", "prompt", "joint"]
Colormap: TypeAlias = Literal["bwr", "jet", "viridis", "cividis"]

MODES: tuple[Mode, ...] = ("relative", "absolute")
NORMALIZATIONS: tuple[Normalization, ...] = ("none", "prompt", "joint")
COLORMAPS: tuple[Colormap, ...] = ("bwr", "jet", "viridis", "cividis")


class ExplainOptions(TypedDict, total=False):
    """The options of `Client.explain`, which describes them."""

    templates: Sequence[str]
    background: Sequence[str]
    mode: Mode
    normalize: Normalization
    size: tuple[int, int]
    overlays: bool
    colormap: Colormap
    opacity: float
    truncation: bool
    color_order: ColorOrder


@dataclass(frozen=True)
class Explanation:
    """The places in an image from which the scores of P prompts come.

    Attributes:
        prompts: the prompts of the request.
        heatmaps: [P, H, W] float32 over the upright image, normalised as requested, and 0 without evidence.
        scores: [P] float32, the cosine of each prompt with the image.
        patch_maps: [P, G, G] float32, the part of a score that each patch adds, never normalised.
        unattributed: [P] float32, the part without a place: `patch_maps.sum((1, 2)) + unattributed` gives the
            scores.
        overlays: P pictures of the size [H, W], empty unless requested.
        overlay_files: the same as PNG files.
    """

    prompts: tuple[str, ...]
    heatmaps: NDArray[np.float32]
    scores: NDArray[np.float32]
    patch_maps: NDArray[np.float32]
    unattributed: NDArray[np.float32]
    overlays: tuple[Image.Image, ...] = ()
    overlay_files: tuple[bytes, ...] = ()


async def ask_explanation(
    link: Link, image: ImageLike, prompts: Sequence[str], options: ExplainOptions
) -> Explanation:
    """The heatmaps of prompts. See `Client.explain`."""
    refuse_unknown("explain", options, ExplainOptions.__annotations__)
    outputs = ["HEATMAPS", "SCORES", "UNATTRIBUTED", "PATCH_MAPS"]
    if options.get("overlays"):
        outputs.append("OVERLAY")
    parameters: dict[str, str | bool] = {"truncation": True} if options.get("truncation") else {}
    call = Call("explain_image", _inputs(prompts, options), parameters, link.timeout, outputs)
    answer = await ask_image(link, call, image, options.get("color_order"))
    files = tuple(output(answer, "OVERLAY")) if options.get("overlays") else ()
    return Explanation(
        tuple(prompts),
        heatmaps=output(answer, "HEATMAPS"),
        scores=output(answer, "SCORES"),
        patch_maps=output(answer, "PATCH_MAPS"),
        unattributed=output(answer, "UNATTRIBUTED"),
        overlays=tuple(Image.open(io.BytesIO(file)) for file in files),
        overlay_files=files,
    )


def _inputs(prompts: Sequence[str], options: ExplainOptions) -> list[Tensor]:
    inputs = [strings("PROMPTS", "prompts", utf8("prompts", prompts))]
    if "templates" in options:
        inputs.append(strings("TEMPLATE", "templates", utf8("templates", options["templates"])))
    if "background" in options:
        inputs.append(strings("BACKGROUND", "background", utf8("background", options["background"])))
    if "mode" in options:
        inputs.append(strings("MODE", "mode", utf8("mode", [options["mode"]])))
    if "normalize" in options:
        inputs.append(strings("NORMALIZE", "normalize", utf8("normalize", [options["normalize"]])))
    if "size" in options:
        inputs.append(Tensor("SIZE", "INT32", (2,), _size(options["size"])))
    if "colormap" in options:
        inputs.append(strings("COLORMAP", "colormap", utf8("colormap", [options["colormap"]])))
    if "opacity" in options:
        inputs.append(Tensor("OPACITY", "FP32", (1,), np.array([options["opacity"]], dtype=np.float32)))
    return inputs


def _size(given: tuple[int, int]) -> NDArray[np.int32]:
    sides = np.asarray(given)
    if sides.shape != (2,) or sides.dtype.kind not in "iu" or not (sides > 0).all() or sides.max() >= 2**31:
        raise ValueError(f"size: {given!r}, expected height and width, whole numbers of at least 1")
    return sides.astype(np.int32)

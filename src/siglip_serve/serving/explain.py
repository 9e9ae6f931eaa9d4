"""What the Triton models of `explain_image` answer; one class a model, used by its `model.py`.

The steps run one after the other: image, prompts, text embeddings, vectors, the vision model, maps, overlays.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.embeddings import zero_shot
from siglip_serve.errors import InvalidInputError
from siglip_serve.heatmaps.picture import (
    COLORMAPS,
    MOST_SIDE,
    MOST_VALUES,
    NORMALIZATIONS,
    Normalization,
    View,
    color_scale,
    default_size,
    normalize,
    overlay,
)
from siglip_serve.images.preprocess import decode_base64
from siglip_serve.images.resize import shown
from siglip_serve.serving.images import image_reader
from siglip_serve.serving.respond import Context, Outputs, Request, map_rows, readable_start, respond_each
from siglip_serve.serving.siglip_vision import MOST_TEXTS, MOST_VECTORS, read_labels, read_templates
from siglip_serve.texts.tokenizer import load_tokenizer

__all__ = ["ExplainMapper", "ExplainOverlays", "ExplainPrompter", "ExplainVectors"]

_MODES = ("relative", "absolute")
# What one prompt is compared with, where nothing else is named: things that pictures show at all.
_BACKGROUND = (
    "thing",
    "person",
    "animal",
    "plant",
    "food",
    "tool",
    "vehicle",
    "building",
    "furniture",
    "clothing",
    "sky",
    "ground",
    "water",
    "text",
    "pattern",
    "background",
)


@dataclass(frozen=True)
class _Plan:
    """What a request asks for, as the steps hand it on: PLAN [6] INT32."""

    prompts: int
    templates: int
    relative: bool
    normalization: Normalization
    height: int
    width: int

    def tensor(self) -> NDArray[np.int32]:
        how = NORMALIZATIONS.index(self.normalization)
        return np.array(
            [self.prompts, self.templates, self.relative, how, self.height, self.width], dtype=np.int32
        )

    @classmethod
    def of(cls, request: Request) -> _Plan:
        """The plan of a request, which may come from anybody: the steps can be called by themselves."""
        given = list(map(int, request.array("PLAN", [], np.int32)))
        prompts, templates, relative, how, height, width = given
        most = MOST_VALUES // max(prompts, 1)
        if (
            min(prompts, templates, height, width) < 1
            or max(height, width) > MOST_SIDE
            or height * width > most
            or how not in range(len(NORMALIZATIONS))
        ):
            raise InvalidInputError(f"PLAN: got {given}, expected what explain_prompts gives")
        return cls(prompts, templates, bool(relative), NORMALIZATIONS[how], height, width)

    def check(self, name: str, rows: int, expected: int) -> None:
        """Refuse an input whose rows are not those of the plan."""
        if rows != expected:
            raise InvalidInputError(f"{name}: {rows} rows, expected {expected} as PLAN says")


class ExplainPrompter:
    """`explain_prompts`: all that is asked of an image, checked -> INPUT_IDS [n, T] INT64, PLAN [6] INT32.

    PROMPTS [P], optional TEMPLATE [K], BACKGROUND [Q], MODE [1], NORMALIZE [1] BYTES and SIZE [2] INT32. The
    ids are those of each prompt, then of each text of the background, in each template. IMAGE_SIZE [1, 2]
    INT32, height and width, makes the step wait for the image. COLORMAP [1] BYTES and OPACITY [1] FP32 are
    only checked, before the towers work for nothing.
    """

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals
        self._max_bytes = context.settings.max_text_bytes
        with readable_start():
            self._tokenizer = load_tokenizer(context.config)
        self._context = context

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return respond_each(requests, self._plan, self._refusals)

    def _plan(self, request: Request) -> Outputs:
        image = _image_size(request)
        prompts = read_labels(request, "PROMPTS", self._max_bytes)
        templates = read_templates(request, self._max_bytes)
        relative = _choice(request, "MODE", _MODES) == "relative"
        normalization = cast(Normalization, _choice(request, "NORMALIZE", NORMALIZATIONS))
        background = self._background(request, prompts, relative)
        texts = len(prompts) + len(background)
        if texts > MOST_VECTORS or texts * len(templates) > MOST_TEXTS:
            raise InvalidInputError(
                f"PROMPTS: {len(prompts)} prompts and {len(background)} texts of BACKGROUND in "
                f"{len(templates)} templates, expected at most {MOST_VECTORS} prompts and texts, and "
                f"{MOST_TEXTS} with their templates"
            )
        height, width = self._size(request, image, len(prompts))
        _choice(request, "COLORMAP", COLORMAPS)
        _opacity(request)
        ids = self._ids(request, "PROMPTS", prompts, templates)
        ids += self._ids(request, "BACKGROUND", background, templates)
        plan = _Plan(len(prompts), len(templates), relative, normalization, height, width)
        return {"INPUT_IDS": np.stack(ids), "PLAN": plan.tensor()}

    def _background(self, request: Request, prompts: Sequence[str], relative: bool) -> list[str]:
        if request.has("BACKGROUND"):
            if not relative:
                raise InvalidInputError("BACKGROUND: means nothing in the MODE absolute; leave it out")
            return read_labels(request, "BACKGROUND", self._max_bytes)
        return list(_BACKGROUND) if relative and len(prompts) == 1 else []

    def _ids(
        self, request: Request, name: str, labels: Sequence[str], templates: Sequence[str]
    ) -> list[NDArray[np.int64]]:
        """Of each label in each template; one that does not fit the text tower is named by its own index."""
        truncation = request.flag("truncation")
        ids = []
        for index, label in enumerate(labels):
            for template in templates:
                try:
                    ids.append(self._tokenizer(template.replace("{}", label), truncation))
                except InvalidInputError as error:
                    raise error.at(name, index) from error
        return ids

    def _size(self, request: Request, image: NDArray[np.int32], prompts: int) -> tuple[int, int]:
        asked = request.optional("SIZE", 2, np.int32)
        if asked is None:
            return default_size(_view(self._context, image), prompts)
        height, width = map(int, asked)
        fit = max(height, width) <= MOST_SIDE and prompts * height * width <= MOST_VALUES
        if min(height, width) < 1 or not fit:
            raise InvalidInputError(
                f"SIZE: {prompts} maps of {height}x{width}, expected sides of 1 to {MOST_SIDE} and "
                f"at most {MOST_VALUES} values in all"
            )
        return height, width


class ExplainVectors:
    """`explain_vectors`: TEXT_EMBEDDING [n, D], PLAN -> PROMPT_VECTORS [1, P, D], PROMPT_EMBEDDING [P, D].

    A prompt's embedding is the mean over its templates, at unit length. Its vector is that, or in the mode
    `relative` what it has beyond the mean of the background; without a background, of all prompts.
    """

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals
        self._width = tensor_dims(context.config)["EMBEDDING"]
        _one_thread()

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return respond_each(requests, self._vectors, self._refusals)

    def _vectors(self, request: Request) -> Outputs:
        plan = _Plan.of(request)
        texts = request.array("TEXT_EMBEDDING", self._width, np.float32)
        if len(texts) < plan.prompts * plan.templates or len(texts) % plan.templates:
            raise InvalidInputError(
                f"TEXT_EMBEDDING: {len(texts)} rows, expected {plan.prompts} or more times {plan.templates} "
                "as PLAN says"
            )
        units = zero_shot.build_class_embeddings(texts.reshape(-1, plan.templates, *self._width))
        prompts, background = units[: plan.prompts], units[plan.prompts :]
        vectors = prompts
        if plan.relative:
            vectors = prompts - (background if len(background) else prompts).mean(axis=0)
        return {
            "PROMPT_VECTORS": vectors.astype(np.float32)[None],
            "PROMPT_EMBEDDING": prompts.astype(np.float32),
        }


class ExplainMapper:
    """`explain_maps`: what was found -> HEATMAPS, SCORES, UNATTRIBUTED, PATCH_MAPS.

    HEAT are PATCH_MAPS under a name that is no output of the ensemble.
    """

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals
        self._context = context
        self._width = tensor_dims(context.config)["EMBEDDING"]
        _one_thread()

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return respond_each(requests, self._map, self._refusals)

    def _map(self, request: Request) -> Outputs:
        plan, side = _Plan.of(request), self._context.config.vision.grid_size
        maps = _finite(request, "FOUND_MAPS", [plan.prompts, side * side])
        maps = maps.reshape(plan.prompts, side, side)
        embedding = _finite(request, "EMBEDDING", self._width)[0]
        prompts = request.array("PROMPT_EMBEDDING", self._width, np.float32)
        plan.check("PROMPT_EMBEDDING", len(prompts), plan.prompts)
        vectors = request.array("PROMPT_VECTORS", [plan.prompts, *self._width], np.float32)[0]
        if not embedding.any():
            raise InvalidInputError("EMBEDDING[0]: all zero, which has no direction")
        unit = embedding / np.linalg.norm(embedding)
        # In the mode `relative` what all prompts share has no place either.
        unattributed = request.array("FOUND_UNATTRIBUTED", [plan.prompts], np.float32)[0]
        unattributed = unattributed + (prompts - vectors) @ unit
        view = _view(self._context, _image_size(request))
        return {
            "HEATMAPS": view.place(normalize(maps, plan.normalization), plan.height, plan.width),
            "SCORES": (prompts @ unit).astype(np.float32),
            "UNATTRIBUTED": unattributed.astype(np.float32),
            "PATCH_MAPS": maps,
            "HEAT": maps,
        }


class ExplainOverlays:
    """`explain_overlays`: HEAT [P, G, G], PLAN, INPUT_IMAGE -> OVERLAY [P], PNG files: maps over the image.

    Optional COLORMAP [1] BYTES and OPACITY [1] FP32. All maps share one scale of colours, or with the
    NORMALIZE `prompt` each has its own. With the parameter `base64_encoded` the files are
    base64 text, as the image.
    """

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals
        self._context = context
        # Not as the settings say: to look at, Pillow's pixels are as good, and need no torch in this process.
        self._preprocess, self._limits = image_reader(context, "pil")
        _one_thread()

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return respond_each(requests, self._paint, self._refusals)

    def _paint(self, request: Request) -> Outputs:
        plan, side = _Plan.of(request), self._context.config.vision.grid_size
        colormap, opacity = _choice(request, "COLORMAP", COLORMAPS), _opacity(request)
        encoded = request.flag("base64_encoded")
        maps = _finite(request, "HEAT", [side, side])
        plan.check("HEAT", len(maps), plan.prompts)
        heat = color_scale(maps, plan.normalization, colormap)
        view = _view(self._context, _image_size(request))
        height, width = plan.height, plan.width

        def read(row: bytes) -> NDArray[Any]:
            return self._preprocess.decode(decode_base64(row, self._limits) if encoded else row)

        picture = Image.fromarray(map_rows("INPUT_IMAGE", request.strings("INPUT_IMAGE"), read)[0])
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        seen = view.seen(height, width)
        files = np.empty(len(heat), dtype=np.object_)
        for index in range(len(heat)):  # one at a time, so that only one lies in memory
            placed = view.place(heat[index : index + 1], height, width)[0]
            file = io.BytesIO()
            overlay(picture, placed, seen, colormap, opacity).save(file, "PNG", compress_level=1)
            files[index] = base64.b64encode(file.getvalue()) if encoded else file.getvalue()
        return {"OVERLAY": files}


def _one_thread() -> None:
    """From here on NumPy multiplies in one thread: to wake others takes longer than products of this size."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def _finite(request: Request, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """An input [n, *shape] FP32, which may come from anybody: the steps can be called by themselves."""
    array: NDArray[np.float32] = request.array(name, shape, np.float32)
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{name}: not all finite")
    return array


def _choice(request: Request, name: str, choices: Sequence[str]) -> str:
    """One of `choices`, the first one unless the optional input was sent."""
    rows = request.strings(name)
    if not rows:
        return choices[0]
    given = rows[0].decode("utf-8", "replace")
    if len(rows) > 1 or given not in choices:
        got = f"{len(rows)} values" if len(rows) > 1 else repr(given[:100])
        raise InvalidInputError(f"{name}: got {got}, expected one of {', '.join(choices)}")
    return given


def _opacity(request: Request) -> float:
    given = request.optional("OPACITY", 1, np.float32)
    opacity = 0.5 if given is None else float(given[0])
    if not 0 <= opacity <= 1:
        raise InvalidInputError(f"OPACITY: got {opacity:g}, expected 0 to 1")
    return opacity


def _image_size(request: Request) -> NDArray[np.int32]:
    """Height and width of the one image."""
    sizes = request.array("IMAGE_SIZE", [2], np.int32)
    if len(sizes) != 1 or sizes.min() < 1:
        raise InvalidInputError(f"IMAGE_SIZE: got {sizes.tolist()}, expected that of one image")
    return np.asarray(sizes[0])


def _view(context: Context, size: NDArray[np.int32]) -> View:
    vision, (height, width) = context.config.vision, map(int, size)
    covered = vision.grid_size * vision.patch_size / vision.image_size
    return View(width, height, shown(context.config.image, height, width), covered)

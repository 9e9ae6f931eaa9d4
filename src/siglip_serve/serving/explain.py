"""Answer the steps of `explain_image`.

They run one after the other: image, prompts, text embeddings, vectors, the vision model, maps, overlays.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.checkpoint.model_config import ModelConfig, NaflexImageConfig
from siglip_serve.embeddings import zero_shot
from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.errors import InvalidInputError
from siglip_serve.heatmaps.picture import (
    COLORMAPS,
    NORMALIZATIONS,
    Normalization,
    View,
    color_scale,
    default_size,
    normalize,
    overlay,
)
from siglip_serve.images.patches import grid_of
from siglip_serve.images.resize import shown
from siglip_serve.serving.context import Context, readable_start
from siglip_serve.serving.explain_plan import ExplainPlan
from siglip_serve.serving.image_reader import ImageReader
from siglip_serve.serving.label import MOST_TEXTS, read_labels, read_templates
from siglip_serve.serving.request import Request
from siglip_serve.serving.respond import Outputs, RequestModel
from siglip_serve.serving.rows import map_rows
from siglip_serve.serving.siglip_vision import MOST_VECTORS
from siglip_serve.texts.tokenizer import load_tokenizer

__all__ = ["ExplainMaps", "ExplainOverlays", "ExplainPrompts", "ExplainVectors"]

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


class ExplainPrompts(RequestModel):
    """Checks the request, all but its image -> INPUT_IDS [n, T] INT64, PLAN [6] INT32.

    PROMPTS [P], optional TEMPLATE [K], BACKGROUND [Q], MODE [1], NORMALIZE [1] BYTES and SIZE [2] INT32. The
    ids are those of each prompt, then of each text of the background, in each template. IMAGE_SIZE [1, 2]
    INT32, height and width, makes the step wait for the image. COLORMAP [1] BYTES and OPACITY [1] FP32 are
    only checked, before the towers work in vain.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._max_bytes = context.settings.max_text_bytes
        with readable_start():
            self._tokenizer = load_tokenizer(context.config)
        self._config = context.config

    def answer(self, request: Request) -> Outputs:
        """Tokenize the texts of a request, and write its plan."""
        view = _view(self._config, request)
        prompts = read_labels(request, "PROMPTS", self._max_bytes)
        templates = read_templates(request, self._max_bytes)
        relative = request.option("MODE", _MODES) == "relative"
        normalization = cast(Normalization, request.option("NORMALIZE", NORMALIZATIONS))
        background = self._background(request, prompts, relative)
        texts = len(prompts) + len(background)
        if texts > MOST_VECTORS or texts * len(templates) > MOST_TEXTS:
            raise InvalidInputError(
                f"PROMPTS: {len(prompts)} prompts and {len(background)} texts of BACKGROUND in "
                f"{len(templates)} templates, expected at most {MOST_VECTORS} prompts and texts, and "
                f"{MOST_TEXTS} with their templates"
            )
        asked = request.optional("SIZE", 2, np.int32)
        height, width = default_size(view, len(prompts)) if asked is None else map(int, asked)
        plan = ExplainPlan(len(prompts), len(templates), relative, normalization, height, width)
        request.option("COLORMAP", COLORMAPS)
        _opacity(request)
        ids = self._ids(request, "PROMPTS", prompts, templates)
        ids += self._ids(request, "BACKGROUND", background, templates)
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
        """Tokenize each label in each template, and name one that does not fit by its own index."""
        truncation = request.truncates()
        ids = []
        for index, label in enumerate(labels):
            for template in templates:
                try:
                    ids.append(self._tokenizer(template.replace("{}", label), truncation))
                except InvalidInputError as error:
                    raise error.at(name, index) from error
        return ids


class ExplainVectors(RequestModel):
    """TEXT_EMBEDDING [n, D], PLAN -> PROMPT_VECTORS [1, P, D], PROMPT_EMBEDDING [P, D].

    A prompt's embedding is the mean over its templates, at unit length. Its vector is that, or in the mode
    `relative` its difference to the mean of the background, or of all prompts where there is none.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._width = tensor_dims(context.config)["EMBEDDING"]
        _one_thread()

    def answer(self, request: Request) -> Outputs:
        """Make the vectors of a request's prompts."""
        plan = ExplainPlan.read(request)
        texts = request.finite("TEXT_EMBEDDING", self._width)
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


class ExplainMaps(RequestModel):
    """FOUND_MAPS, FOUND_UNATTRIBUTED of the vision model -> HEATMAPS, SCORES, UNATTRIBUTED, PATCH_MAPS, HEAT.

    HEAT are PATCH_MAPS under a name that is no output of the ensemble.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._config = context.config
        dims = tensor_dims(context.config)
        self._width, self._places = dims["EMBEDDING"], dims["PATCH_MAPS"][-1]
        _one_thread()

    def answer(self, request: Request) -> Outputs:
        """Place the maps of a request over its picture, and score its prompts."""
        plan, view = ExplainPlan.read(request), _view(self._config, request)
        rows, columns = grid_of(self._config, view.height, view.width)
        maps = request.finite("FOUND_MAPS", [plan.prompts, self._places])[..., : rows * columns]
        maps = maps.reshape(plan.prompts, rows, columns)
        embedding = request.finite("EMBEDDING", self._width)[0]
        prompts = request.finite("PROMPT_EMBEDDING", self._width)
        plan.check_rows("PROMPT_EMBEDDING", len(prompts))
        vectors = request.finite("PROMPT_VECTORS", [plan.prompts, *self._width])[0]
        if not embedding.any():
            raise InvalidInputError("EMBEDDING[0]: all zero, which has no direction")
        unit = l2_normalize(embedding.astype(np.float64))  # in which the squares of tiny values are not zero
        # In the mode `relative`, the part that all prompts share has no place either.
        unattributed = request.finite("FOUND_UNATTRIBUTED", [plan.prompts])[0]
        unattributed = unattributed + (prompts - vectors) @ unit
        return {
            "HEATMAPS": view.place(normalize(maps, plan.normalization), plan.height, plan.width),
            "SCORES": (prompts @ unit).astype(np.float32),
            "UNATTRIBUTED": unattributed.astype(np.float32),
            "PATCH_MAPS": maps,
            "HEAT": maps,
        }


class ExplainOverlays(RequestModel):
    """HEAT [P, G, G], PLAN, INPUT_IMAGE [1] -> OVERLAY [P], PNG files of the maps over the image.

    Optional COLORMAP [1] BYTES and OPACITY [1] FP32. All maps share one scale of colours, or with the
    NORMALIZE `prompt` each has its own. With the parameter `base64_encoded` the files are
    base64 text, as the image.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._config = context.config
        # Whatever the settings say: to look at, Pillow's pixels are as good, and this process needs no torch.
        self._images = ImageReader(context, "pil")
        _one_thread()

    def answer(self, request: Request) -> Outputs:
        """Paint the maps of a request."""
        plan, view = ExplainPlan.read(request), _view(self._config, request)
        colormap, opacity = request.option("COLORMAP", COLORMAPS), _opacity(request)
        encoded = request.flag("base64_encoded")
        maps = request.finite("HEAT", grid_of(self._config, view.height, view.width))
        plan.check_rows("HEAT", len(maps))
        heat = color_scale(maps, plan.normalization, colormap)
        height, width = plan.height, plan.width
        with self._images.decoder(request) as decode:
            pixels = map_rows("INPUT_IMAGE", request.strings("INPUT_IMAGE"), decode)[0]
        picture = Image.fromarray(pixels)
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
    """Keep NumPy in one thread from here on: waking others takes longer than products of this size."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def _opacity(request: Request) -> float:
    given = request.optional("OPACITY", 1, np.float32)
    opacity = 0.5 if given is None else float(given[0])
    if not 0 <= opacity <= 1:
        raise InvalidInputError(f"OPACITY: got {opacity:g}, expected 0 to 1")
    return opacity


def _view(config: ModelConfig, request: Request) -> View:
    """Read the part of the one image that the tower sees."""
    sizes = request.array("IMAGE_SIZE", [2], np.int32)
    if len(sizes) != 1 or sizes.min() < 1:
        raise InvalidInputError(f"IMAGE_SIZE: got {sizes.tolist()}, expected that of one image")
    vision, (height, width) = config.vision, map(int, sizes[0])
    if isinstance(config.image, NaflexImageConfig):
        return View(width, height, (0, 0, width, height))
    covered = vision.grid_size * vision.patch_size / vision.image_size
    return View(width, height, shown(config.image, height, width), covered)

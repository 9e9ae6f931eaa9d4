"""What each Triton model of the repository answers; one class a model, used by its `model.py`."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.embeddings import zero_shot
from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.errors import InvalidInputError, ParameterError
from siglip_serve.machine import available_cores
from siglip_serve.serving.counters import TowerMeter
from siglip_serve.serving.respond import (
    Context,
    Outputs,
    Request,
    Row,
    RowBuffer,
    has_input,
    map_rows,
    open_turns,
    readable_start,
    respond_each,
    respond_together,
)
from siglip_serve.texts.tokenizer import decode_text, load_tokenizer

if TYPE_CHECKING:
    from siglip_serve.engine.passes import Batch
    from siglip_serve.engine.plan import Plan

_LONGEST_KEY = 1024
MOST_TEXTS = 65_536
_MOST_PLACES = 4
_EXPLAINED = ("PATCH_MAPS", "UNATTRIBUTED")
MOST_VECTORS = 1024  # of one image that is explained

__all__ = [
    "MOST_TEXTS",
    "MOST_VECTORS",
    "LabelPrompter",
    "LabelScorer",
    "TextEmbedder",
    "TextTokenizer",
    "VisionEmbedder",
    "read_labels",
    "read_templates",
]


class VisionEmbedder:
    """`siglip_vision_model`, `siglip_base_model`: PIXEL_VALUES -> the outputs that each request asks for.

    With the parameter `normalized`, vectors have unit length. Where the model has the input, a request with
    PROMPT_VECTORS [1, P, D] is answered with what the places of its one image add to each vector's score,
    PATCH_MAPS [1, P, T] and UNATTRIBUTED [1, P], and with the EMBEDDING [1, D] that it is the score of.
    """

    def __init__(self, context: Context) -> None:
        from siglip_serve.engine.engines import VisionEngine
        from siglip_serve.towers.load import load_vision

        self._refusals = context.refusals
        config = context.config
        dims = tensor_dims(config)
        self._shape, self._width = dims["PIXEL_VALUES"], dims["EMBEDDING"]
        with readable_start():
            self._engine = VisionEngine(load_vision(config.path), config.image, _plan(context))
            # The first pass allocates and chooses kernels: not at a caller's expense.
            self._engine(np.zeros((1, *self._shape), dtype=np.uint8)).rows(0, 1)
        self._buffer = RowBuffer(self._engine.staging)
        self._meter = TowerMeter(context.model)
        self._turns = open_turns(context)

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request; their rows are computed together, those with vectors one by one."""
        embedded = [request for request in requests if not has_input(request, "PROMPT_VECTORS")]
        responses = respond_together(embedded, self._read, self._compute, _finish, self._refusals)
        if len(embedded) == len(requests):
            return responses
        rest = iter(responses)
        return [
            respond_each([request], self._explain, self._refusals)[0]
            if has_input(request, "PROMPT_VECTORS")
            else next(rest)
            for request in requests
        ]

    def close(self) -> None:
        """To be called when no more requests come."""
        self._turns.close()

    def _read(self, request: Request) -> NDArray[Any]:
        request.flag("normalized")
        wanted = request.wanted()
        # A request that names no output is asked for all: it gets those that there are.
        if wanted and set(wanted) <= set(_EXPLAINED):
            raise InvalidInputError(f"{wanted[0]}: only of requests with the input PROMPT_VECTORS")
        return request.array("PIXEL_VALUES", self._shape, np.uint8)

    def _explain(self, request: Request) -> Outputs:
        pixels = request.array("PIXEL_VALUES", self._shape, np.uint8)
        if len(pixels) != 1:
            raise InvalidInputError(f"PIXEL_VALUES: {len(pixels)} images with vectors, expected one")
        rows = request.shape("PROMPT_VECTORS")[1:2]
        vectors = request.array("PROMPT_VECTORS", [*rows, *self._width], np.float32)[0]
        if not 1 <= len(vectors) <= MOST_VECTORS:
            raise InvalidInputError(f"PROMPT_VECTORS: {len(vectors)} vectors, expected 1 to {MOST_VECTORS}")
        if not np.isfinite(vectors).all():
            raise InvalidInputError("PROMPT_VECTORS: not all finite")
        begin = time.perf_counter()
        found = self._engine.explain(pixels, vectors)
        self._meter.add(1, time.perf_counter() - begin)
        outputs = {
            "PATCH_MAPS": found.maps,
            "UNATTRIBUTED": found.unattributed,
            "EMBEDDING": found.embedding,
        }
        asked = {name: outputs[name][None] for name in request.wanted() if name in outputs}
        if not asked:
            raise InvalidInputError(
                f"{', '.join(request.wanted())}: not of requests with the input PROMPT_VECTORS"
            )
        return asked

    def _compute(self, parts: Sequence[NDArray[Any]], requests: Sequence[Request]) -> Batch:
        pixels = self._buffer.join(parts)
        wanted = {name for request in requests for name in request.wanted()}
        with self._turns.turn(len(pixels)):
            begin = time.perf_counter()
            batch = self._engine(pixels, wanted)
            seconds = time.perf_counter() - begin
        self._meter.add(len(pixels), seconds)
        return batch


class TextTokenizer:
    """`siglip_text_tokenize`: INPUT_TEXT [n, 1] BYTES -> INPUT_IDS [n, T] INT64.

    With the parameter `truncation`, what does not fit is cut instead of refused.
    """

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals
        with readable_start():
            self._tokenizer = load_tokenizer(context.config)
        self._embed_models = context.settings.embed_text_models
        self._max_bytes = context.settings.max_text_bytes
        self._known = _Cache(context.settings.text_cache_rows)

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return respond_each(requests, self._tokenize, self._refusals)

    def _tokenize(self, request: Request) -> Outputs:
        request.choice("embed_model", self._embed_models)
        truncation = request.flag("truncation")

        def ids(row: bytes) -> Row:
            # Kept only if it fits: then truncation makes no difference. And only if it is short: the key
            # is the text itself.
            known = self._known.get(row)
            if known is None:
                known = self._tokenizer(decode_text(row, self._max_bytes), truncation)
                if not truncation and len(row) <= _LONGEST_KEY:
                    self._known.put(row, known)
            return known

        return {"INPUT_IDS": map_rows("INPUT_TEXT", request.strings("INPUT_TEXT"), ids)}


class TextEmbedder:
    """`siglip_text_model`: INPUT_IDS [n, T] INT64 -> EMBEDDING [n, P].

    Texts that came before are answered from a bounded cache, so that a set of labels costs the tower
    only once. With the parameter `normalized`, embeddings have unit length.
    """

    def __init__(self, context: Context) -> None:
        from siglip_serve.engine.engines import TextEngine
        from siglip_serve.towers.load import load_text

        self._refusals = context.refusals
        settings, config = context.settings, context.config
        self._shape = tensor_dims(config)["INPUT_IDS"]
        with readable_start():
            self._engine = TextEngine(load_text(config.path), _plan(context))
            self._engine(np.zeros((1, *self._shape), dtype=np.int64)).rows(0, 1)
        self._vocabulary, self._width = config.text.vocab_size, config.text.projection_size
        self._known = _Cache(settings.text_cache_rows)
        self._buffer = RowBuffer()
        self._meter = TowerMeter(context.model)

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request; their rows are computed together."""
        return respond_together(requests, self._read, self._compute, _finish, self._refusals)

    def _read(self, request: Request) -> NDArray[Any]:
        request.flag("normalized")
        ids = request.array("INPUT_IDS", self._shape, np.int64)
        outside = np.flatnonzero(((ids < 0) | (ids >= self._vocabulary)).any(axis=1))
        if len(outside):  # on a GPU it would end the process
            raise InvalidInputError(
                f"INPUT_IDS[{outside[0]}]: an id outside the vocabulary, expected 0 to {self._vocabulary - 1}"
            )
        return ids

    def _compute(self, parts: Sequence[NDArray[Any]], _requests: Sequence[Request]) -> Batch:
        from siglip_serve.engine.passes import Batch

        ids = self._buffer.join(parts)
        keys = [row.tobytes() for row in ids]
        rows = {key: row for key in keys if (row := self._known.get(key)) is not None}
        new = {key: index for index, key in enumerate(keys) if key not in rows}
        lost: set[bytes] = set()
        if new:
            begin = time.perf_counter()
            computed = self._engine(ids[list(new.values())])
            self._meter.add(len(new), time.perf_counter() - begin)
            nothing = np.zeros((len(new), self._width), dtype=np.float32)
            embeddings = computed.outputs.get("EMBEDDING", nothing)
            for key, row, failed in zip(new, embeddings, computed.failed, strict=True):
                rows[key] = row
                if failed:
                    lost.add(key)
                else:
                    self._known.put(key, row.copy())  # a view would keep the whole batch alive
        return Batch(
            {"EMBEDDING": np.stack([rows[key] for key in keys])},
            np.array([key in lost for key in keys]),
        )


class LabelPrompter:
    """`label_prompts`: LABELS [L] and optional TEMPLATE [K] BYTES -> PROMPTS [L * K, 1], label by label.

    A third input, the image's embedding, is not read: it makes the step wait.
    """

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals
        self._max_bytes = context.settings.max_text_bytes

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return respond_each(requests, self._prompts, self._refusals)

    def _prompts(self, request: Request) -> Outputs:
        labels = read_labels(request, "LABELS", self._max_bytes)
        templates = read_templates(request, self._max_bytes)
        if len(labels) * len(templates) > MOST_TEXTS:
            raise InvalidInputError(
                f"LABELS: {len(labels)} labels with {len(templates)} templates, "
                f"expected at most {MOST_TEXTS} prompts"
            )
        prompts = [template.replace("{}", label).encode() for label in labels for template in templates]
        return {
            "PROMPTS": np.array(prompts, dtype=np.object_).reshape(-1, 1),
            "TEMPLATE_COUNT": np.array([len(templates)], dtype=np.int32),
        }


def read_labels(request: Request, name: str, max_bytes: int) -> list[str]:
    """The texts of an input [n] BYTES, at least one, none of them empty."""

    def label(row: bytes) -> Any:
        text = decode_text(row, max_bytes)
        if not text.strip():
            raise InvalidInputError("the text is empty")
        return text

    return [str(text) for text in map_rows(name, request.strings(name), label)]


def read_templates(request: Request, max_bytes: int) -> list[str]:
    """The texts of the optional input TEMPLATE [n] BYTES, with `{}` in each; without it, `{}` alone."""

    def template(row: bytes) -> Any:
        text = decode_text(row, max_bytes)
        places = text.count("{}")
        if not 1 <= places <= _MOST_PLACES:
            raise InvalidInputError(
                f"{text[:100]!r} has {places} times {{}} where the label goes, expected 1 to {_MOST_PLACES}"
            )
        return text

    return [str(text) for text in map_rows("TEMPLATE", request.strings("TEMPLATE") or [b"{}"], template)]


class LabelScorer:
    """`label_scores`: IMAGE_EMBEDDING [N, D], PROMPT_EMBEDDING [L * K, D] -> PROBABILITIES [N, L].

    Each pair's own probability, as SigLIP was trained; with the parameter `softmax` the labels of an
    image compete and sum to one. CLIP's labels always do: it was trained to choose, and has no bias that
    would make its cosines probabilities of their own.
    """

    def __init__(self, context: Context) -> None:
        from siglip_serve.towers.load import load_scale

        self._refusals = context.refusals
        with readable_start():
            self._scale, self._bias = load_scale(context.config.path)
        self._width = tensor_dims(context.config)["EMBEDDING"]

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request."""
        return respond_each(requests, self._score, self._refusals)

    def _score(self, request: Request) -> Outputs:
        images = request.array("IMAGE_EMBEDDING", self._width, np.float32)
        prompts = request.array("PROMPT_EMBEDDING", self._width, np.float32)
        templates = int(request.array("TEMPLATE_COUNT", [], np.int32)[0])
        if templates < 1 or len(prompts) % templates:
            raise InvalidInputError(
                f"TEMPLATE_COUNT: got {templates}, expected a divisor of the {len(prompts)} prompts"
            )
        score = zero_shot.softmax if self._compete(request) else zero_shot.sigmoid
        classes = zero_shot.build_class_embeddings(prompts.reshape(-1, templates, *self._width))
        logits = zero_shot.logits(zero_shot.cosine(images, classes), self._scale, self._bias or 0.0)
        return {"PROBABILITIES": score(logits).astype(np.float32)}

    def _compete(self, request: Request) -> bool:
        """Whether the labels do."""
        asked = request.flag("softmax")
        if self._bias is None and not asked and request.has_parameter("softmax"):
            raise ParameterError(
                "parameter 'softmax': got false, but the labels of a CLIP checkpoint always compete: "
                "it has no probability of one pair; send true, or leave it out"
            )
        return asked or self._bias is None


class _Cache:
    """Arrays by key; the least recently used are dropped beyond `rows`."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._arrays: OrderedDict[bytes, Row] = OrderedDict()

    def get(self, key: bytes) -> Row | None:
        array = self._arrays.get(key)
        if array is not None:
            self._arrays.move_to_end(key)
        return array

    def put(self, key: bytes, array: Row) -> None:
        self._arrays[key] = array
        if len(self._arrays) > self._rows:
            self._arrays.popitem(last=False)


def _plan(context: Context) -> Plan:
    import torch

    from siglip_serve.engine.plan import Plan

    settings = context.settings
    threads = settings.threads or available_cores()
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the exact mode, in the patch convolution too
    return Plan(
        device=context.device,
        dtype=settings.dtype,
        backend=settings.backend,
        max_rows=settings.max_rows,
        threads=threads,
        cache=Path(settings.cache or os.path.expanduser("~/.cache/siglip-serve")),  # noqa: PTH111 - no HOME is fine
        calibration=Path(settings.calibration) if settings.calibration else None,
        heatmap_blocks=settings.heatmap_blocks,
        heatmap_vectors=settings.heatmap_prompts,
    )


def _finish(request: Request, outputs: Outputs) -> Outputs:
    asked = {name: outputs[name] for name in request.wanted() if name in outputs}
    if request.flag("normalized"):
        asked = {name: l2_normalize(array) for name, array in asked.items()}
    return asked

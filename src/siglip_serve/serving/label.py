"""Answer the steps of `classify_image`: labels become prompts, embeddings become logits and probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.embeddings import zero_shot
from siglip_serve.errors import InvalidInputError, ParameterError
from siglip_serve.serving.context import Context, readable_start
from siglip_serve.serving.request import Request
from siglip_serve.serving.respond import Outputs, RequestModel
from siglip_serve.serving.rows import map_rows
from siglip_serve.texts.tokenizer import decode_text

__all__ = ["MOST_TEXTS", "LabelPrompts", "LabelScores", "read_labels", "read_templates"]

MOST_TEXTS = 65_536
_MOST_PLACES = 4
_PROMPTS_AT_ONCE = 1024  # the copy in double precision of all prompts of a request might be large


class LabelPrompts(RequestModel):
    """LABELS [L] and optional TEMPLATE [K] BYTES -> PROMPTS [L * K, 1], label by label, TEMPLATE_COUNT [1].

    A third input, the image's embedding, is not read: it makes the step wait.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._max_bytes = context.settings.max_text_bytes

    def answer(self, request: Request) -> Outputs:
        """Put each label into each template."""
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


class LabelScores(RequestModel):
    """IMAGE_EMBEDDING [n, D], PROMPT_EMBEDDING [L * K, D], TEMPLATE_COUNT [1] -> two outputs [n, L].

    LOGITS are scale x cosine + bias, and PROBABILITIES are computed from them. Each pair has its own
    probability, as SigLIP was trained. With the parameter `softmax` the labels of an image compete and sum to
    one. CLIP's labels always do: it was trained to choose, and has no bias that would make its cosines
    probabilities of their own.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        with readable_start():
            self._scale, self._bias = load_scale(context.config.path)
        self._width = tensor_dims(context.config)["EMBEDDING"]

    def answer(self, request: Request) -> Outputs:
        """Score each image against each label."""
        images = request.finite("IMAGE_EMBEDDING", self._width)
        prompts = request.finite("PROMPT_EMBEDDING", self._width)
        templates = int(request.array("TEMPLATE_COUNT", [], np.int32)[0])
        if templates < 1 or len(prompts) % templates:
            raise InvalidInputError(
                f"TEMPLATE_COUNT: got {templates}, expected a divisor of the {len(prompts)} prompts"
            )
        score = zero_shot.softmax if self._compete(request) else zero_shot.sigmoid
        logits = self._logits(images, prompts.reshape(-1, templates, *self._width))
        return {"PROBABILITIES": score(logits).astype(np.float32), "LOGITS": logits.astype(np.float32)}

    def _logits(self, images: NDArray[np.float32], prompts: NDArray[np.float32]) -> zero_shot.Floats:
        """Logits float64 [n, L] of images [n, D] and prompts [L, K, D].

        A logit's error is a probability's relative error. Of -60 in single precision that would be 1e-5.
        """
        precise, step = images.astype(np.float64), max(1, _PROMPTS_AT_ONCE // prompts.shape[1])
        parts = []
        for start in range(0, len(prompts), step):
            some = prompts[start : start + step].astype(np.float64)
            # One template needs no mean, and the cosine normalises.
            classes = some[:, 0] if some.shape[1] == 1 else zero_shot.build_class_embeddings(some)
            parts.append(zero_shot.logits(zero_shot.cosine(precise, classes), self._scale, self._bias or 0.0))
        return np.concatenate(parts, axis=1)

    def _compete(self, request: Request) -> bool:
        """Tell if the labels of an image compete."""
        asked = request.flag("softmax")
        if self._bias is None and not asked and request.has_parameter("softmax"):
            raise ParameterError(
                "parameter 'softmax': got false, but the labels of a CLIP checkpoint always compete: "
                "it has no probability of one pair; send true, or leave it out"
            )
        return asked or self._bias is None


def read_labels(request: Request, name: str, max_bytes: int) -> list[str]:
    """Return the texts of an input [n] BYTES, at least one, none of them empty."""

    def label(row: bytes) -> Any:
        text = decode_text(row, max_bytes)
        if not text.strip():
            raise InvalidInputError("the text is empty")
        return text

    return [str(text) for text in map_rows(name, request.strings(name), label)]


def read_templates(request: Request, max_bytes: int) -> list[str]:
    """Return the texts of the optional input TEMPLATE [n] BYTES, `{}` in each, or `{}` alone."""

    def template(row: bytes) -> Any:
        text = decode_text(row, max_bytes)
        places = text.count("{}")
        if not 1 <= places <= _MOST_PLACES:
            raise InvalidInputError(
                f"{text[:100]!r} has {places} times {{}} where the label goes, expected 1 to {_MOST_PLACES}"
            )
        return text

    return [str(text) for text in map_rows("TEMPLATE", request.strings("TEMPLATE") or [b"{}"], template)]

"""The ways of measuring, each a row of the table: prompts of the zero-shot ones, scores of all.

- `published`: text neighbours of a class's whole mapping row, k = 10, cosine, distance-weighted.
- `argmax`: one prompt with the first name. The class whose text has the largest cosine wins.
- `open_clip`: OpenAI's 80 templates, each prompt normalised, mean over templates, normalised again.
- `big_vision`: first name, canonicalised, with `clip_paper`'s templates (the 80 and the bare name).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.embeddings.zero_shot import Floats, build_class_embeddings, cosine, top_k
from validate.dataset import ClassInfo, Dataset, few_shot
from validate.errors import DatasetError
from validate.measures.accuracy import Accuracy, Confusion, confusion_pairs, top_k_hits
from validate.measures.knn import knn_scores, text_knn_scores

__all__ = [
    "PROTOCOLS",
    "PUBLISHED_PROMPTS",
    "Row",
    "ZeroShot",
    "canonicalize",
    "curated_names",
    "few_shot_row",
    "imagenet_classnames",
    "imagenet_templates",
    "linear_probe_row",
    "raw_pixel_row",
    "zero_shot_protocols",
    "zero_shot_row",
]

PROTOCOLS = ("published", "argmax", "open_clip", "big_vision")
PUBLISHED_PROMPTS = (
    "A photo of {text}.",
    "This is a photo containing images of {text}.",
    "This is a photo from ImageNet's {label} category. This category contains photos of {text}.",
)
_ARGMAX_PROMPT = "a photo of a {name}."
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

Embed = Callable[[Sequence[str]], Floats]


@dataclass(frozen=True)
class ZeroShot:
    """A zero-shot protocol: `prompts[class][template]`, and how they become scores."""

    name: str
    prompt: str
    prompts: list[list[str]]
    neighbours: bool = False


@dataclass
class Row:
    """One row of the table: hits of every validation image, one array a seed."""

    name: str
    prompt: str
    top1: list[NDArray[np.bool_]]
    top5: list[NDArray[np.bool_]]
    confusions: list[Confusion] = field(default_factory=list)

    def accuracy(self, k: int, chosen: NDArray[np.bool_] | None = None) -> Accuracy:
        """Accuracy over all images, or the chosen ones, of the mean of several seeds."""
        hits = [hit if chosen is None else hit[chosen] for hit in (self.top1 if k == 1 else self.top5)]
        return Accuracy(round(float(np.mean([hit.sum() for hit in hits]))), len(hits[0]))

    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest top-1 over the seeds, or None for a single one."""
        values = [float(hit.mean()) for hit in self.top1]
        return (min(values), max(values)) if len(values) > 1 else None


def canonicalize(text: str) -> str:
    """big_vision's canonical form: `_` to space, ASCII punctuation removed, lowercase, single spaces."""
    text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    return re.sub(r"\s+", " ", text).strip()


def zero_shot_protocols(names: Sequence[str], classes: Sequence[ClassInfo]) -> list[ZeroShot]:
    """The zero-shot protocols called `names` (of `PROTOCOLS`) with their prompts for `classes`."""
    return [protocol for name in names for protocol in _MAKERS[name](classes)]


def _published(classes: Sequence[ClassInfo]) -> Iterator[ZeroShot]:
    for template in PUBLISHED_PROMPTS:
        prompts = [[template.format(text=row.text, label=row.synset)] for row in classes]
        yield ZeroShot("zero-shot", template, prompts, neighbours=True)


def _argmax(classes: Sequence[ClassInfo]) -> Iterator[ZeroShot]:
    prompts = [[_ARGMAX_PROMPT.format(name=row.first_name)] for row in classes]
    yield ZeroShot("zero-shot, argmax", _ARGMAX_PROMPT, prompts)


def _open_clip(classes: Sequence[ClassInfo]) -> Iterator[ZeroShot]:
    templates, names, whose = imagenet_templates(), curated_names(classes), "curated names"
    if names is None:
        names, whose = [row.first_name for row in classes], "first names"
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    yield ZeroShot("zero-shot, open_clip", f"{len(templates)} templates, {whose}", prompts)


def _big_vision(classes: Sequence[ClassInfo]) -> Iterator[ZeroShot]:
    templates = [*imagenet_templates(), "{}"]
    names = curated_names(classes) or [row.text for row in classes]
    first = [canonicalize(name.split(",")[0]) for name in names]
    prompts = [[canonicalize(template.replace("{}", name)) for template in templates] for name in first]
    yield ZeroShot("zero-shot, big_vision", f"{len(templates)} templates, canonical first names", prompts)


_MAKERS: dict[str, Callable[[Sequence[ClassInfo]], Iterator[ZeroShot]]] = {
    "published": _published,
    "argmax": _argmax,
    "open_clip": _open_clip,
    "big_vision": _big_vision,
}


def _data(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        resources.files("validate").joinpath("data", name).read_text(encoding="utf-8")
    )
    return content


def imagenet_templates() -> list[str]:
    """OpenAI's 80 templates, `{}` where a name goes."""
    templates: list[str] = _data("imagenet_templates.json")["templates"]
    return templates


def imagenet_classnames() -> list[str]:
    """The curated names of ImageNet's 1,000 classes, in the order of their synset ids."""
    names: list[str] = _data("imagenet_classnames.json")["classnames"]
    return names


def curated_names(classes: Sequence[ClassInfo]) -> list[str] | None:
    """The curated names, when `classes` are ImageNet's 1,000 and so in the same order."""
    data, names = _data("imagenet_classnames.json"), imagenet_classnames()
    ends = (classes[0].synset, classes[-1].synset)
    whole = ((data["first_synset"], data["last_synset"]), ("0", str(len(names) - 1)))
    fits = len(classes) == len(names) and ends in whole
    return names if fits else None


def zero_shot_row(protocol: ZeroShot, embed: Embed, images: Floats, labels: NDArray[np.int64]) -> Row:
    """Classify `images` [n, d] of classes `labels` [n] by the texts of `protocol`.

    `embed` is called with all prompts of all classes and returns their embeddings [classes * templates, d].
    """
    flat = embed([prompt for prompts in protocol.prompts for prompt in prompts])
    prompts = flat.reshape(len(protocol.prompts), -1, flat.shape[1])
    if protocol.neighbours:
        scores = text_knn_scores(prompts[:, 0], images)
    else:
        scores = cosine(images, build_class_embeddings(prompts))
    return _row(protocol.name, protocol.prompt, [scores], labels)


def few_shot_row(dataset: Dataset, gallery: Floats, images: Floats, shots: int, seeds: Sequence[int]) -> Row:
    """k-nearest neighbours (k = 10, cosine, distance-weighted) among `shots` training images per class."""
    labels, wanted = _labels(dataset)

    def scores(seed: int) -> Floats:
        chosen = few_shot(dataset.train, shots, seed)
        return knn_scores(gallery[chosen], labels[chosen], images, len(dataset.classes))

    return _row(f"{shots}-shot", "", map(scores, _distinct(dataset, shots, seeds)), wanted)


def linear_probe_row(
    dataset: Dataset, gallery: Floats, images: Floats, shots: int, seeds: Sequence[int]
) -> Row:
    """Logistic regression (L2, C = 10) on normalised embeddings of `shots` training images per class."""
    from sklearn.linear_model import LogisticRegression

    labels, wanted = _labels(dataset)
    gallery, images = l2_normalize(gallery), l2_normalize(images)

    def scores(seed: int) -> Floats:
        chosen = few_shot(dataset.train, shots, seed)
        if len(set(labels[chosen])) < 2:
            raise DatasetError("train: a linear probe needs images of at least two classes")
        probe = LogisticRegression(C=10.0, max_iter=500).fit(gallery[chosen], labels[chosen])
        probabilities = np.full((len(images), len(dataset.classes)), -np.inf)
        known = probe.predict_proba(images)
        probabilities[:, probe.classes_] = known
        return probabilities

    return _row(f"{shots}-shot, linear probe", "", map(scores, _distinct(dataset, shots, seeds)), wanted)


def raw_pixel_row(dataset: Dataset, gallery: Floats, images: Floats, shots: int, seeds: Sequence[int]) -> Row:
    """The few-shot protocol on pixels [n, values] instead of embeddings: the result of no model at all."""
    row = few_shot_row(dataset, gallery, images, shots, seeds)
    row.name = f"{shots}-shot, raw pixels"
    return row


def _labels(dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    train, valid = (np.array([sample.label for sample in part]) for part in (dataset.train, dataset.valid))
    return train, valid


def _distinct(dataset: Dataset, shots: int, seeds: Sequence[int]) -> Sequence[int]:
    """One seed is enough when no class has more images than are taken: every draw is the same."""
    draws = {tuple(few_shot(dataset.train, shots, seed)) for seed in seeds}
    return seeds if len(draws) > 1 else seeds[:1]


def _row(name: str, prompt: str, all_scores: Any, labels: NDArray[np.int64]) -> Row:
    row = Row(name, prompt, [], [])
    for scores in all_scores:
        row.top1.append(top_k_hits(scores, labels, 1))
        row.top5.append(top_k_hits(scores, labels, 5))
        row.confusions = row.confusions or confusion_pairs(top_k(scores, 1)[:, 0], labels)
    return row

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from siglip_serve.embeddings.zero_shot import Floats
from validate.dataset import ClassInfo, Dataset, Sample
from validate.errors import DatasetError
from validate.protocols import (
    PROTOCOLS,
    Row,
    canonicalize,
    few_shot_row,
    linear_probe_row,
    raw_pixel_row,
    zero_shot_protocols,
    zero_shot_row,
)

CLASSES = [
    ClassInfo("n00000001", "tench, Tinca tinca"),
    ClassInfo("n00000002", "great white shark, man-eater"),
]
DIRECTIONS = np.array([[1.0, 0.0], [0.0, 1.0]])


def dataset(train_labels: Sequence[int], valid_labels: Sequence[int]) -> Dataset:
    train, valid = (
        [Sample(Path(f"{label}_{number}"), label) for number, label in enumerate(labels)]
        for labels in (train_labels, valid_labels)
    )
    return Dataset(Path(), CLASSES, train, valid)


def embed(prompts: Sequence[str]) -> Floats:
    """Texts about the tench point east, the others north."""
    return np.stack([DIRECTIONS[0 if "tench" in prompt.lower() else 1] for prompt in prompts])


def test_the_published_prompts_take_the_whole_row_and_the_id() -> None:
    prompts = [protocol.prompts[0][0] for protocol in zero_shot_protocols(["published"], CLASSES)]
    assert prompts == [
        "A photo of tench, Tinca tinca.",
        "This is a photo containing images of tench, Tinca tinca.",
        "This is a photo from ImageNet's n00000001 category. "
        "This category contains photos of tench, Tinca tinca.",
    ]


def test_open_clip_protocol_has_80_templates_of_the_first_name() -> None:
    (protocol,) = zero_shot_protocols(["open_clip"], CLASSES)
    assert [len(prompts) for prompts in protocol.prompts] == [80, 80]
    assert protocol.prompts[1][0] == "a bad photo of a great white shark."
    assert protocol.prompt == "80 templates, first names"


def test_imagenet_classes_get_the_curated_names() -> None:
    synsets = ["n01440764", *(f"n{number:08d}" for number in range(2_000_000, 2_000_998)), "n15075141"]
    (protocol,) = zero_shot_protocols(["open_clip"], [ClassInfo(synset, "?") for synset in synsets])
    assert protocol.prompts[0][0] == "a bad photo of a tench."
    assert protocol.prompts[-1][-1] == "a tattoo of the toilet paper."
    assert protocol.prompt == "80 templates, curated names"


def test_big_vision_protocol_canonicalizes_and_adds_the_bare_name() -> None:
    (protocol,) = zero_shot_protocols(["big_vision"], CLASSES)
    assert len(protocol.prompts[0]) == 81
    assert protocol.prompts[1][-1] == "great white shark"
    assert "a closeup photo of a tench" in protocol.prompts[0]


def test_canonicalize_lowers_case_and_removes_punctuation() -> None:
    assert canonicalize("  A_Red,  Crock-Pot! ") == "a red crockpot"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_zero_shot_rows(name: str) -> None:
    images, labels = np.array([[9.0, 1.0], [1.0, 2.0], [2.0, 1.0]]), np.array([0, 1, 1])
    for protocol in zero_shot_protocols([name], CLASSES):
        row = zero_shot_row(protocol, embed, images, labels)
        assert row.top1[0].tolist() == [True, True, False]
        assert row.top5[0].tolist() == [True, True, True]
        assert [(pair.target, pair.predicted) for pair in row.confusions] == [(1, 0)]


def test_few_shot_rows() -> None:
    data = dataset([0, 0, 1, 1], [0, 1])
    gallery = np.array([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]])
    for make, name in (
        (few_shot_row, "2-shot"),
        (linear_probe_row, "2-shot, linear probe"),
        (raw_pixel_row, "2-shot, raw pixels"),
    ):
        row = make(data, gallery, DIRECTIONS, 2, range(3))
        assert row.name == name
        assert row.accuracy(1).value == 1
        assert len(row.top1) == 1, "every draw of two of two is the same"


def test_averages_over_seeds() -> None:
    data = dataset([0, 0, 1, 1], [0])
    gallery = np.array([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    row = few_shot_row(data, gallery, DIRECTIONS[:1], 1, range(8))
    assert row.spread() == (0.0, 1.0)
    assert len(row.top1) == 8


def test_linear_probe_refuses_one_class() -> None:
    with pytest.raises(DatasetError, match="at least two classes"):
        linear_probe_row(dataset([0, 0], [0]), DIRECTIONS, DIRECTIONS[:1], 2, range(1))


def test_accuracy_counts_the_chosen_images_only() -> None:
    row = Row("name", "", [np.array([True, True, False, False])], [np.array([True] * 4)])
    assert row.accuracy(1).value == 0.5
    assert row.accuracy(1, np.array([True, False, True, True])).correct == 1
    assert row.spread() is None

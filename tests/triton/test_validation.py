"""`validate.siglip_vision` and `validate.parity` on folders as ImageNet, ImageNet-V2 and CIFAR have them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from wire import TINY

from siglip_serve.launcher import TritonServer
from validate import parity, siglip_vision
from validate.dataset import MAPPING

SAMPLES = TINY / "samples"
ROWS = "n02084071 dog, domestic dog\nn07873807 pizza, pizza pie\nn03467517 guitar\n"


def fill(root: Path, files: Mapping[str, str]) -> Path:
    """Copy the bundled pictures of these names into folders of the class."""
    for folder, sample in files.items():
        (root / folder).mkdir(parents=True)
        shutil.copy(SAMPLES / sample, root / folder)
    return root


def imagenet(root: Path) -> Path:
    classes = {"n02084071": "dog.jpg", "n07873807": "pizza.jpg", "n03467517": "guitar.jpg"}
    for part in ("train", "valid"):
        fill(root / part, classes)
    (root / MAPPING).write_text(ROWS)
    return root


def imagenet_v2(root: Path) -> Path:
    return fill(root, {"963": "pizza.jpg", "402": "guitar.jpg"})


def cifar(root: Path) -> Path:
    for part in ("train", "test"):
        fill(root / part, {"dog": "dog.jpg", "acoustic_guitar": "guitar.jpg"})
    return root


@pytest.mark.parametrize(
    ("make", "protocols", "rows", "classes", "few_shot"),
    [
        (imagenet, ["published", "argmax", "open_clip", "big_vision"], 6, 3, True),
        (imagenet_v2, ["argmax"], 1, 1000, False),
        (cifar, ["argmax", "open_clip"], 2, 2, True),
    ],
)
def test_scripts_read_every_layout(
    make: Any,
    protocols: list[str],
    rows: int,
    classes: int,
    few_shot: bool,
    exact_server: TritonServer,
    tmp_path: Path,
) -> None:
    """ImageNet's mapping, numbers among all of its 1,000 classes, and names of classes."""
    given = ["--url", exact_server.grpc_url, "--data", str(make(tmp_path / "data"))]
    given += ["--output", str(tmp_path), "--cache", str(tmp_path / "cache")]
    options = ["--protocols", *protocols, "--shots", "1", "--baselines", "--linear-probe"]
    assert siglip_vision.main([*given, *options]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["classes"], found["server"]["checkpoint"]) == (classes, "siglip-tiny")
    top1 = {f"{row['name']} {row['prompt']}".strip(): row["top1"]["value"] for row in found["rows"]}
    shots = {name: value for name, value in top1.items() if "shot" in name and "zero" not in name}
    assert len(shots) == 3 * few_shot
    assert set(shots.values()) <= {1.0}  # the same pictures as in training
    zero_shot = [value for name, value in top1.items() if name not in shots]
    assert len(zero_shot) == rows
    assert max(zero_shot) >= 0.5
    assert (tmp_path / "report.md").read_text().count("zero-shot") >= rows
    assert (tmp_path / "report.png").is_file()

    checkpoint = ["--checkpoint", str(TINY), "--shots", "1", "--device", "cpu"]
    assert parity.main([*given, *checkpoint]) == 0
    compared = json.loads((tmp_path / "parity.json").read_text())
    assert [row["name"] for row in compared["classifiers"]] == ["zero-shot", "few-shot"][: 1 + few_shot]
    assert compared["cosines"]["images"]["minimum"] > 0.9999
    assert compared["cosines"]["texts"]["minimum"] > 0.9999

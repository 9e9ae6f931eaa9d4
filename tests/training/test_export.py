"""Checkpoint folders that training writes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from paths import JERSEY, TINY
from safetensors.torch import save_file

from training.export import export, export_vision
from training.model import Shape


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run whose weights do not matter."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"logit_scale": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bundled", [TINY, JERSEY], ids=lambda folder: folder.name)
def test_writes_the_configuration_and_note_of_the_bundled_checkpoint(
    bundled: Path, run: Path, tmp_path: Path
) -> None:
    shape = Shape() if bundled == TINY else Shape(image_size=64)
    (run / "settings.json").write_text(json.dumps({"shape": asdict(shape)}))
    out = tmp_path / "out"
    if bundled == TINY:
        export(run, TINY / "spiece.model", out)
    else:
        export_vision(run, out)
    assert (out / "config.json").read_text() == (bundled / "config.json").read_text()

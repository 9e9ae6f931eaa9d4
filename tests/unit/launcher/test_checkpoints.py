"""Checkpoints as the configurations of their models show them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from paths import JERSEY, TINY

from siglip_serve.config import Settings
from siglip_serve.engine import plan
from siglip_serve.errors import SettingsError
from siglip_serve.launcher.checkpoints import describe_checkpoints

SETTINGS = Settings("a", dtype="float32")


def test_describes_a_local_checkpoint_and_its_note() -> None:
    described = describe_checkpoints(SETTINGS, {"a": TINY}, "cpu")
    assert described["teams"] is described["main"]
    parameters = dict(described["main"].parameters)
    note = parameters.pop("checkpoint_note")
    assert parameters == {
        "checkpoint_name": "siglip-tiny",
        "checkpoint_revision": "local",
        "dtype": "float32",
        "preprocess": "fast",
    }
    assert note.startswith("knows drawings only; for photographs name Google's checkpoint: make serve CHECK")
    assert described["main"].notes == (f"siglip-tiny {note}",)
    assert described["main"].dims["EMBEDDING"] == [128]


def test_teams_have_the_checkpoint_of_their_own() -> None:
    settings = replace(SETTINGS, teams_checkpoint="b")
    described = describe_checkpoints(settings, {"a": TINY, "b": JERSEY}, "cpu")
    assert described["main"].parameters["checkpoint_name"] == "siglip-tiny"
    assert described["teams"].parameters["checkpoint_name"] == "siglip-tiny-jersey"
    (note,) = described["teams"].notes
    assert note.startswith("siglip-tiny-jersey knows drawn jerseys only; for photographs of players name")


def test_names_a_checkpoint_of_the_hub_as_the_operator_did(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(TINY, snapshot, ignore=shutil.ignore_patterns("*.safetensors", "samples"))
    settings = replace(SETTINGS, checkpoint="owner/name@main")
    checkpoint = describe_checkpoints(settings, {"owner/name@main": snapshot}, "cpu")["main"]
    assert checkpoint.parameters["checkpoint_name"] == "owner/name"
    assert checkpoint.parameters["checkpoint_revision"] == "0123abc"
    assert checkpoint.notes[0].startswith("owner/name knows drawings only")


def test_a_checkpoint_without_a_note_has_no_parameter_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip", "text_config": {}, "vision_config": {}}')
    checkpoint = describe_checkpoints(SETTINGS, {"a": tmp_path}, "cpu")["main"]
    assert "checkpoint_note" not in checkpoint.parameters
    assert checkpoint.notes == ()


def test_says_that_a_narrow_tower_does_not_run_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpu_capabilities", lambda: ((9, 0),))
    settings = replace(SETTINGS, dtype="float8")
    checkpoint = describe_checkpoints(settings, {"a": TINY}, "cuda:0")["main"]
    assert checkpoint.parameters["dtype"] == "bfloat16"
    assert checkpoint.notes[1:] == ("siglip-tiny runs in bfloat16: it is too narrow to gain from float8",)


def test_shows_the_dtype_that_auto_becomes() -> None:
    """Clients never read `auto`; that it was resolved is no news for the operator."""
    checkpoint = describe_checkpoints(replace(SETTINGS, dtype="auto"), {"a": TINY}, "cpu")["main"]
    assert checkpoint.parameters["dtype"] == plan.fastest_dtype(None)
    assert len(checkpoint.notes) == 1


def test_refuses_a_dtype_that_the_device_cannot_run() -> None:
    with pytest.raises(SettingsError, match=r"^dtype float16: not for CPUs; float32, bfloat16 and int8 are$"):
        describe_checkpoints(replace(SETTINGS, dtype="float16"), {"a": TINY}, "cpu")

"""Checkpoints as the configurations of their models show them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from images import encode, photo
from paths import JERSEY, TINY

from siglip_serve.config import Backend, Dtype, Settings
from siglip_serve.engine import calibration, plan
from siglip_serve.errors import CheckpointError, SettingsError
from siglip_serve.launcher.checkpoints import check_options, describe_checkpoints

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
        "color": "stored",
    }
    assert note.startswith(
        "knows drawings only; for photographs serve one of Google's checkpoints: make serve CHECK"
    )
    assert described["main"].notes == (f"siglip-tiny {note}",)
    assert described["main"].dims["EMBEDDING"] == [128]


def test_teams_have_the_checkpoint_of_their_own() -> None:
    settings = replace(SETTINGS, teams_checkpoint="b")
    described = describe_checkpoints(settings, {"a": TINY, "b": JERSEY}, "cpu")
    assert described["main"].parameters["checkpoint_name"] == "siglip-tiny"
    assert described["teams"].parameters["checkpoint_name"] == "siglip-tiny-jersey"
    (note,) = described["teams"].notes
    assert note.startswith("siglip-tiny-jersey knows drawn jerseys only; for photographs of players serve")


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


# The message that refuses each combination on a CPU, or None where it runs.
_FLOAT16, _FLOAT8 = "dtype float16: not for CPUs", "dtype float8: not for CPUs"
_FUSED, _INT8 = "backend fused: not for CPUs", "dtype int8: needs the backend openvino"
ON_A_CPU: Mapping[Dtype, Mapping[Backend, str | None]] = {
    "auto": {"auto": None, "torch": None, "openvino": None, "fused": _FUSED},
    "float32": {"auto": None, "torch": None, "openvino": None, "fused": _FUSED},
    "bfloat16": {"auto": None, "torch": None, "openvino": None, "fused": _FUSED},
    "float16": {"auto": _FLOAT16, "torch": _FLOAT16, "openvino": _FLOAT16, "fused": _FLOAT16},
    "float8": {"auto": _FLOAT8, "torch": _FLOAT8, "openvino": _FLOAT8, "fused": _FLOAT8},
    "int8": {"auto": None, "torch": _INT8, "openvino": None, "fused": _FUSED},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten images."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(10):
        (folder / f"{index}.jpg").write_bytes(encode(photo(16, 12), "JPEG"))
    return folder


@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_a_cpu_runs_or_refuses_each_dtype_with_each_backend(
    dtype: Dtype, backend: Backend, pictures: Path
) -> None:
    settings = Settings(str(TINY), dtype=dtype, backend=backend, calibration=str(pictures))
    message = ON_A_CPU[dtype][backend]
    if message is None:
        check_options(settings, "cpu")
    else:
        with pytest.raises(SettingsError, match=f"^{message}"):
            check_options(settings, "cpu")


@pytest.mark.parametrize("checkpoint", [str(TINY), "owner/name"], ids=["local", "hub"])
def test_refuses_int8_without_images_before_a_download(
    checkpoint: str, pictures: Path, tmp_path: Path
) -> None:
    settings = Settings(checkpoint, dtype="int8")
    with pytest.raises(SettingsError, match=r"^setting 'calibration' is not given"):
        check_options(settings, "cpu")
    with pytest.raises(SettingsError, match=r"^setting 'calibration': .*nowhere is not a folder$"):
        check_options(replace(settings, calibration=str(tmp_path / "nowhere")), "cpu")
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(SettingsError, match=r"^setting 'calibration': 9 readable images in .* at least 10$"):
        check_options(replace(settings, calibration=str(tmp_path)), "cpu")


def test_refuses_int8_without_nncf_unless_a_model_is_kept(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "find_spec", lambda _: None)
    settings = Settings(str(TINY), dtype="int8", calibration=str(pictures), cache=str(tmp_path))
    with pytest.raises(SettingsError, match=r"^dtype int8: needs the extra int8"):
        check_options(settings, "cpu")
    (tmp_path / "int8-0123.zip").touch()
    check_options(settings, "cpu")


def test_says_first_that_clip_does_not_run_in_float8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config": {}, "vision_config": {}}')
    with pytest.raises(SettingsError, match=r"^dtype float8: for SigLIP's towers only"):
        check_options(Settings(str(tmp_path), dtype="float8"), "cpu")


TEXT_ALONE = {
    "model_type": "siglip_text_model",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


def test_describes_a_text_tower_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT_ALONE))
    checkpoint = describe_checkpoints(SETTINGS, {"a": tmp_path}, "cpu")["main"]
    assert checkpoint.dims == {"EMBEDDING": [32], "INPUT_IDS": [64]}
    assert checkpoint.parameters["dtype"] == "float32"


def test_refuses_a_directory_without_weights_or_with_another_tokenizer(tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(TEXT_ALONE))
    with pytest.raises(
        CheckpointError, match=r"no weight file, expected one of model\.safetensors, pytorch_model"
    ):
        check_options(settings, "cpu")
    (tmp_path / "model.safetensors").touch()
    check_options(settings, "cpu")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(
        CheckpointError, match="tokenizer_class is 'BertTokenizer', expected one of GemmaTokenizer"
    ):
        check_options(settings, "cpu")

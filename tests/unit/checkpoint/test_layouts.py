"""Weight files that cannot be read, names that collide, and tensors that belong to no tower."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from random_checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file, save_file

from siglip_serve.checkpoint.files import is_open_clip, main_file, resolve, weight_files
from siglip_serve.checkpoint.names import plain_names
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.load import load_text, load_vision


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(random_model({"image_size": 32, "patch_size": 16}), tmp_path)


class Code:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def as_bin(checkpoint: Path, content: object) -> Path:
    (checkpoint / "model.safetensors").unlink()
    file = checkpoint / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"logit_scale": Code()},
            r"holds a \w+\.system; only tensors are loaded, since anything else could run",
        ),
        ({"logit_scale": 1.0}, "logit_scale is a float, expected a tensor"),
        ({1: torch.zeros(1)}, "1 is a Tensor, expected a tensor by name"),
        ([torch.zeros(1)], "expected a dictionary of tensors, got list"),
        ({}, "expected a dictionary of tensors, got dict"),
        (b"no weights", r"not a readable file of torch\.save$"),
        (b"", r"not a readable file of torch\.save$"),
    ],
    ids=["code", "number", "name", "list", "empty", "other", "nothing"],
)
def test_refuses_other_content_without_running_it(checkpoint: Path, content: object, message: str) -> None:
    file = as_bin(checkpoint, content)
    for load in (load_vision, load_text, load_scale):
        with pytest.raises(CheckpointError, match=f"^{file}: {message}"):
            load(checkpoint)


def test_refuses_a_file_that_was_cut(checkpoint: Path) -> None:
    file = as_bin(checkpoint, load_file(checkpoint / "model.safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"not a readable file of torch\.save \("):
        load_vision(checkpoint)


def test_refuses_tensors_of_no_tower(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "classifier.weight": torch.zeros(2, 64)}, file)
    for load in (load_vision, load_text):
        with pytest.raises(
            CheckpointError, match=rf"^{file}: .* its config\.json:\n  unexpected: classifier\.weight$"
        ):
            load(checkpoint)


def test_refuses_two_tensors_of_one_name(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "_orig_mod.logit_scale": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"logit_scale of model\.safetensors are both logit_scale$"):
        load_vision(checkpoint)


def test_plain_names() -> None:
    assert plain_names(["module.a", "module._orig_mod.b.module.c"]) == {
        "module.a": "a",
        "module._orig_mod.b.module.c": "b.c",
    }
    assert plain_names(["model.model.a", "model.model.b"]) == {"model.model.a": "a", "model.model.b": "b"}
    assert plain_names(["model.a", "b"]) == {"model.a": "model.a", "b": "b"}
    assert plain_names([]) == {}


def test_the_preferred_file_and_configuration(tmp_path: Path) -> None:
    assert main_file(tmp_path).name == "config.json"
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert is_open_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_siglip_224"}')
    assert is_open_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert main_file(tmp_path).name == "config.json"
    for name in ("open_clip_model.safetensors", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "config.json").unlink()
    assert [file.name for file in weight_files(tmp_path)] == ["open_clip_model.safetensors"]
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no weight file, expected one of open_clip_model\.safetensors, op"
    ):
        weight_files(tmp_path)


@pytest.mark.parametrize("shards", [None, {}, [], {"a": 1}])
def test_refuses_an_index_without_files(tmp_path: Path, shards: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match=r"index\.json: expected a weight_map from tensors to files"):
        weight_files(tmp_path)


def test_downloads_the_next_kind_of_weights_if_the_first_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"config.json": '{"model_type": "siglip"}', "pytorch_model.bin": ""}
    asked: list[str] = []

    def download(_: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision is None
        asked.append(allow_patterns[-1])
        for name, content in there.items():
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (tmp_path / name).write_text(content)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name") == tmp_path
    assert asked == ["*.txt", "model-*.safetensors", "pytorch_model-*.bin"]
    there = {
        "open_clip_config.json": "{}",
        "open_clip_model.safetensors": "",
        "open_clip_pytorch_model.bin": "",
    }
    for file in tmp_path.iterdir():
        file.unlink()
    asked.clear()
    assert resolve("owner/name") == tmp_path
    assert asked == ["*.txt", "open_clip_model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]

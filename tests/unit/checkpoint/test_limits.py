"""Values in a checkpoint's files up to their exact limits, and the digits that tell checkpoints apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from paths import TINY

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import fingerprint, resolve, weight_files
from siglip_serve.errors import CheckpointError


def write(folder: Path, config: dict[str, Any], processor: dict[str, Any]) -> Path:
    """A checkpoint's JSON files."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def siglip(folder: Path, **processor: Any) -> Path:
    return write(folder, {"model_type": "siglip", "text_config": {}, "vision_config": {}}, processor)


def clip(folder: Path, shortest_edge: int) -> Path:
    vision = {"image_size": 32, "patch_size": 16}
    config = {"model_type": "clip", "text_config": {}, "vision_config": vision}
    return write(folder, config, {"size": {"shortest_edge": shortest_edge}, "crop_size": 32})


def test_keeps_mean_and_deviation_apart(tmp_path: Path) -> None:
    image = load_config(siglip(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])).image
    assert image.mean == (0.1, 0.2, 0.3)
    assert image.std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_refuses_a_processor_that_leaves_out_a_step(tmp_path: Path, step: str) -> None:
    with pytest.raises(CheckpointError, match=f"the image processor sets {step} to false, which is not"):
        load_config(siglip(tmp_path, **{step: False}))
    assert load_config(siglip(tmp_path, **{step: True})).image.size == 224


@pytest.mark.parametrize(("edge", "fits"), [(31, False), (32, True), (33, True)])
def test_refuses_a_shortest_edge_below_the_square(tmp_path: Path, edge: int, fits: bool) -> None:
    path = clip(tmp_path, edge)
    if fits:
        assert load_config(path).image.shortest_edge == edge
        return
    with pytest.raises(CheckpointError, match="expected a shortest_edge of at least 32"):
        load_config(path)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vision_config", {"patch_size": 0}, "patch_size is 0, expected 1 to image_size, 224"),
        ("vision_config", {"patch_size": 225}, "patch_size is 225, expected 1 to image_size, 224"),
        ("vision_config", {"num_hidden_layers": -1}, r"vision_config\.num_hidden_layers is -1, expected"),
        ("vision_config", {"num_hidden_layers": True}, r"vision_config\.num_hidden_layers is True, expected"),
        ("vision_config", {"num_attention_heads": 5}, "hidden_size 768 does not divide into 5 heads"),
        ("vision_config", {"num_attention_heads": 0}, "hidden_size 768 does not divide into 0 heads"),
        ("vision_config", {"num_channels": 1}, "num_channels is 1, expected 3"),
        ("text_config", {"projection_size": 512}, "projection_size is 512, the image embeddings have 768"),
        ("text_config", {"hidden_act": "relu"}, r"text_config\.hidden_act is 'relu', expected"),
    ],
)
def test_names_the_value_of_a_tower_that_cannot_be(
    tmp_path: Path, part: str, values: dict[str, Any], message: str
) -> None:
    config = {"model_type": "siglip", "text_config": {}, "vision_config": {}, part: values}
    with pytest.raises(CheckpointError, match=message):
        load_config(write(tmp_path, config, {}))


def shards(folder: Path, *contents: bytes) -> Path:
    """A checkpoint of several weight files."""
    names = [f"model-{number}.safetensors" for number in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
    index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_fingerprints_tell_a_change_at_any_place(tmp_path: Path) -> None:
    content = bytes(900_000)  # of larger files, samples are read
    found = {fingerprint(shards(tmp_path, content, content))}
    for place in (0, 450_000, 899_999):
        changed = content[:place] + b"\1" + content[place + 1 :]
        found.add(fingerprint(shards(tmp_path, changed, content)))
        found.add(fingerprint(shards(tmp_path, content, changed)))
    assert len(found) == 7
    assert all(len(digits) == 16 for digits in found)


def test_names_the_missing_shards(tmp_path: Path) -> None:
    shards(tmp_path, b"a", b"b", b"c")
    (tmp_path / "model-1.safetensors").unlink()
    for read in (fingerprint, weight_files):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors\.index\.json: no model-1\.safetensors$"
        ):
            read(tmp_path)


def test_downloads_the_revision_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name@v1.2") == tmp_path
    assert resolve("owner/name") == tmp_path
    assert asked == [("owner/name", "v1.2")] * 2 + [("owner/name", None)] * 2  # small files, then weights
    for wrong in ("name", "a/b/c", "./owner/name", "/owner/name", "~/owner/name"):
        with pytest.raises(
            CheckpointError, match="no such directory, and not a hub id of the form owner/name"
        ):
            resolve(wrong)
    assert len(asked) == 4
    assert resolve(str(TINY)) == TINY

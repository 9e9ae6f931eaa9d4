"""JSON files of NaFlex checkpoints: what they say, what their lack means, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clip_checkpoints import edit_json
from random_checkpoints import random_naflex, save_naflex

from siglip_serve.checkpoint.config import limit_patches, load_config, tensor_dims
from siglip_serve.checkpoint.model_config import NaflexImageConfig, NaflexVisionConfig
from siglip_serve.errors import CheckpointError, SettingsError
from siglip_serve.towers.siglip import load_vision as load_siglip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_naflex(random_naflex(), tmp_path_factory.mktemp("naflex"), most=100)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    for file in saved.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_reads_towers_and_patches(saved: Path) -> None:
    config = load_config(saved)
    assert (config.family, config.vision.grid_size) == ("naflex", 16)
    assert isinstance(config.vision, NaflexVisionConfig)
    assert isinstance(config.image, NaflexImageConfig)
    assert (config.image.patch_size, config.image.max_patches, config.image.resample) == (16, 100, "bilinear")
    dims = tensor_dims(config)
    assert (dims["PIXEL_VALUES"], dims["PATCH_GRID"]) == ([100, 768], [2])
    assert (dims["PATCH_EMBEDDINGS"], dims["PATCH_MAPS"]) == ([100, 64], [-1, 100])


def test_has_the_defaults_of_the_reference(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").unlink()
    edit_json(checkpoint / "config.json", vision_config={"hidden_size": 64, "num_attention_heads": 4})
    config = load_config(checkpoint)
    assert isinstance(config.image, NaflexImageConfig)
    assert (config.image.patch_size, config.image.max_patches, config.image.resample) == (16, 256, "bilinear")
    assert (config.image.mean, config.vision.num_hidden_layers) == ((0.5, 0.5, 0.5), 12)


def test_the_setting_wins_over_the_file(saved: Path) -> None:
    config = load_config(saved)
    assert limit_patches(config, 0) is config
    assert tensor_dims(limit_patches(config, 576))["PIXEL_VALUES"] == [576, 768]
    with pytest.raises(SettingsError, match="'max_num_patches': got 4097, expected at most 4096"):
        limit_patches(config, 4097)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"vision_config__num_patches": 250}, "num_patches is 250, expected a square number"),
        (
            "config.json",
            {"vision_config__patch_size": [16, 16]},
            r"patch_size is \[16, 16\], expected a whole",
        ),
        ("config.json", {"vision_config__vision_use_head": False}, "vision_use_head is false"),
        ("config.json", {"vision_config__hidden_act": "relu"}, "hidden_act is 'relu'"),
        (
            "preprocessor_config.json",
            {"patch_size": 14},
            "patch_size is 14, the vision tower takes patches of 16",
        ),
        (
            "preprocessor_config.json",
            {"max_num_patches": 0},
            "max_num_patches is 0, expected a whole number of 1",
        ),
        ("preprocessor_config.json", {"do_resize": False}, "sets do_resize to false"),
    ],
)
def test_refuses_an_unusable_file_and_names_the_value(
    file: str, change: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit_json(checkpoint / file, **change)
    with pytest.raises(CheckpointError, match=rf"/{file}: .*{message}"):
        load_config(checkpoint)


def test_refuses_to_load_the_tower_as_another(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"patch_embedding\.weight is \[64, 768\], expected \[64, 3, 16, 16\]"
    ):
        load_siglip(saved)

"""Configurations of CLIP checkpoints: dimensions, how pictures are fitted, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clip_checkpoints import SIDE, edit_json, make_clip

from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_clip(tmp_path)


def test_widths_of_tower_and_joint_space(checkpoint: Path) -> None:
    dims = tensor_dims(load_config(checkpoint))
    assert dims["EMBEDDING"] == [48]
    assert dims["PROMPT_VECTORS"] == [-1, 48]
    assert dims["MEAN_EMBEDDING"] == [64]
    assert dims["PATCH_EMBEDDINGS"] == [9, 64]
    assert dims["PIXEL_VALUES"] == [SIDE, SIDE, 3]


@pytest.mark.parametrize(
    ("changes", "shortest_edge"),
    [
        ({"size": SIDE, "crop_size": SIDE}, SIDE),
        ({"size": SIDE + 6, "crop_size": {"height": SIDE, "width": SIDE}}, SIDE + 6),
        ({"size": {"shortest_edge": SIDE, "longest_edge": None}, "crop_size": None}, SIDE),
        ({"size": None, "crop_size": None, "feature_extractor_type": "CLIPFeatureExtractor"}, SIDE),
        ({"size": {"height": SIDE, "width": SIDE}}, None),
        ({"size": [SIDE, SIDE], "do_center_crop": False, "crop_size": 9}, None),
    ],
)
def test_how_pictures_are_fitted(
    changes: dict[str, Any], shortest_edge: int | None, checkpoint: Path
) -> None:
    edit_json(checkpoint / "preprocessor_config.json", **changes)
    image = load_config(checkpoint).image
    assert (image.size, image.shortest_edge) == (SIDE, shortest_edge)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "chinese_clip"}, "model_type is 'chinese_clip', expected one of"),
        ("config.json", {"text_config__hidden_act": "relu"}, "text_config.hidden_act is 'relu', expected"),
        ("config.json", {"vision_config__hidden_act": None}, "vision_config.hidden_act is None"),
        ("config.json", {"vision_config__num_attention_heads": 7}, "does not divide into 7 heads"),
        ("config.json", {"vision_config__num_channels": 1}, "num_channels is 1"),
        ("config.json", {"vision_config__image_size": [50, 50]}, "image_size is .50, 50., expected a whole"),
        ("config.json", {"vision_config__patch_size": 0}, "patch_size is 0, expected 1 to image_size"),
        ("config.json", {"vision_config__hidden_size": -8}, "hidden_size is -8, expected a whole number"),
        (
            "config.json",
            {"text_config__layer_norm_eps": "small"},
            "layer_norm_eps is 'small', expected a num",
        ),
        ("config.json", {"text_config__eos_token_id": [1, 2]}, "eos_token_id is .1, 2., expected a whole"),
        ("config.json", {"projection_dim": None}, "projection_dim is None"),
        ("config.json", {"text_config": 5}, "text_config is 5, expected an object"),
        ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}, "expected 'CLIPImage"),
        ("preprocessor_config.json", {"size": SIDE - 1}, "expected a shortest_edge of at least 50"),
        ("preprocessor_config.json", {"size": {"height": 60, "width": 60}}, "or a square of 50"),
        ("preprocessor_config.json", {"size": {"longest_edge": 60}}, "or a square of 50"),
        ("preprocessor_config.json", {"size": "large"}, "size is large"),
        ("preprocessor_config.json", {"crop_size": 40}, "crop_size is 40, the vision tower takes a square"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop is false"),
        ("preprocessor_config.json", {"do_resize": False}, "sets do_resize to false"),
        ("preprocessor_config.json", {"resample": [3]}, "resample is .3., expected one of"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "image_mean is 0.5, expected three numbers"),
        ("preprocessor_config.json", {"image_std": [1, 1, None]}, "image_std is .1, 1, None."),
    ],
)
def test_refuses_unusable_configurations_by_name(
    file: str, change: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit_json(checkpoint / file, **change)
    with pytest.raises(CheckpointError, match=f"{file}: .*{message}"):
        load_config(checkpoint)

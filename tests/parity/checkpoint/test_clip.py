"""CLIP's configurations against transformers, old layouts included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPConfig, CLIPImageProcessorPil

from siglip_serve.checkpoint.config import load_config

OLD_FILES: dict[str, dict[str, Any]] = {
    "nothing but the type": {},
    "of one layout": {
        "text_config": {"eos_token_id": 2, "hidden_size": 64},
        "vision_config": {"patch_size": 14},
    },
    "of both, which differ": {
        "projection_dim": 96,
        "text_config": {"eos_token_id": 2, "hidden_size": 64, "vocab_size": 99},
        "text_config_dict": {"hidden_size": 128, "projection_dim": 32},
        "vision_config": {"patch_size": 14, "hidden_act": "gelu"},
        "vision_config_dict": {"patch_size": 16, "hidden_size": 96},
    },
    "of both, one empty": {
        "text_config": {"eos_token_id": 2, "hidden_size": 64},
        "text_config_dict": {},
        "vision_config": None,
        "vision_config_dict": None,
    },
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_configurations_are_read_as_the_reference_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **OLD_FILES[name]}))
    ours, reference = load_config(tmp_path), CLIPConfig.from_pretrained(tmp_path)
    assert ours.family == "clip"
    for part, theirs in ((ours.vision, reference.vision_config), (ours.text, reference.text_config)):
        for field in part.__dataclass_fields__:
            ours_alone = {
                "projection_size": reference.projection_dim,
                "projected": True,
                "pools_largest_id": reference.text_config.eos_token_id == 2,
            }
            wanted = ours_alone[field] if field in ours_alone else getattr(theirs, field)
            assert getattr(part, field) == wanted, field
    processor = CLIPImageProcessorPil()
    assert ours.image.mean == tuple(processor.image_mean)
    assert ours.image.std == tuple(processor.image_std)
    assert ours.image.resample == "bicubic"
    assert ours.image.rescale == pytest.approx(processor.rescale_factor)
    assert ours.image.shortest_edge == ours.image.size == processor.size["shortest_edge"]

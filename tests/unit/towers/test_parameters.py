"""Parameters that are read without torch, compared with the towers in torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_checkpoints import make_clip
from random_checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file, save_file
from wire import TINY

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.checkpoint.tensors import Tensors
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.load import load_text, load_vision
from siglip_serve.towers.parameters import text_shapes, vision_shapes
from siglip_serve.towers.stored import StoredText, StoredVision

QKV = "encoder.layers.0.self_attn.qkv_proj.weight"


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return load_config(save_checkpoint(random_model({"image_size": 32, "patch_size": 16}), tmp_path))


def store(config: ModelConfig, dtype: torch.dtype) -> None:
    """Store the tensors of a checkpoint in another dtype."""
    file = config.path / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)


def resident(file: Path) -> int:
    """Kilobytes of this file that are mapped into this process and in memory."""
    sizes, ours = [], False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            sizes.append(int(line.split()[1]))
    return sum(sizes)


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_shapes_are_those_of_the_towers(family: str, tmp_path: Path) -> None:
    config = load_config(TINY if family == "siglip" else make_clip(tmp_path))
    for tower, shapes in (
        (load_vision(config.path), vision_shapes(config.vision)),
        (load_text(config.path), text_shapes(config.text)),
    ):
        expected = [(name, list(values.shape)) for name, values in tower.state_dict().items()]
        assert list(shapes.items()) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_of_any_float_are_exact(config: ModelConfig, dtype: torch.dtype) -> None:
    store(config, dtype)
    stored = load_file(config.path / "model.safetensors")
    prefix = "vision_model."
    found = StoredVision.open(config).parameters
    for name in ("head.probe", "embeddings.patch_embedding.weight"):
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], stored[prefix + name].float().numpy())
    parts = [stored[prefix + QKV.replace("qkv", part)].float().numpy() for part in "qkv"]
    np.testing.assert_array_equal(found[QKV], np.concatenate(parts))
    for third, part in zip(found.thirds(QKV), parts, strict=True):
        np.testing.assert_array_equal(third, part)


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_towers_in_torch_have_the_same_values(family: str, config: ModelConfig, tmp_path: Path) -> None:
    config = config if family == "siglip" else load_config(make_clip(tmp_path / "clip"))
    vision = StoredVision.open(config)
    for parameters, tower in (
        (vision.parameters, load_vision(config.path)),
        (vision.parameters, vision.tower),
        (StoredText.open(config).parameters, load_text(config.path)),
    ):
        state = tower.state_dict()
        assert list(parameters) == list(state)
        for name, values in parameters.items():
            np.testing.assert_array_equal(values, state[name].numpy())


def test_reads_tensors_that_are_not_aligned(config: ModelConfig) -> None:
    """The format does not ask for it: an odd header moves all tensors by a byte."""
    file = config.path / "model.safetensors"
    expected = {name: values.copy() for name, values in StoredVision.open(config).parameters.items()}
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" "
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    for name, values in StoredVision.open(config).parameters.items():
        np.testing.assert_array_equal(values, expected[name])
        assert values.flags.aligned


def test_refuses_weights_that_are_no_floats(config: ModelConfig) -> None:
    store(config, torch.int8)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: .* is I8, expected one of F64, F32, F16, BF16$"
    ):
        StoredVision.open(config)


def test_values_leave_memory_and_are_read_again(config: ModelConfig) -> None:
    file = config.path / "model.safetensors"
    parameters = StoredVision.open(config).parameters
    before = {name: values.copy() for name, values in parameters.items()}
    assert resident(file) > 0
    parameters.leave_memory()
    assert resident(file) == 0
    for name, values in parameters.items():
        np.testing.assert_array_equal(values, before[name])
    assert resident(file) > 0


def test_what_is_written_to_values_stays_in_the_process(config: ModelConfig) -> None:
    tower = StoredVision.open(config).tower
    tower.post_layernorm.bias.data += 1
    fresh = Tensors(config.path)["vision_model.post_layernorm.bias"].read()
    np.testing.assert_array_equal(fresh + 1, tower.post_layernorm.bias.numpy())


def test_embeds_on_a_cpu_without_torch_until_a_heatmap_is_asked_for() -> None:
    code = """
import json, sys
from pathlib import Path
import numpy as np
from siglip_serve.checkpoint.config import load_config
from siglip_serve.engine.engines import open_text, open_vision
from siglip_serve.engine.plan import Plan

config, plan = load_config(Path(sys.argv[1])), Plan("cpu", "float32", "openvino", threads=1)
vision, text = open_vision(config, plan), open_text(config, plan)
size = config.image.size
pixels = np.zeros((1, size, size, 3), np.uint8)
embedding = vision(pixels).rows(0, 1)["EMBEDDING"][0]
text(np.zeros((1, config.text.max_position_embeddings), np.int64)).rows(0, 1)
before = "torch" in sys.modules
found = vision.explain(pixels, np.ones((1, len(embedding)), np.float32))
print(json.dumps([before, float(np.abs(found.embedding - embedding).max()), float(np.abs(embedding).max())]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(TINY)], check=True, capture_output=True, text=True)
    imported, difference, largest = json.loads(done.stdout)
    assert not imported
    assert difference <= 1e-4 * largest

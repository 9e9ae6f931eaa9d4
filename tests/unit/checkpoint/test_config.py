"""Checkpoint directories: their configuration, its defaults and refusals, and strict loading of weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import JERSEY, TINY
from random_checkpoints import random_model, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipVisionConfig

from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.checkpoint.files import fingerprint, resolve
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.siglip import load_text, load_vision


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(random_model({"image_size": 32, "patch_size": 16}), tmp_path)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (content[part] if part else content)[name] = value
    file.write_text(json.dumps(content))


def test_missing_values_are_the_defaults_of_the_reference(tmp_path: Path) -> None:
    """The published base checkpoint has only the model types."""
    (tmp_path / "config.json").write_text('{"model_type": "siglip", "text_config": {}, "vision_config": {}}')
    ours, reference = load_config(tmp_path), SiglipConfig()
    for part, theirs in ((ours.vision, reference.vision_config), (ours.text, reference.text_config)):
        for name in part.__dataclass_fields__:
            assert getattr(part, name) == getattr(theirs, name), name
    processor = SiglipImageProcessorPil()
    assert ours.image.size == processor.size["height"]
    assert ours.image.mean == tuple(processor.image_mean)
    assert ours.image.std == tuple(processor.image_std)
    assert ours.image.resample == "bicubic"
    assert ours.image.rescale == pytest.approx(processor.rescale_factor)


def test_reads_both_layouts_of_the_image_processor(checkpoint: Path) -> None:
    file = checkpoint / "preprocessor_config.json"
    processor = json.loads(file.read_text()) | {"resample": 2, "image_mean": [0.1, 0.2, 0.3]}
    file.write_text(json.dumps(processor))
    flat = load_config(checkpoint).image
    file.unlink()
    (checkpoint / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    assert load_config(checkpoint).image == flat
    assert (flat.resample, flat.mean) == ("bilinear", (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "siglip3"}, "model_type is 'siglip3', expected one of 'siglip'"),
        ("config.json", {"vision_config__hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("config.json", {"vision_config__num_attention_heads": 7}, "does not divide into 7 heads"),
        ("config.json", {"vision_config__vision_use_head": False}, "vision_use_head is false"),
        ("config.json", {"vision_config__num_channels": 1}, "num_channels is 1"),
        ("preprocessor_config.json", {"do_normalize": False}, "sets do_normalize to false"),
        ("preprocessor_config.json", {"resample": 0}, "resample is 0"),
        ("preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "takes a square of 32"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 64}}, "takes a square of 32"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 32}}, "takes a square of 32"),
        ("preprocessor_config.json", {"size": 64}, "takes a square of 32"),
        ("config.json", {"vision_config__num_attention_heads": 0}, "does not divide into 0 heads"),
        ("config.json", {"text_config__projection_size": 32}, "projection_size is 32"),
        ("config.json", {"siglip_serve_note": 5}, "siglip_serve_note is 5, expected a text"),
        ("config.json", {"siglip_serve_note": None}, "siglip_serve_note is None, expected a text"),
        ("config.json", {"siglip_serve_note": ["a"]}, "siglip_serve_note is .'a'., expected a text"),
    ],
)
def test_refuses_an_unusable_configuration_and_names_the_value(
    file: str, change: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit(checkpoint / file, **change)
    with pytest.raises(CheckpointError, match=rf"/{file}: .*{message}"):
        load_config(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not valid JSON \(Expecting property name"),
        ("[]", "expected a JSON object, got list"),
        ("", r"not valid JSON \(Expecting value"),
        (None, "no such file"),
    ],
)
def test_refuses_a_broken_file_and_names_it(content: str | None, message: str, checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(CheckpointError, match=rf"/config\.json: {message}"):
        load_config(checkpoint)


def test_reads_the_note(checkpoint: Path) -> None:
    assert load_config(checkpoint).note == ""
    edit(checkpoint / "config.json", siglip_serve_note=" knows little \n")
    assert load_config(checkpoint).note == "knows little"


@pytest.mark.parametrize(("folder", "reference"), [(TINY, SiglipConfig), (JERSEY, SiglipVisionConfig)])
def test_bundled_checkpoints_carry_a_note_that_the_reference_accepts(
    folder: Path, reference: type[SiglipConfig] | type[SiglipVisionConfig]
) -> None:
    note = load_config(folder).note
    assert note.startswith("knows draw")
    assert "\n" not in note
    assert reference.from_pretrained(folder).siglip_serve_note == note


def test_lists_every_wrong_tensor(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    tensors["vision_model.encoder.layers.9.layer_norm1.bias"] = tensors["logit_scale"].clone()
    tensors["vision_model.head.probe"] = tensors["vision_model.head.probe"][..., :3].clone()
    tensors["vision_model.embeddings.position_ids"] = tensors["logit_scale"].clone()  # of old versions
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_vision(checkpoint)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing: vision_model.encoder.layers.0.self_attn.k_proj.bias [64]",
        "unexpected: vision_model.encoder.layers.9.layer_norm1.bias",
        "mis-shaped: vision_model.head.probe is [1, 1, 3], expected [1, 1, 64]",
    ]
    load_text(checkpoint)  # the tensors of the other tower are complete


def test_refuses_missing_and_broken_weight_files(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_vision(checkpoint)
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"no weight file, expected one of model\.safetensors, pytorch_m"
    ):
        load_scale(checkpoint)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no model-00001-of-00002\.safetensors"):
        load_text(checkpoint)


def test_refuses_a_checkpoint_without_its_scale(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["logit_bias"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected one logit_scale and one logit_bias"):
        load_scale(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reads_the_scale_of_any_float(dtype: torch.dtype, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    for name in ("logit_scale", "logit_bias"):
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, checkpoint / "model.safetensors")
    assert load_scale(checkpoint) == (tensors["logit_scale"].item(), tensors["logit_bias"].item())


def test_refuses_a_scale_that_is_not_readable(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["logit_bias"] = tensors["logit_bias"].to(torch.int8)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_scale(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_scale(checkpoint)


def test_loading_towers_does_not_import_torchs_compiler() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from siglip_serve.towers.load import load_text, load_vision\n"
        "load_vision(Path(sys.argv[1])); load_text(Path(sys.argv[1]))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(TINY)], check=True)


def test_finds_a_directory_and_refuses_other_names(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(checkpoint)) == checkpoint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="'owner/no-such-model@main': no such directory, not in the local"
    ):
        resolve("owner/no-such-model@main")
    for name in ("./nowhere", "no-slash", "a/b/c", "/a/b", "~/b", "a/b/c@main"):
        with pytest.raises(
            CheckpointError, match=f"'{name}': no such directory, and not a hub id of the form"
        ):
            resolve(name)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json or open_clip_config\.json$"):
        resolve(str(checkpoint))


def test_fingerprint_tells_weights_apart(checkpoint: Path) -> None:
    found = fingerprint(checkpoint)
    assert len(found) == 16
    edit(checkpoint / "config.json", siglip_serve_note="another note")
    assert fingerprint(checkpoint) == found
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(checkpoint) != found


def test_reads_a_checkpoint_without_a_text_tower() -> None:
    config = load_config(JERSEY)
    assert config.vision_only
    assert (config.vision.image_size, config.vision.grid_size) == (64, 8)
    assert "INPUT_IDS" not in tensor_dims(config)
    with pytest.raises(CheckpointError, match="without a text tower; it serves --models embed_image"):
        _ = config.text
    with pytest.raises(CheckpointError, match="without a text tower"):
        load_scale(config.path)

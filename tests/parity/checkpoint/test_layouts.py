"""Checkpoints in every layout that transformers and training runs write, against the model that wrote them.

Cosines are of float32 embeddings with random weights, at least 0.999999.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from random_checkpoints import NARROW, random_clip, random_model, randomise, save_checkpoint, save_clip
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    MetaClip2Config,
    MetaClip2Model,
    SiglipImageProcessorPil,
    SiglipModel,
)

from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.config import Backend
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.load import load_text, load_vision

SIDE = 32
VISION = {"image_size": SIDE, "patch_size": 16}
PIXELS = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
LEAST_COSINE = 0.999999
Tensors = dict[str, Tensor]


def ids_of(model: Any) -> Tensor:
    """Ids with an end token at a place of its own."""
    config = getattr(model.config, "text_config", model.config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab_size - 2, (3, config.max_position_embeddings), generator=generator)
    for row in range(3):
        ids[row, 4 + 2 * row] = config.eos_token_id
    return ids


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float(torch.cosine_similarity(ours.double(), theirs.double()).min()) >= LEAST_COSINE


@torch.inference_mode()
def assert_vision(path: Path, theirs: Tensor) -> None:
    tower = load_vision(path)
    assert_same(tower.head(tower(PIXELS)), theirs)
    assert tensor_dims(load_config(path))["EMBEDDING"] == [theirs.shape[1]]


@torch.inference_mode()
def assert_text(path: Path, ids: Tensor, theirs: Tensor) -> None:
    tower = load_text(path)
    assert_same(tower.pool(tower(ids), ids), theirs)
    assert tensor_dims(load_config(path))["EMBEDDING"] == [theirs.shape[1]]


@torch.inference_mode()
def assert_both(path: Path, model: SiglipModel | CLIPModel | MetaClip2Model) -> None:
    assert_vision(path, model.get_image_features(PIXELS).pooler_output)
    ids = ids_of(model)
    assert_text(path, ids, model.get_text_features(ids).pooler_output)
    bias = getattr(model, "logit_bias", None)
    assert load_scale(path) == (model.logit_scale.item(), None if bias is None else bias.item())


def save_images(path: Path, family: str) -> None:
    square = {"height": SIDE, "width": SIDE}
    if family == "clip":
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(path)
    else:
        SiglipImageProcessorPil(size=square).save_pretrained(path)


@torch.inference_mode()
def test_siglip_towers_alone(tmp_path: Path) -> None:
    model = random_model(VISION)
    vision, text = tmp_path / "vision", tmp_path / "text"
    model.vision_model.save_pretrained(vision)
    save_images(vision, "siglip")
    assert "post_layernorm.weight" in load_file(vision / "model.safetensors")
    assert_vision(vision, model.vision_model(PIXELS).pooler_output)
    model.text_model.save_pretrained(text)
    ids = ids_of(model)
    assert_text(text, ids, model.text_model(ids).pooler_output)
    with pytest.raises(
        CheckpointError, match="an image tower alone, without a text tower; it serves --models"
    ):
        load_text(vision)
    with pytest.raises(
        CheckpointError, match="a text tower alone, without an image tower; it serves --models"
    ):
        load_vision(text)
    with pytest.raises(CheckpointError, match="a text tower alone"):
        load_scale(text)


def assert_close(ours: NDArray[np.float32], theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((torch.from_numpy(ours) - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@torch.inference_mode()
def assert_vision_engine(path: Path, backend: Backend, theirs: Callable[[Tensor], Tensor]) -> None:
    """Compare with a function of normalised pixels."""
    config = load_config(path)
    pixels = (torch.rand(11, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1)) * 255).byte()
    mean, std = (torch.tensor(values) for values in (config.image.mean, config.image.std))
    engine = VisionEngine(load_vision(path), config.image, Plan("cpu", "float32", backend))
    normalized = ((pixels * config.image.rescale - mean) / std).permute(0, 3, 1, 2)
    assert_close(engine(pixels.numpy()).outputs["EMBEDDING"], theirs(normalized))


@torch.inference_mode()
def assert_text_engine(path: Path, backend: Backend, ids: Tensor, theirs: Tensor) -> None:
    engine = TextEngine(load_text(path), Plan("cpu", "float32", backend))
    assert_close(engine(ids.numpy()).outputs["EMBEDDING"], theirs)


BACKENDS: list[Backend] = ["torch", "openvino"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_siglip_with_the_exact_gelu_in_both_engines(tmp_path: Path, backend: Backend) -> None:
    act = {"hidden_act": "gelu"}
    model = random_model({**VISION, **act}, act)
    for name, values in model.named_parameters():
        if "fc1.weight" in name:  # the two forms of GELU differ most for values of 2 to 3
            torch.nn.init.normal_(values, std=0.3)
    path = save_checkpoint(model, tmp_path)
    ids = ids_of(model)
    assert_vision_engine(path, backend, lambda pixels: model.get_image_features(pixels).pooler_output)
    assert_text_engine(path, backend, ids, model.get_text_features(ids).pooler_output.detach())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("family", ["clip", "metaclip_2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_in_both_engines(tmp_path: Path, backend: Backend, family: str, activation: str) -> None:
    """Both towers together and alone. Alone they have no projection."""
    act = {"hidden_act": activation}
    vision, text = {"image_size": SIDE, "patch_size": 12, **act}, {"max_position_embeddings": 77, **act}
    model = random_clip(vision, text) if family == "clip" else random_metaclip2(vision, text)
    for name, values in model.named_parameters():
        if "fc1.weight" in name:  # as above
            torch.nn.init.normal_(values, std=0.3)
    both, image_tower, text_tower = (tmp_path / name for name in ("both", "image", "text"))
    model.save_pretrained(both)
    save_images(both, "clip")
    model.vision_model.save_pretrained(image_tower)
    save_images(image_tower, "clip")
    model.text_model.save_pretrained(text_tower)
    ids = ids_of(model)
    assert_vision_engine(both, backend, lambda pixels: model.get_image_features(pixels).pooler_output)
    assert_vision_engine(image_tower, backend, lambda pixels: model.vision_model(pixels).pooler_output)
    assert_text_engine(both, backend, ids, model.get_text_features(ids).pooler_output.detach())
    assert_text_engine(text_tower, backend, ids, model.text_model(ids).pooler_output.detach())


def test_names_of_earlier_versions(tmp_path: Path) -> None:
    """transformers 4 wrote the prefix of the tower, although it is alone."""
    model = random_model(VISION)
    model.vision_model.save_pretrained(tmp_path)
    save_images(tmp_path, "siglip")
    rewrite(tmp_path, lambda tensors: {f"vision_model.{name}": value for name, value in tensors.items()})
    with torch.inference_mode():
        assert_vision(tmp_path, model.vision_model(PIXELS).pooler_output)


@torch.inference_mode()
def test_clip_towers_alone(tmp_path: Path) -> None:
    """Without a projection the embedding is the reference's `pooler_output`, as wide as the tower."""
    model = random_clip(VISION)
    vision, text = tmp_path / "vision", tmp_path / "text"
    model.vision_model.save_pretrained(vision)
    save_images(vision, "clip")
    assert_vision(vision, model.vision_model(PIXELS).pooler_output)
    model.text_model.save_pretrained(text)
    ids = ids_of(model)
    assert_text(text, ids, model.text_model(ids).pooler_output)


@torch.inference_mode()
def test_clip_towers_alone_with_their_projections(tmp_path: Path) -> None:
    vision, text = tmp_path / "vision", tmp_path / "text"
    torch.manual_seed(0)
    image_model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**NARROW, **VISION, projection_dim=48)
    ).eval()
    ends = {"vocab_size": 300, "bos_token_id": 298, "eos_token_id": 299}
    text_model = CLIPTextModelWithProjection(CLIPTextConfig(**NARROW, **ends, projection_dim=40)).eval()
    randomise(image_model)
    randomise(text_model)
    image_model.save_pretrained(vision)
    save_images(vision, "clip")
    assert_vision(vision, image_model(PIXELS).image_embeds)
    text_model.save_pretrained(text)
    ids = ids_of(text_model)
    assert_text(text, ids, text_model(ids).text_embeds)
    config = json.loads((vision / "config.json").read_text())
    (vision / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPVisionModel"]}))
    with pytest.raises(CheckpointError, match=r"unexpected: visual_projection\.weight"):
        load_vision(vision)
    (vision / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(CheckpointError, match="architectures is None, expected the one class"):
        load_vision(vision)


def random_metaclip2(vision: dict[str, Any], text: dict[str, Any]) -> MetaClip2Model:
    torch.manual_seed(0)
    small_text = {**NARROW, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 2}
    config = MetaClip2Config(
        vision_config={**NARROW, **vision}, text_config={**small_text, **text}, projection_dim=48
    )
    model = MetaClip2Model(config).eval()
    randomise(model)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_metaclip2(tmp_path: Path, activation: str) -> None:
    """Its end token has id 2, which CLIP's early configurations have for another reason."""
    act = {"hidden_act": activation}
    model = random_metaclip2({**VISION, **act}, act)
    both, vision, text = (tmp_path / name for name in ("both", "vision", "text"))
    model.save_pretrained(both)
    save_images(both, "clip")
    assert_both(both, model)
    model.vision_model.save_pretrained(vision)
    save_images(vision, "clip")
    assert_vision(vision, model.vision_model(PIXELS).pooler_output)
    model.text_model.save_pretrained(text)
    ids = ids_of(model)
    assert ids[0, 4] == 2
    assert_text(text, ids, model.text_model(ids).pooler_output)


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a checkpoint with one weight file."""
    tensors = change(load_file(path / "model.safetensors"))
    save_file({name: value.clone() for name, value in tensors.items()}, path / "model.safetensors")


def as_saved_by_torch(
    path: Path, wrap: Callable[[Tensors], Any] = lambda tensors: tensors, **save: Any
) -> None:
    """Replace the safetensors file by one of `torch.save`."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(wrap(tensors), path / "pytorch_model.bin", **save)


@pytest.fixture(params=["siglip", "clip"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, SiglipModel | CLIPModel]:
    if request.param == "clip":
        clip = random_clip(VISION)
        return save_clip(clip, tmp_path), clip
    siglip = random_model(VISION)
    return save_checkpoint(siglip, tmp_path), siglip


WRITERS: dict[str, Callable[[Path], None]] = {
    "bin": as_saved_by_torch,
    "bin of old versions": lambda path: as_saved_by_torch(path, _use_new_zipfile_serialization=False),
    "bin of a trainer": lambda path: as_saved_by_torch(
        path, lambda tensors: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}
    ),
    "compiled": lambda path: rewrite(path, prefixed("_orig_mod.")),
    "wrapped": lambda path: rewrite(path, prefixed("module.")),
    "wrapped and compiled": lambda path: rewrite(path, prefixed("module._orig_mod.model.")),
    "of a trainer": lambda path: rewrite(path, prefixed("model.")),
    "one tower compiled": lambda path: rewrite(
        path,
        lambda tensors: {
            k.replace("vision_model.", "vision_model._orig_mod."): v for k, v in tensors.items()
        },
    ),
}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_training_runs(saved: tuple[Path, SiglipModel | CLIPModel], writer: str) -> None:
    path, model = saved
    WRITERS[writer](path)
    assert_both(path, model)


def test_shards_of_torch(saved: tuple[Path, SiglipModel | CLIPModel]) -> None:
    path, model = saved
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        torch.save(half, path / file)
    index = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_both(path, model)
    broken = {**halves[0], "vision_model.encoder.layers.9.layer_norm1.bias": torch.zeros(64)}
    torch.save(broken, path / files[0])
    with pytest.raises(
        CheckpointError, match=rf"unexpected: vision_model\.encoder\.layers\.9\.\S+ in {files[0]}"
    ):
        load_vision(path)

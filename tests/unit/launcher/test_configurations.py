"""Configurations of models, fitted to checkpoints and to the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from paths import MODELS
from tritonclient.grpc import model_config_pb2

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher import configurations
from siglip_serve.launcher.checkpoints import ServedCheckpoint
from siglip_serve.launcher.configurations import (
    checkpoint_use,
    fit,
    mark_heatmaps,
    read_config,
    with_steps,
)

GPU = model_config_pb2.ModelInstanceGroup.KIND_GPU


def checkpoint(tokens: int) -> ServedCheckpoint:
    dims = {
        "PIXEL_VALUES": (8, 8, 3),
        "EMBEDDING": (4,),
        "MEAN_EMBEDDING": (4,),
        "PATCH_EMBEDDINGS": (tokens, 4),
        "PATCH_MAPS": (-1, tokens),
        "PROMPT_VECTORS": (-1, 4),
    }
    return ServedCheckpoint({"checkpoint_name": "tiny", "dtype": "float32"}, dims)


def fitted(model: str, device: str, tokens: int = 9, decoders: int = 0) -> Any:
    config = read_config(MODELS / model, [device])
    fit(config, checkpoint(tokens), device, decoders)
    return config


@pytest.mark.parametrize(("tokens", "preferred"), [(729, [56]), (1024, [40]), (196, []), (256, [])])
def test_large_towers_prefer_batches_of_one_pass(tokens: int, preferred: list[int]) -> None:
    config = fitted("siglip_vision_model", "cuda", tokens)
    assert list(config.dynamic_batching.preferred_batch_size) == preferred
    assert all(size < config.max_batch_size for size in preferred)


def test_prefers_no_batch_on_cpus_and_for_single_processes() -> None:
    assert 56 not in fitted("siglip_vision_model", "cpu", 729).dynamic_batching.preferred_batch_size
    assert not fitted("siglip_base_model", "cuda", 729).dynamic_batching.preferred_batch_size


def test_writes_dimensions_and_parameters_of_the_checkpoint() -> None:
    config = fitted("siglip_vision_model", "cpu", 9)
    dims = {tensor.name: list(tensor.dims) for tensor in [*config.input, *config.output]}
    assert dims["PIXEL_VALUES"] == [8, 8, 3]
    assert dims["PATCH_MAPS"] == [-1, 9]
    assert config.parameters["checkpoint_name"].string_value == "tiny"
    assert config.name == "siglip_vision_model"
    assert "checkpoint_name" not in fitted("embed_image", "cpu").parameters  # not a Python model


def test_keeps_parameters_of_the_repository() -> None:
    config = read_config(MODELS / "siglip_vision_model", ["cpu"])
    config.parameters["dtype"].string_value = "bfloat16"
    fit(config, checkpoint(9), "cpu", 0)
    assert config.parameters["dtype"].string_value == "bfloat16"
    assert config.parameters["checkpoint_name"].string_value == "tiny"


@pytest.mark.parametrize(
    ("device", "cores", "decoders", "expected"),
    [
        ("cpu", 8, 0, 8),
        ("cpu", 1, 0, 1),
        ("cpu", 32, 0, 32),
        ("cpu", 33, 0, 32),
        ("cpu", 8, 3, 3),
        ("cuda", 8, 0, 6),
        ("cuda", 1, 0, 1),
        ("cuda", 42, 0, 31),
        ("cuda", 44, 0, 32),
    ],
)
def test_fits_decode_processes_to_the_cores(
    device: str, cores: int, decoders: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configurations, "available_cores", lambda: cores)
    (group,) = fitted("siglip_vision_process", device, decoders=decoders).instance_group
    assert group.count == expected


def test_sets_decode_processes_per_gpu_only_where_images_are_decoded() -> None:
    config = read_config(MODELS / "siglip_vision_process", ["decode_on_gpu", "cuda"])
    configured = config.instance_group[0].count
    fit(config, checkpoint(9), "cuda", 0)
    assert (config.instance_group[0].kind, config.instance_group[0].count) == (GPU, configured)
    fit(config, checkpoint(9), "cuda", 7)
    assert config.instance_group[0].count == 7
    assert fitted("siglip_vision_model", "cuda", decoders=7).instance_group[0].count == 2


@pytest.mark.parametrize("model", ["siglip_text_tokenize", "siglip_text_model"])
def test_a_gpu_has_two_processes_of_each_text_model(model: str) -> None:
    for device, expected in (("cuda", 2), ("cpu", 1)):
        config = read_config(MODELS / model, [device])
        fit(config, checkpoint(9), device, 7)
        assert [group.count for group in config.instance_group] == [expected]


def test_reads_the_first_variant_that_exists(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "configs").mkdir(parents=True)
    (model / "config.pbtxt").write_text("max_batch_size: 1")
    assert read_config(model, ["gpu", "cpu"]).max_batch_size == 1
    (model / "configs" / "cpu.pbtxt").write_text("max_batch_size: 2")
    assert read_config(model, ["gpu", "cpu"]).max_batch_size == 2
    (model / "configs" / "gpu.pbtxt").write_text("max_batch_size: 3")
    assert read_config(model, ["gpu", "cpu"]).max_batch_size == 3


def test_refuses_a_malformed_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text("max_batch: 1")
    with pytest.raises(ServerStartError, match=r"config\.pbtxt: .*no field named \"max_batch\""):
        read_config(tmp_path, [])


def test_refuses_a_model_that_is_not_in_the_repository() -> None:
    configs = {
        name: read_config(MODELS / name, [])
        for name in ("embed_image", "siglip_vision_process", "siglip_vision_model")
    }
    assert with_steps(configs, ["embed_image"]) == sorted(configs)
    assert with_steps(configs, ["siglip_vision_model"]) == ["siglip_vision_model"]
    with pytest.raises(
        ServerStartError,
        match=r"^model 'embed': not in the repository; it has embed_image, siglip_vision_model, siglip_visi",
    ):
        with_steps(configs, ["embed_image", "embed"])


def test_no_queue_has_a_policy() -> None:
    """With one, Triton's batcher sleeps for up to 500 ms beside waiting requests and an idle process."""
    files = [*MODELS.glob("*/config.pbtxt"), *MODELS.glob("*/configs/*.pbtxt")]
    configs = [text_format.Parse(file.read_text(), model_config_pb2.ModelConfig()) for file in files]
    queues = [config.dynamic_batching for config in configs if config.HasField("dynamic_batching")]
    assert len(queues) >= 9
    for queue in queues:
        assert not queue.HasField("default_queue_policy")
        assert not queue.priority_levels


def test_no_step_of_an_ensemble_is_an_ensemble() -> None:
    configs = {path.parent.name: read_config(path.parent, []) for path in MODELS.glob("*/config.pbtxt")}
    steps = {
        name: [step.model_name for step in config.ensemble_scheduling.step]
        for name, config in configs.items()
        if config.platform == "ensemble"
    }
    assert {"classify_image", "embed_image", "embed_text", "siglip_text", "siglip_vision"} <= set(steps)
    assert all(steps.values())
    nested = {
        name: inside for name, used in steps.items() if (inside := [step for step in used if step in steps])
    }
    assert not nested


def test_no_ensemble_takes_more_rows_than_a_step() -> None:
    configs = {path.parent.name: read_config(path.parent, []) for path in MODELS.glob("*/config.pbtxt")}
    for name, config in configs.items():
        for step in config.ensemble_scheduling.step:
            most = configs[step.model_name].max_batch_size
            assert not config.max_batch_size or config.max_batch_size <= most, (name, step.model_name)


def test_reads_the_use_of_the_checkpoint() -> None:
    assert checkpoint_use(read_config(MODELS / "siglip_vision_model", [])) == "main"
    config = read_config(MODELS / "team_fit", [])
    assert checkpoint_use(config) == "teams"
    config.parameters["tower"].string_value = "team"
    with pytest.raises(
        ServerStartError, match=r"^model 'team_fit': parameter tower is 'team', expected main or teams$"
    ):
        checkpoint_use(config)


@pytest.mark.parametrize("model", ["siglip_vision_process", "siglip_vision_model", "explain_image"])
def test_only_naflex_carries_grids_of_patches(model: str) -> None:
    naflex = checkpoint(9)
    naflex = ServedCheckpoint(naflex.parameters, {**naflex.dims, "PATCH_GRID": (2,)})
    config = read_config(MODELS / model, ["cpu"])
    assert "PATCH_GRID" in text_format.MessageToString(config)
    fit(config, naflex, "cpu", 0)
    assert "PATCH_GRID" in text_format.MessageToString(config)
    assert "PATCH_GRID" not in text_format.MessageToString(fitted(model, "cpu"))
    teams = read_config(MODELS / "siglip_base_model", ["cpu"])
    with pytest.raises(ServerStartError, match="'siglip_base_model': takes images of one size"):
        fit(teams, naflex, "cpu", 0)


def test_only_models_of_served_heatmaps_prepare_for_them() -> None:
    configs = {file.parent.name: read_config(file.parent, ["cpu"]) for file in MODELS.glob("*/config.pbtxt")}
    mark_heatmaps(configs, with_steps(configs, ["embed_image", "classify_image", "fit_teams"]))
    assert not any("heatmaps" in config.parameters for config in configs.values())
    mark_heatmaps(configs, with_steps(configs, ["explain_image"]))
    marked = {name: config.parameters["heatmaps"].string_value for name, config in configs.items()}
    assert {name for name, value in marked.items() if value} == {"siglip_vision_model"}
    assert marked["siglip_vision_model"] == "on"

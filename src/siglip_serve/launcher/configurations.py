"""Read the configurations of models, and fit them to the checkpoints and to the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from siglip_serve.config import CheckpointUse, Settings
from siglip_serve.engine.buckets import rows_of_a_pass
from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.checkpoints import ServedCheckpoint
from siglip_serve.machine import available_cores

__all__ = ["Config", "checkpoint_use", "fit", "mark_heatmaps", "read_config", "with_steps"]

_MOST_PROCESSES = 32
_FILES = "INPUT_IMAGE"
_PIXELS = "PIXEL_VALUES"
_GRID = "PATCH_GRID"
_VECTORS = "PROMPT_VECTORS"
_KIND_CPU = model_config_pb2.ModelInstanceGroup.KIND_CPU
_KIND_GPU = model_config_pb2.ModelInstanceGroup.KIND_GPU

Config = Any  # model_config_pb2.ModelConfig, whose module has no types


def read_config(folder: Path, variants: Sequence[str]) -> Config:
    """Read a model's configuration.

    Args:
        folder: the model's directory in the repository.
        variants: names in order of preference; the first `configs/<variant>.pbtxt` that exists replaces
            `config.pbtxt`.

    Raises:
        ServerStartError: the file is malformed.
    """
    files = [folder / "configs" / f"{variant}.pbtxt" for variant in variants]
    chosen = next((file for file in files if file.is_file()), folder / "config.pbtxt")
    try:
        config: Config = text_format.Parse(chosen.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ServerStartError(f"{chosen}: {error}") from error
    config.name = folder.name
    return config


def with_steps(configs: Mapping[str, Config], wanted: Sequence[str]) -> list[str]:
    """List the wanted models and all models that they are made of, in order of their names.

    Raises:
        ServerStartError: a model is not in the repository.
    """
    found: set[str] = set()
    left = list(wanted)
    while left:
        name = left.pop()
        if name not in configs:
            raise ServerStartError(
                f"model {name!r}: not in the repository; it has {', '.join(sorted(configs))}"
            )
        if name not in found:
            found.add(name)
            left += [step.model_name for step in configs[name].ensemble_scheduling.step]
    return sorted(found)


def checkpoint_use(config: Config) -> CheckpointUse:
    """Read which checkpoint a model loads: the value of its parameter `tower`.

    Raises:
        ServerStartError: there is no checkpoint of that use.
    """
    if "tower" not in config.parameters:
        return Settings.tower
    value = config.parameters["tower"].string_value
    for use in get_args(CheckpointUse):
        if use == value:
            return cast(CheckpointUse, use)
    expected = " or ".join(get_args(CheckpointUse))
    raise ServerStartError(f"model {config.name!r}: parameter tower is {value!r}, expected {expected}")


def mark_heatmaps(configs: Mapping[str, Config], served: Sequence[str]) -> None:
    """Tell, in place, the models that a served ensemble asks for heatmaps, so that they prepare for them."""
    for name in served:
        for step in configs[name].ensemble_scheduling.step:
            if {_PIXELS, _VECTORS} <= set(step.input_map):
                configs[step.model_name].parameters["heatmaps"].string_value = "on"


def fit(config: Config, checkpoint: ServedCheckpoint, device: str, decoders: int) -> None:
    """Fit a configuration, in place, to its checkpoint, the device and the cores.

    Args:
        config: as in the repository.
        checkpoint: the one that the model loads.
        device: `cpu` or `cuda`.
        decoders: processes of a model that decodes images in several CPU processes, or on GPUs (per GPU); 0:
            on CPUs fitted to the cores, on GPUs as configured.

    Raises:
        ServerStartError: the model takes images of one size, and the checkpoint is a NaFlex.
    """
    if _GRID not in checkpoint.dims:
        _leave_out_grids(config)
    elif checkpoint_use(config) == "teams":
        raise ServerStartError(
            f"model {config.name!r}: takes images of one size, but the checkpoint is a NaFlex; name another "
            "one with --teams-checkpoint, or the models to serve with --models"
        )
    if config.max_batch_size:
        for tensor in [*config.input, *config.output]:
            tensor.dims[:] = checkpoint.dims.get(tensor.name, tensor.dims)
    if config.backend == "python":
        for name, value in checkpoint.parameters.items():
            if name not in config.parameters:
                config.parameters[name].string_value = value
        _set_processes(config, device, decoders)
        _prefer_full_passes(config, checkpoint)


def _leave_out_grids(config: Config) -> None:
    """Drop the tensor that only NaFlex has: else each request would carry it through an ensemble in vain."""
    for tensors in (config.input, config.output):
        for tensor in [tensor for tensor in tensors if tensor.name == _GRID]:
            tensors.remove(tensor)
    for step in config.ensemble_scheduling.step:
        step.input_map.pop(_GRID, None)
        step.output_map.pop(_GRID, None)


def _set_processes(config: Config, device: str, decoders: int) -> None:
    if not any(tensor.name == _FILES for tensor in config.input):
        return
    for group in config.instance_group:
        if group.kind == _KIND_CPU and group.count > 1:
            group.count = decoders or _processes(device)
        elif group.kind == _KIND_GPU and decoders:
            group.count = decoders


def _processes(device: str) -> int:
    cores = available_cores()
    # With GPUs, a quarter of the cores is left to the server and to its clients.
    return min(_MOST_PROCESSES, max(1, cores * 3 // 4) if device == "cuda" else cores)


def _prefer_full_passes(config: Config, checkpoint: ServedCheckpoint) -> None:
    """Prefer batches of one pass for a tower that runs in several processes on a GPU.

    Larger batches would take several passes and leave too little work for the other processes.
    """
    several = any(group.kind == _KIND_GPU and group.count > 1 for group in config.instance_group)
    if several and any(tensor.name == _PIXELS for tensor in config.input):
        rows = rows_of_a_pass(checkpoint.dims["PATCH_EMBEDDINGS"][0])
        if rows < config.max_batch_size:
            config.dynamic_batching.preferred_batch_size[:] = [rows]

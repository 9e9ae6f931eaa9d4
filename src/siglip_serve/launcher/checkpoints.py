"""Describe the checkpoints of a server for the configurations of its models and for its operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from siglip_serve.checkpoint.config import limit_patches, load_config, tensor_dims
from siglip_serve.checkpoint.files import main_file, public_name, weight_files
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.config import CheckpointUse, Settings
from siglip_serve.engine.calibration import check_calibration
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import SettingsError
from siglip_serve.texts.tokenizer import find_tokenizer

__all__ = ["ServedCheckpoint", "check_options", "describe_checkpoints"]


@dataclass(frozen=True)
class ServedCheckpoint:
    """A checkpoint as the configurations of its models show it.

    Attributes:
        parameters: model parameters that a Python model gets, unless its configuration sets them.
        dims: dimensions by tensor name, for configurations that leave them to the checkpoint.
        notes: sentences for the operator.
    """

    parameters: Mapping[str, str]
    dims: Mapping[str, Sequence[int]]
    notes: tuple[str, ...] = ()


def check_options(settings: Settings, device: str) -> None:
    """Refuse what the options alone show to be wrong, before a checkpoint is downloaded.

    Args:
        settings: those of the server. A checkpoint that is a local directory is looked into.
        device: `cpu`, or the GPU whose arithmetic all GPUs share.

    Raises:
        CheckpointError: as for `describe_checkpoints`.
        SettingsError: the device or a checkpoint's family cannot run the dtype or the backend, or int8 lacks
            its images or nncf.
    """
    plan = Plan(device, settings.dtype, settings.backend)
    for name in filter(None, (settings.checkpoint, settings.teams_checkpoint)):
        path = Path(name).expanduser()
        if path.is_dir() and main_file(path).is_file():
            config = load_config(path)
            _plan(plan, config)
            if name == settings.checkpoint:
                _check_patches(settings, path)
            weight_files(path)
            if not config.vision_only:
                find_tokenizer(config)
    if plan.resolve().dtype == "int8":
        check_calibration(settings.calibration_folder, settings.cache_folder)


def describe_checkpoints(
    settings: Settings, directories: Mapping[str, Path], device: str
) -> dict[CheckpointUse, ServedCheckpoint]:
    """Describe the checkpoint of each use.

    Args:
        settings: those of the server.
        directories: directory of each checkpoint by its name in the settings.
        device: `cpu`, or the GPU whose arithmetic all GPUs share.

    Raises:
        CheckpointError: a directory's JSON files are not those of a supported checkpoint.
        SettingsError: the device or the checkpoint's family cannot run the dtype or the backend.
    """
    _check_patches(settings, directories[settings.checkpoint])
    described = {name: _describe(name, path, settings, device) for name, path in directories.items()}
    return {use: described[replace(settings, tower=use).own_checkpoint] for use in get_args(CheckpointUse)}


def _check_patches(settings: Settings, path: Path) -> None:
    """Refuse settings that NaFlex checkpoints cannot have, and those that only NaFlex checkpoints have."""
    config = load_config(path)
    if config.family == "naflex":
        if settings.preprocess == "gpu":
            raise SettingsError(
                "preprocess gpu: makes squares only; fast, scaled and pil are for NaFlex checkpoints"
            )
        limit_patches(config, settings.max_num_patches)
    elif settings.max_num_patches:
        raise SettingsError(
            f"setting 'max_num_patches': got {settings.max_num_patches}, expected none, since {path.name} is "
            "no NaFlex checkpoint"
        )


def _describe(named: str, path: Path, settings: Settings, device: str) -> ServedCheckpoint:
    config = limit_patches(load_config(path), settings.max_num_patches)
    plan = Plan(device, settings.dtype, settings.backend)
    dtype = _plan(plan, config).dtype
    name, revision = public_name(named, path)
    parameters = {
        "checkpoint_name": name,
        "checkpoint_revision": revision,
        "dtype": dtype,
        "preprocess": settings.preprocess,
        "color": settings.color,
    }
    notes = []
    if config.note:
        parameters["checkpoint_note"] = config.note
        notes.append(f"{name} {config.note}")
    if settings.dtype not in ("auto", dtype):
        notes.append(f"{name} runs in {dtype}: it is too narrow to gain from {settings.dtype}")
    return ServedCheckpoint(parameters, tensor_dims(config), tuple(notes))


def _plan(plan: Plan, config: ModelConfig) -> Plan:
    if config.text_only:
        return plan.for_text(config.family, config.text.hidden_act)
    return plan.for_vision(config.family, config.vision.hidden_size, config.vision.hidden_act)

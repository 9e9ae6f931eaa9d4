"""Read what a Triton model knows when it starts: settings, checkpoint, device, peers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from siglip_serve.checkpoint.config import limit_patches, load_config, tensor_dims
from siglip_serve.checkpoint.files import resolve
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.config import Settings, load_settings
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.turns import Places, Turns, peers_name
from siglip_serve.errors import START_REFUSED, SiglipServeError
from siglip_serve.machine import available_cores
from siglip_serve.serving.counters import RefusalCounter

__all__ = [
    "Context",
    "engine_plan",
    "fill_dims",
    "open_context",
    "open_places",
    "open_turns",
    "readable_start",
]

# torch's OpenMP reads it when torch is first imported, which is later than here. Threads that spin while
# they wait take the cores from the other model processes: five times the throughput on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True)
class Context:
    """Everything that a model instance is given.

    Attributes:
        settings: from the environment and the model's parameters.
        config: the JSON files of the checkpoint that this model takes.
        device: `cpu`, or `cuda:<index>` as Triton placed the instance.
        model: its name in the repository.
        refusals: counts the requests that it refuses.
        shared: the server runs several processes of this model on the device.
        processes: their number.
    """

    settings: Settings
    config: ModelConfig
    device: str
    model: str
    refusals: RefusalCounter
    shared: bool
    processes: int = 1


def open_context(args: Mapping[str, str]) -> Context:
    """Build the context of a model instance from the arguments of `initialize`.

    Raises:
        TritonModelException: a setting or the checkpoint is at fault; the message is for the operator.
    """
    described = json.loads(args["model_config"])
    settings, config = _read(described)
    gpu = args["model_instance_kind"] == "GPU"
    device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
    model = args["model_name"]
    processes = max(group["count"] for group in described["instance_group"])
    return Context(settings, config, device, model, RefusalCounter(model), processes > 1, processes)


def fill_dims(model: Any) -> Any:
    """Complete the dimensions that a `config.pbtxt` leaves to the checkpoint.

    The launcher has already done so. This serves a tritonserver that was started without it.

    Args:
        model: the `pb_utils.ModelConfig` of `auto_complete_config`.
    """
    described = model.as_dict()
    _, config = _read(described)
    dims = tensor_dims(config)
    for tensors, add in (("input", model.add_input), ("output", model.add_output)):
        for tensor in described[tensors]:
            if tensor["name"] in dims:
                add({key: tensor[key] for key in ("name", "data_type")} | {"dims": dims[tensor["name"]]})
    return model


def engine_plan(context: Context) -> Plan:
    """Plan how this model's tower runs, as the settings say."""
    return Plan.of(context.settings, context.device, available_cores())


def open_turns(context: Context) -> Turns:
    """Join the processes that compute the same on this device, so that they take turns."""
    if not context.shared or context.settings.turns == "off":
        return Turns("")
    try:
        return Turns(peers_name(context.model, context.device))
    except OSError as error:
        pb_utils.Logger.log_warn(f"{context.model}: its processes compute without turns: {error}")
        return Turns("")


def open_places(context: Context, count: int) -> Places:
    """Join the processes of this model on this device in sharing `count` places."""
    try:
        return Places(peers_name(context.model, context.device), count)
    except OSError as error:
        pb_utils.Logger.log_warn(f"{context.model}: its processes refuse slow requests: {error}")
        return Places("", 0)


@contextmanager
def readable_start() -> Iterator[None]:
    """Turn our own errors during a model's start into one marked line, which the launcher shows."""
    try:
        yield
    except SiglipServeError as error:
        raise pb_utils.TritonModelException(f"{START_REFUSED}{error}") from None


def _read(model_config: Mapping[str, Any]) -> tuple[Settings, ModelConfig]:
    parameters = {key: value["string_value"] for key, value in model_config.get("parameters", {}).items()}
    with readable_start():
        settings = load_settings(parameters=parameters)
        config = load_config(resolve(settings.own_checkpoint))
        return settings, limit_patches(config, settings.max_num_patches)

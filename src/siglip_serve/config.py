"""Settings, read once from the environment and from the `parameters` of a model's `config.pbtxt`.

Every field of `Settings` is an environment variable `SIGLIP_SERVE_<NAME>` and a model parameter
`<name>`; the parameter, which concerns one model, wins over the variable, which concerns all.
A name that is not a setting stops the start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from siglip_serve.errors import SettingsError

__all__ = [
    "PREFIX",
    "Backend",
    "Dtype",
    "PreprocessMode",
    "Settings",
    "Switch",
    "TeamReducer",
    "Tower",
    "load_settings",
]

PREFIX = "SIGLIP_SERVE_"
# What Kubernetes puts into the environment of every pod beside a service that is named siglip-serve.
_SERVICE_LINKS = re.compile(rf"{PREFIX}(SERVICE_HOST|SERVICE_PORT.*|PORT|PORT_\d+_.*)")

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float8", "int8"]
Backend = Literal["auto", "torch", "openvino", "fused"]
PreprocessMode = Literal["fast", "pil", "gpu"]
TeamReducer = Literal["pca", "none", "umap"]
Tower = Literal["main", "teams"]
Switch = Literal["on", "off"]


@dataclass(frozen=True)
class Settings:
    """What an operator can choose. The texts below are also the command line's help."""

    checkpoint: str = field(
        metadata={"help": "Hugging Face directory or hub id; owner/name@revision pins the revision"}
    )
    tower: Tower = field(
        default="main", metadata={"help": "which checkpoint a model takes; only its config.pbtxt says so"}
    )
    checkpoint_name: str = field(default="", metadata={"help": "the checkpoint's name as clients see it"})
    checkpoint_revision: str = field(default="", metadata={"help": "its revision as clients see it"})
    dtype: Dtype = field(
        default="auto",
        metadata={"help": "arithmetic of the towers; auto: bfloat16 where fast; float8, int8: images only"},
    )
    backend: Backend = field(
        default="auto",
        metadata={"help": "what runs the towers; auto: fused on GPUs, openvino on CPUs, torch for CLIP"},
    )
    calibration: str = field(default="", metadata={"help": "folder of images that int8 is calibrated on"})
    cache: str = field(
        default="",
        metadata={"help": "folder that keeps the int8 model between starts; default: ~/.cache/siglip-serve"},
    )
    teams_checkpoint: str = field(
        default="",
        metadata={"help": "checkpoint whose image tower tells teams apart; default: the one of --checkpoint"},
    )
    jersey_region: str = field(
        default="0.25,0.2,0.75,0.5",
        metadata={"help": "left, top, right, bottom of the jersey, as parts of a player's box"},
    )
    team_reducer: TeamReducer = field(
        default="pca", metadata={"help": "in which coordinates teams are looked for; umap: needs umap-learn"}
    )
    preprocess: PreprocessMode = field(
        default="fast",
        metadata={"help": "fast: libjpeg-turbo; pil: pixel for pixel as published; gpu: JPEG by the GPU"},
    )
    max_image_bytes: int = field(
        default=32 * 1024 * 1024, metadata={"help": "largest encoded image, in bytes"}
    )
    max_image_pixels: int = field(
        default=64_000_000, metadata={"help": "largest image, in pixels; checked before decoding"}
    )
    max_rows: int = field(
        default=0, metadata={"help": "rows in one pass of a tower; 0: fitted to the device"}
    )
    turns: Switch = field(
        default="on",
        metadata={"help": "off: processes of one tower on one device compute at the same time, not in turns"},
    )
    threads: int = field(default=0, metadata={"help": "CPU threads of one tower; 0: all cores"})
    decoders: int = field(
        default=0, metadata={"help": "processes that decode images, with gpu on each GPU; 0: fitted"}
    )
    max_text_bytes: int = field(default=65_536, metadata={"help": "largest text or label, in bytes"})
    text_cache_rows: int = field(
        default=32_768, metadata={"help": "texts whose tokens and embeddings are kept; 0: none"}
    )
    heatmap_blocks: int = field(
        default=2, metadata={"help": "last blocks that heatmaps are rolled back through; 0: none"}
    )
    heatmap_prompts: int = field(
        default=32, metadata={"help": "most prompts of one image for which blocks are rolled back"}
    )
    embed_text_models: str = field(
        default="siglip_text", metadata={"help": "values that embed_model may take for texts"}
    )
    embed_models: str = field(
        default="siglip_vision", metadata={"help": "values that the request parameter embed_model may take"}
    )

    @property
    def own_checkpoint(self) -> str:
        """The checkpoint that the model with these settings takes."""
        return (self.tower == "teams" and self.teams_checkpoint) or self.checkpoint


def load_settings(
    environment: Mapping[str, str] | None = None, parameters: Mapping[str, str] | None = None
) -> Settings:
    """The settings of one model.

    Args:
        environment: variables; those that begin with `SIGLIP_SERVE_` are read. Default: `os.environ`.
        parameters: the `parameters` of the model's configuration, as name -> string value.

    Raises:
        SettingsError: a name is unknown, a value is not of the setting's type or range, or
            `checkpoint` is not set.
    """
    environment = os.environ if environment is None else environment
    given = {
        key.removeprefix(PREFIX).lower(): (value, f"environment variable {key}")
        for key, value in environment.items()
        if key.startswith(PREFIX) and not _SERVICE_LINKS.fullmatch(key)
    }
    given |= {key: (value, f"model parameter {key!r}") for key, value in (parameters or {}).items()}
    types = get_type_hints(Settings)
    values = {}
    for name, (text, source) in given.items():
        if name not in types:
            raise SettingsError(f"{source}: no such setting; the settings are {', '.join(types)}")
        values[name] = _parse(text, types[name], source)
    missing = [f.name for f in fields(Settings) if f.default is MISSING and not values.get(f.name)]
    if missing:
        raise SettingsError(
            f"setting {missing[0]!r} is not given (environment variable {PREFIX}{missing[0].upper()})"
        )
    return Settings(**values)


def _parse(text: str, kind: Any, source: str) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise SettingsError(f"{source}: got {text!r}, expected one of {', '.join(get_args(kind))}")
        return text
    if kind is int:
        if not text.isascii() or not text.isdigit():
            raise SettingsError(f"{source}: got {text!r}, expected a whole number >= 0")
        return int(text)
    return text

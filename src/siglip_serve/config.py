"""Settings, read once from the environment and from the `parameters` of a model's `config.pbtxt`.

Every field of `Settings` is an environment variable `SIGLIP_SERVE_<NAME>` and a model parameter `<name>`.
The variable applies to all models. The parameter applies to one model and wins over the variable.
Startup fails on a name that is not a setting.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from siglip_serve.errors import SettingsError

__all__ = [
    "PREFIX",
    "Backend",
    "CheckpointUse",
    "Color",
    "Dtype",
    "PreprocessMode",
    "Settings",
    "Switch",
    "TeamReducer",
    "load_settings",
]

PREFIX = "SIGLIP_SERVE_"
# Kubernetes sets these variables in every pod of a namespace that has a service named siglip-serve.
_SERVICE_LINKS = re.compile(rf"{PREFIX}(SERVICE_HOST|SERVICE_PORT.*|PORT|PORT_\d+_.*)")

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float8", "int8"]
Backend = Literal["auto", "torch", "openvino", "fused"]
PreprocessMode = Literal["fast", "scaled", "pil", "gpu"]
Color = Literal["stored", "srgb"]
TeamReducer = Literal["pca", "none", "umap"]
CheckpointUse = Literal["main", "teams"]
Switch = Literal["on", "off"]


def _option(group: str, text: str, metavar: str = "") -> dict[str, str]:
    """Describe a setting that is also an option of `siglip-serve serve`.

    Args:
        group: heading of the option in the command's help.
        text: help of the option, without the default.
        metavar: placeholder of the value in the help; empty: that of a number.
    """
    return {"group": group, "help": text, "metavar": metavar}


@dataclass(frozen=True)
class Settings:
    """Choices of the operator. The texts of the options are also the command's help.

    Attributes:
        tower: use of the checkpoint that a model loads; only its `config.pbtxt` sets it.
        checkpoint_name: name of that checkpoint as clients see it; the launcher sets it.
        checkpoint_revision: revision of that checkpoint as clients see it; the launcher sets it.
        checkpoint_note: limits of that checkpoint as its `config.json` tells them; the launcher sets it.
        heatmaps: another model of the server asks this one for heatmaps; the launcher sets it.
    """

    checkpoint: str = field(
        metadata=_option(
            "checkpoints",
            "Hugging Face directory or hub id; owner/name@revision pins the revision",
            "CHECKPOINT",
        )
    )
    teams_checkpoint: str = field(
        default="",
        metadata=_option(
            "checkpoints",
            "checkpoint whose image tower tells teams apart (default: that of --checkpoint)",
            "CHECKPOINT",
        ),
    )
    tower: CheckpointUse = "main"
    checkpoint_name: str = ""
    checkpoint_revision: str = ""
    checkpoint_note: str = ""
    heatmaps: Switch = "off"
    dtype: Dtype = field(
        default="auto",
        metadata=_option(
            "towers", "arithmetic; auto: bfloat16 where it is fast; float8 and int8: images only"
        ),
    )
    backend: Backend = field(
        default="auto",
        metadata=_option("towers", "engine; auto: fused on GPUs, openvino on CPUs"),
    )
    calibration: str = field(
        default="", metadata=_option("towers", "folder of images to calibrate int8 on", "FOLDER")
    )
    cache: str = field(
        default="",
        metadata=_option(
            "towers",
            "folder that keeps the int8 model between starts (default: ~/.cache/siglip-serve)",
            "FOLDER",
        ),
    )
    max_rows: int = field(
        default=0, metadata=_option("towers", "rows in one pass of a tower; 0: fitted to the device")
    )
    turns: Switch = field(
        default="on",
        metadata=_option(
            "towers", "on: processes of one tower on one device compute in turn; off: at the same time"
        ),
    )
    threads: int = field(default=0, metadata=_option("towers", "CPU threads of one tower; 0: all cores"))
    preprocess: PreprocessMode = field(
        default="fast",
        metadata=_option(
            "images",
            "fast: libjpeg-turbo; scaled: large JPEGs are decoded smaller; pil: the pixels of transformers; "
            "gpu: JPEGs are decoded on the GPU",
        ),
    )
    color: Color = field(
        default="stored",
        metadata=_option(
            "images", "stored: ICC profiles are ignored, as in training; srgb: they are applied"
        ),
    )
    max_num_patches: int = field(
        default=0,
        metadata=_option(
            "images", "most patches of an image, for NaFlex; 0: as the checkpoint says, usually 256"
        ),
    )
    decoders: int = field(
        default=0,
        metadata=_option(
            "images", "processes that decode images, per GPU with --preprocess gpu; 0: fitted to the machine"
        ),
    )
    max_image_bytes: int = field(
        default=32 * 1024 * 1024, metadata=_option("images", "largest encoded image, in bytes")
    )
    max_image_pixels: int = field(
        default=64_000_000,
        metadata=_option("images", "largest image, in pixels; checked before it is decoded"),
    )
    max_decode_seconds: float = field(
        default=2.0, metadata=_option("images", "most CPU time that one image may take, in seconds")
    )
    max_decode_megabytes: int = field(
        default=512, metadata=_option("images", "most memory that decoding one image may need, in MB")
    )
    slow_request_seconds: float = field(
        default=0.4,
        metadata=_option(
            "images",
            "CPU seconds that a request may take beyond what its bytes explain; after that it is slow, and "
            "one decoder is kept free of slow requests",
        ),
    )
    max_text_bytes: int = field(default=65_536, metadata=_option("texts", "largest text or label, in bytes"))
    text_cache_rows: int = field(
        default=32_768,
        metadata=_option(
            "texts", "texts whose tokens and embeddings stay in the memory of a process; 0: none"
        ),
    )
    heatmap_blocks: int = field(
        default=2, metadata=_option("heatmaps", "last blocks that heatmaps are traced back through; 0: none")
    )
    heatmap_prompts: int = field(
        default=32, metadata=_option("heatmaps", "most prompts per image for which blocks are traced back")
    )
    jersey_region: str = field(
        default="0.25,0.2,0.75,0.5",
        metadata=_option(
            "teams", "left, top, right and bottom of the jersey, as fractions of a player's box", "L,T,R,B"
        ),
    )
    team_reducer: TeamReducer = field(
        default="pca",
        metadata=_option(
            "teams", "reduction of the embeddings before they are clustered; umap needs umap-learn"
        ),
    )
    embed_models: str = field(
        default="siglip_vision",
        metadata=_option("requests", "values that the parameter embed_model may have for images", "NAME,..."),
    )
    embed_text_models: str = field(
        default="siglip_text",
        metadata=_option("requests", "values that the parameter embed_model may have for texts", "NAME,..."),
    )

    @property
    def own_checkpoint(self) -> str:
        """Name of the checkpoint that a model with these settings loads."""
        return (self.tower == "teams" and self.teams_checkpoint) or self.checkpoint

    @property
    def cache_folder(self) -> Path:
        """Folder that keeps the int8 model between starts."""
        return Path(self.cache or os.path.expanduser("~/.cache/siglip-serve"))  # noqa: PTH111 - no HOME is fine

    @property
    def calibration_folder(self) -> Path | None:
        """Folder of images to calibrate int8 on, if there is one."""
        return Path(self.calibration) if self.calibration else None


def load_settings(
    environment: Mapping[str, str] | None = None, parameters: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings of one model.

    Args:
        environment: variables; only names that begin with `SIGLIP_SERVE_` count. Default: `os.environ`.
        parameters: the `parameters` of the model's configuration, as name -> string value.

    Raises:
        SettingsError: a name is unknown, a value is not of the setting's type or range, two values exclude
            each other, or `checkpoint` is not set.
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
    settings = Settings(**values)
    if settings.color == "srgb" and settings.preprocess == "gpu":
        raise SettingsError(
            "color srgb: preprocess gpu applies no ICC profiles; take preprocess fast, scaled or pil"
        )
    return settings


def _parse(text: str, kind: Any, source: str) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise SettingsError(f"{source}: got {text!r}, expected one of {', '.join(get_args(kind))}")
        return text
    if kind is int:
        if not text.isascii() or not text.isdigit():
            raise SettingsError(f"{source}: got {text!r}, expected a whole number >= 0")
        return int(text)
    if kind is float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise SettingsError(f"{source}: got {text!r}, expected a number > 0")
        return number
    return text

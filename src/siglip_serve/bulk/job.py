"""A job: what is embedded, how, and where the results go. Its manifest keeps runs of one output alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from siglip_serve.bulk.items import Columns
from siglip_serve.bulk.storage import Folder
from siglip_serve.bulk.units import InputOptions
from siglip_serve.checkpoint.config import limit_patches, load_config
from siglip_serve.checkpoint.files import fingerprint, public_name, resolve
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.config import Settings
from siglip_serve.errors import SettingsError

__all__ = ["Format", "Job", "Labels", "VectorType", "keep_manifest", "open_job"]

Format = Literal["parquet", "npy", "lance"]
VectorType = Literal["float32", "float16", "int8", "binary"]

_MANIFEST = "bulk.json"
_VERSION = 1


@dataclass(frozen=True)
class Labels:
    """Labels that each picture is compared with.

    Attributes:
        names: of the labels; empty: none.
        template: text with `{}` where the label goes.
        top: how many of the likeliest are kept.
    """

    names: tuple[str, ...] = ()
    template: str = "{}"
    top: int = 5


@dataclass(frozen=True)
class Job:
    """Everything that a worker has to know.

    Attributes:
        settings: of towers and images, as those of a server.
        output: folder of the results, a path or URI.
        format: of the files.
        vectors: type of the stored values.
        normalized: scale embeddings to unit length. int8 always are.
        columns: of the inputs.
        inputs: choices about the inputs.
        labels: to classify by.
        device: `cpu` or `cuda`; `auto` takes GPUs if there are any.
    """

    settings: Settings
    output: str
    format: Format = "parquet"
    vectors: VectorType = "float32"
    normalized: bool = False
    columns: Columns = field(default_factory=Columns)
    inputs: InputOptions = field(default_factory=InputOptions)
    labels: Labels = field(default_factory=Labels)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def load_config(self) -> ModelConfig:
        """Read the checkpoint's JSON files, downloading them if it is a hub id.

        Raises:
            CheckpointError: the checkpoint cannot be found or read.
        """
        config = load_config(resolve(self.settings.checkpoint))
        return limit_patches(config, self.settings.max_num_patches)

    def identity(self, config: ModelConfig) -> dict[str, Any]:
        """Everything that two runs of one output must share, as JSON values."""
        own = self.settings
        name, revision = public_name(own.checkpoint, config.path)
        return {
            "version": _VERSION,
            "format": self.format,
            "dtype": self.vectors,
            "width": config.vision.embedding_size,
            "normalized": self.normalized,
            "checkpoint_name": name,
            "checkpoint_revision": revision,
            "checkpoint_fingerprint": fingerprint(config.path),
            "tower_dtype": own.dtype,
            "preprocess": own.preprocess,
            "color": own.color,
            "max_num_patches": own.max_num_patches,
            "max_image_bytes": own.max_image_bytes,
            "max_image_pixels": own.max_image_pixels,
            "image_column": self.columns.image,
            "text_column": self.columns.text,
            "kept_columns": list(self.columns.kept),
            "labels": list(self.labels.names),
            "template": self.labels.template if self.labels.names else "",
            "top": self.labels.top if self.labels.names else 0,
            "unit_items": self.inputs.items,
            "all_files": self.inputs.all_files,
        }


def open_job(job: Job, config: ModelConfig) -> Folder:
    """Open the output of a job. Nothing is written.

    Args:
        job: to be run.
        config: of its checkpoint.

    Raises:
        SettingsError: the output belongs to a job with other settings. The message names those that differ.
    """
    if config.text_only:
        raise SettingsError(f"checkpoint {job.settings.checkpoint!r}: has no image tower")
    folder = Folder(job.output)
    stored = folder.read(_MANIFEST)
    if stored is not None:
        try:
            known = json.loads(stored)
        except ValueError as error:
            raise SettingsError(f"{folder.join(_MANIFEST)}: not valid JSON: {error}") from error
        _check_same(folder.path, known, job.identity(config))
    return folder


def keep_manifest(job: Job, config: ModelConfig, folder: Folder) -> None:
    """Write the manifest of a job, unless its output has one. The output then belongs to its settings."""
    if folder.read(_MANIFEST) is None:
        made = {"siglip_serve": version("siglip-serve"), "checkpoint": job.settings.checkpoint}
        folder.write(_MANIFEST, json.dumps({**job.identity(config), **made}, indent=2).encode() + b"\n")


def _check_same(output: str, known: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    differing = [name for name, value in identity.items() if known.get(name) != value]
    if differing:
        named = "; ".join(f"{name} was {known.get(name)!r} and is {identity[name]!r}" for name in differing)
        raise SettingsError(
            f"{output}: holds embeddings made with other settings: {named}; choose another output"
        )

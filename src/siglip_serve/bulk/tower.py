"""Towers of a worker: one batch of pixels and token ids becomes embeddings and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from siglip_serve.bulk.job import Job, Labels
from siglip_serve.checkpoint.model_config import ModelConfig, NaflexImageConfig
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.embeddings import zero_shot
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import CheckpointError, SettingsError
from siglip_serve.images.patches import grid_of

if TYPE_CHECKING:
    from siglip_serve.engine.engines import TextEngine

__all__ = ["LabelScorer", "Towers"]

_PASSES = 8  # of a batch on a GPU, so that little time is lost between two batches


class Towers:
    """The towers that a job needs, on one device.

    Args:
        job: to be run.
        config: of its checkpoint.
        device: `cpu` or `cuda:<index>`.
        cores: for a tower on the CPU, unless the settings give a number of threads.

    Attributes:
        batch_rows: rows of a batch. Every batch of a unit but the last has as many, so that results do not
            depend on what else is computed.
        dtype: arithmetic of the image tower.

    Raises:
        CheckpointError, SettingsError: the checkpoint cannot be run like this.
    """

    def __init__(self, job: Job, config: ModelConfig, device: str, cores: int) -> None:
        from siglip_serve.engine.engines import open_text, open_vision

        plan = replace(Plan.of(job.settings, device, cores), heatmap_blocks=0)
        self._config = config
        self._vision = open_vision(config, plan)
        self._text: TextEngine | None = None
        if job.columns.text or job.labels.names:
            if config.vision_only:
                raise CheckpointError(f"checkpoint {job.settings.checkpoint!r}: has no text tower")
            self._text = open_text(config, plan)
        self.dtype = self._vision.plan.dtype
        most = self._vision.runner.max_rows
        self.batch_rows = most * (1 if device == "cpu" else _PASSES)
        self.labels = self._scorer(job.labels) if job.labels.names else None

    def embed_images(
        self, pixels: NDArray[np.uint8], sizes: Sequence[tuple[int, int]]
    ) -> NDArray[np.float32]:
        """Embeddings [n, D] float32, not normalised.

        Args:
            pixels: as of `Preprocessor`, [n, ...].
            sizes: height and width of each picture, (0, 0) where there is none.

        Raises:
            DeviceMemoryError: not even one row fits into the device's memory.
        """
        if isinstance(self._config.image, NaflexImageConfig):
            from siglip_serve.engine.patches import PatchRows

            grids = [grid_of(self._config, *size) if all(size) else (1, 1) for size in sizes]
            batch = self._vision(PatchRows(pixels, np.array(grids, dtype=np.int64)))  # type: ignore[arg-type]
        else:
            batch = self._vision(pixels)  # type: ignore[arg-type]
        return batch.rows(0, len(pixels))["EMBEDDING"]

    def embed_ids(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings [n, D] float32 of token ids [n, T], not normalised.

        Raises:
            DeviceMemoryError: as for `embed_images`.
        """
        if self._text is None:
            raise SettingsError("the job has no texts")
        return self._text(ids).rows(0, len(ids))["EMBEDDING"]

    def _scorer(self, labels: Labels) -> LabelScorer:
        from siglip_serve.texts.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self._config)
        ids = np.stack([tokenizer(labels.template.replace("{}", name)) for name in labels.names])
        scale, bias = load_scale(self._config.path)
        return LabelScorer(labels, self.embed_ids(ids).astype(np.float64), scale, bias)


@dataclass(frozen=True)
class LabelScorer:
    """Compares embeddings with labels.

    Attributes:
        labels: their names.
        prompts: embeddings of the labels in their template, [L, D] float64.
        scale, bias: of the checkpoint; without a bias the labels of a picture compete.
    """

    labels: Labels
    prompts: NDArray[np.float64]
    scale: float
    bias: float | None

    def __call__(self, embeddings: NDArray[np.float32]) -> list[tuple[list[str], NDArray[np.float32]]]:
        """The likeliest labels of each embedding of [n, D], best first, and their probabilities."""
        cosines = zero_shot.cosine(embeddings.astype(np.float64), self.prompts)
        logits = zero_shot.logits(cosines, self.scale, self.bias or 0.0)
        scores = (zero_shot.softmax if self.bias is None else zero_shot.sigmoid)(logits)
        best = zero_shot.top_k(logits, min(self.labels.top, len(self.labels.names)))
        names = self.labels.names
        return [
            ([names[column] for column in row], scores[number, row].astype(np.float32))
            for number, row in enumerate(best)
        ]

"""Count refusals, images and tower passes for the metrics endpoint, where Triton has no figures.

Triton counts a request that a model refused as a success, and knows nothing of images or passes.
"""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from siglip_serve.errors import (
    ImageError,
    ImageTooLargeError,
    InvalidInputError,
    ParameterError,
    StateError,
    TextError,
    UnavailableError,
)

__all__ = ["ImageCounter", "RefusalCounter", "TowerCounter"]

_SECONDS = [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096]
_ROWS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0]
# The first that an error is an instance of.
_REASONS = (
    (ImageTooLargeError, "image_too_large"),
    (ImageError, "image"),
    (TextError, "text"),
    (StateError, "state"),
    (ParameterError, "parameter"),
    (InvalidInputError, "input"),
    (UnavailableError, "unavailable"),
    (MemoryError, "unavailable"),
)


class _Family:
    """One metric of this model. Triton joins those of all model processes under the family's name."""

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._family = pb_utils.MetricFamily(
            name=f"siglip_serve_{name}",
            description=description,
            kind=getattr(pb_utils.MetricFamily, kind),
        )

    def metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Any:
        """Make a metric, which must not outlive the family."""
        more = {"buckets": buckets} if buckets else {}
        return self._family.Metric(labels=labels, **more)


class RefusalCounter:
    """`rejected_total`: requests that were answered with an error, by reason."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._family = _Family("rejected_total", "Requests answered with an error", "COUNTER")
        self._metrics: dict[str, Any] = {}

    def add(self, error: Exception) -> None:
        """Count one more."""
        reason = next((name for kind, name in _REASONS if isinstance(error, kind)), "internal")
        if reason not in self._metrics:
            self._metrics[reason] = self._family.metric({"model": self._model, "reason": reason})
        self._metrics[reason].increment(1)


class ImageCounter:
    """`images_total` and `decode_seconds`: what a model that decodes has read, and in which time."""

    def __init__(self, model: str) -> None:
        labels = {"model": model}
        self._families = (
            _Family("images_total", "Images that were decoded and scaled", "COUNTER"),
            _Family("decode_seconds", "Time to decode requests that were taken together", "HISTOGRAM"),
        )
        images, seconds = self._families
        self._images = images.metric(labels)
        self._seconds = seconds.metric(labels, _SECONDS)

    def add(self, images: int, seconds: float) -> None:
        """Count the images of requests that were taken together."""
        self._images.increment(images)
        self._seconds.observe(seconds)


class TowerCounter:
    """`tower_rows_total`, `batch_rows` and `compute_seconds` of a tower, without rows from a cache."""

    def __init__(self, model: str) -> None:
        labels = {"model": model}
        self._families = (
            _Family("tower_rows_total", "Rows that a tower has computed", "COUNTER"),
            _Family("batch_rows", "Rows of the requests that a tower computed together", "HISTOGRAM"),
            _Family("compute_seconds", "Time of a tower for the rows it computed together", "HISTOGRAM"),
        )
        total, rows, seconds = self._families
        self._total = total.metric(labels)
        self._rows = rows.metric(labels, _ROWS)
        self._seconds = seconds.metric(labels, _SECONDS)

    def add(self, rows: int, seconds: float) -> None:
        """Count the rows of one batch."""
        self._total.increment(rows)
        self._rows.observe(rows)
        self._seconds.observe(seconds)

"""Runners, the batches that they compute pass by pass, and devices that run out of memory.

Nothing here imports torch. A process that has not imported it has no GPU either.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from siglip_serve.engine.patches import PatchRows
from siglip_serve.errors import DeviceMemoryError

if TYPE_CHECKING:
    from torch import Tensor

    from siglip_serve.heatmaps.attribution import Explanation

__all__ = [
    "OUTPUTS",
    "Arrays",
    "Batch",
    "Finish",
    "NaflexRunner",
    "Runner",
    "VisionRunner",
    "end_if_lost",
    "in_passes",
    "is_out_of_memory",
    "out_of_memory_refused",
]

OUTPUTS = ("EMBEDDING", "MEAN_EMBEDDING", "PATCH_EMBEDDINGS")

_SECONDS_TO_ANSWER = 0.5

Arrays = dict[str, NDArray[np.float32]]
Finish = Callable[[], Arrays]
Rows = TypeVar("Rows", NDArray[Any], PatchRows)


class Runner(Protocol):
    """One way to run a tower on one device.

    Attributes:
        max_rows: most rows of one call. More rows at once would gain nothing.
    """

    max_rows: int

    def __call__(self, rows: NDArray[Any], /, wanted: Sequence[str]) -> Finish:
        """Start a pass.

        Args:
            rows: uint8 pixels [n, S, S, 3] or int64 ids [n, T], 1 <= n <= `max_rows`.
            wanted: which of `OUTPUTS` to compute. A text tower has only EMBEDDING.

        Returns:
            A function that waits for the pass and returns the wanted outputs [n, ...], float32.

        Raises:
            RuntimeError: the device failed. See `is_out_of_memory`.
        """


class VisionRunner(Runner, Protocol):
    """One way to run a vision tower on one device."""

    def explain(self, explainer: Any, pixels: NDArray[np.uint8], vectors: Tensor) -> Explanation[Tensor]:
        """Explain the embedding of one image.

        Args:
            explainer: made for this tower. See `heatmaps.attribution.explainer_of`.
            pixels: [1, S, S, 3] RGB.
            vectors: [P, E] float32 on the CPU.

        Returns:
            Tensors of one image on the device of the tower. The next call may overwrite them.
        """


class NaflexRunner(Protocol):
    """One way to run a NaFlex vision tower on one device.

    Attributes:
        max_rows: most rows of one call.
        grouped: images of one call should have about as many patches, and no more padding than they need.
    """

    max_rows: int
    grouped: bool

    def __call__(self, rows: PatchRows, /, wanted: Sequence[str]) -> Finish:
        """Start a pass over 1 to `max_rows` images. See `Runner`; PATCH_EMBEDDINGS end with zeros."""

    def explain(self, explainer: Any, rows: PatchRows, vectors: Tensor) -> Explanation[Tensor]:
        """Explain the embedding of one image without padding. See `VisionRunner`."""


@dataclass(frozen=True)
class Batch:
    """Outputs of N rows, some of which may have failed for lack of memory.

    Attributes:
        outputs: float32 arrays [N, ...] by output name, zeros where one failed. Empty if all failed.
        failed: [N] bool.
    """

    outputs: Arrays
    failed: NDArray[np.bool_]

    @cached_property
    def any_failed(self) -> bool:
        """True if at least one row failed."""
        return bool(self.failed.any())

    def rows(self, start: int, end: int) -> Arrays:
        """Return views of the outputs of rows `start` to `end`, without the latter.

        Raises:
            DeviceMemoryError: one of these rows did not fit into the device's memory.
        """
        # Called once per request: a look at the rows themselves would cost more than the views.
        if self.any_failed and self.failed[start:end].any():
            raise DeviceMemoryError("the device has not enough free memory for even one row; try again later")
        return {name: array[start:end] for name, array in self.outputs.items()}


def in_passes(rows: Rows, max_rows: int, start: Callable[[Rows], Finish]) -> Batch:
    """Compute all rows pass by pass. A pass that runs out of memory is tried again with half its rows.

    Each pass is started before the previous one is waited for, so that its rows are copied to the device
    meanwhile.

    Args:
        rows: an array [N, ...] or patches of N images, at least one.
        max_rows: most rows of one pass.
        start: starts a pass over some of the rows. See `Runner`.

    Raises:
        RuntimeError: the device failed for another reason than its memory.
    """
    done = _Done(len(rows))
    running: tuple[int, Finish] | None = None
    first, size = 0, max_rows
    while first < len(rows):
        part = rows[first : first + size]
        started = None
        try:
            started = first, start(part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                end_if_lost()
                raise
            _empty_cache()
            if running:  # first get back the memory of the pass under way
                done.add(*running)
                running = None
                continue
            if len(part) > 1:
                size = (len(part) + 1) // 2
                continue
            done.failed[first] = True
        if running:
            done.add(*running)
        running = started
        first += len(part)
    if running:
        done.add(*running)
    return Batch(done.outputs, done.failed)


class _Done:
    """Outputs of the passes so far, in arrays of all rows."""

    def __init__(self, rows: int) -> None:
        self.outputs: Arrays = {}
        self.failed = np.zeros(rows, dtype=np.bool_)

    def add(self, first: int, finish: Finish) -> None:
        """Wait for the pass that began with row `first` and keep its outputs, while the next one computes."""
        try:
            arrays = finish()
        except RuntimeError:
            end_if_lost()
            raise
        for name, array in arrays.items():
            if len(array) == len(self.failed):  # all rows are one pass
                self.outputs[name] = array
                continue
            if name not in self.outputs:
                self.outputs[name] = np.zeros((len(self.failed), *array.shape[1:]), dtype=np.float32)
            self.outputs[name][first : first + len(array)] = array


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if a smaller pass, or a later one, may succeed."""
    text = str(error)  # OpenVINO, cuBLAS and the driver's pinned memory have no error class of their own
    torch = sys.modules.get("torch")
    named = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return named or "ALLOC_FAILED" in text or "out of memory" in text


@contextmanager
def out_of_memory_refused(what: str) -> Iterator[None]:
    """Turn a lack of memory in the body of a `with` statement into an error that names its cause.

    Args:
        what: the cause, such as `5 prompts`.

    Raises:
        DeviceMemoryError: the device had no memory left.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            _empty_cache()
            raise DeviceMemoryError(
                f"the device has not enough free memory for {what}; try again later, or with less"
            ) from error
        end_if_lost()
        raise


def end_if_lost() -> None:
    """End the process half a second later if the GPU's context is lost, so that its last answers get out.

    After a fault inside a kernel every further call fails, and only a new process can serve. The launcher
    notices that the process has ended, and loads the model again.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        threading.Timer(_SECONDS_TO_ANSWER, os._exit, [1]).start()


def _empty_cache() -> None:
    """Let torch give the memory back that it keeps on GPUs."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.cuda.empty_cache()

"""Rows in passes that fit the device's memory, and what is left when it runs out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.errors import DeviceMemoryError
from siglip_serve.heatmaps.attribution import Explanation

__all__ = [
    "OUTPUTS",
    "Arrays",
    "Batch",
    "Finish",
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


class Runner(Protocol):
    """One way to run a tower on one device.

    Attributes:
        max_rows: most rows of one call; beyond these a pass gains nothing.
    """

    max_rows: int

    def __call__(self, rows: NDArray[Any], /, wanted: Sequence[str]) -> Finish:
        """Start a pass of 1 to `max_rows` rows; what is returned waits for it and gives the wanted `OUTPUTS`.

        A text tower has only EMBEDDING.
        """


class VisionRunner(Runner, Protocol):
    """One way to run a vision tower on one device."""

    def explain(self, explainer: Any, pixels: NDArray[np.uint8], vectors: Tensor) -> Explanation:
        """What `explainer`, which was made for the tower, finds in pixels [1, S, S, 3] for vectors [P, E]."""


@dataclass(frozen=True)
class Batch:
    """Outputs of N rows, some of which may have failed for want of memory.

    Attributes:
        outputs: float32 arrays [N, ...] by output name.
        failed: [N] bool.
    """

    outputs: Arrays
    failed: NDArray[np.bool_]

    def rows(self, start: int, end: int) -> Arrays:
        """The outputs of rows start to end.

        Raises:
            DeviceMemoryError: one of them did not fit into the device's memory.
        """
        if self.failed[start:end].any():
            raise DeviceMemoryError("the device has not enough free memory for even one row; try again later")
        return {name: array[start:end] for name, array in self.outputs.items()}


def in_passes(rows: NDArray[Any], max_rows: int, start: Callable[[NDArray[Any]], Finish]) -> Batch:
    """`start` over all rows, at most `max_rows` at a time; a pass that runs out of memory is halved.

    A pass is started before the one before it is waited for, so that its rows are copied to the device
    while that one computes.
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
            torch.cuda.empty_cache()
            if running:  # its memory comes back first
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
    """What the passes over so many rows have given so far, as arrays of all rows."""

    def __init__(self, rows: int) -> None:
        self.outputs: Arrays = {}
        self.failed = np.zeros(rows, dtype=np.bool_)

    def add(self, first: int, finish: Finish) -> None:
        """Wait for the pass that began with row `first`; the next one computes while this one is kept."""
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
    """Whether a smaller pass, or a later one, may succeed."""
    text = str(error)  # of cuBLAS, and of memory that the driver pins, there is only the text
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in text or "out of memory" in text


@contextmanager
def out_of_memory_refused(what: str) -> Iterator[None]:
    """Turn a device that has no memory left into an error that says what for.

    Raises:
        DeviceMemoryError: there was no memory.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
            raise DeviceMemoryError(
                f"the device has not enough free memory for {what}; try again later, or with less"
            ) from error
        end_if_lost()
        raise


def end_if_lost() -> None:
    """End the process if the GPU's context is lost, once its last answers are out.

    After a fault inside a kernel every further call fails, and only a new process serves again; the
    launcher notices the death and loads the model again.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        threading.Timer(_SECONDS_TO_ANSWER, os._exit, [1]).start()

"""Computations on a GPU, recorded as CUDA graphs, and how rows get there and results come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.engine.buckets import BUCKETS
from siglip_serve.engine.fused import products
from siglip_serve.engine.passes import Arrays, Finish, is_out_of_memory

__all__ = ["Replays", "record"]

_Computed = TypeVar("_Computed")


class Replays:
    """Run a computation on a GPU, recorded for several numbers of rows.

    Args:
        compute: inputs on the device -> tensors with as many rows. It runs the same kernels every time.
        inputs: the most rows of one call, of the dtypes and shapes of all later ones.
        device: device of the computation. On the CPU rows are computed at once.
        graphs: record, which needs a CUDA device. Without, `compute` is called each time.

    Attributes:
        max_rows: most rows of one call. They are fewer than those of `inputs` if there is no memory for more.
    """

    def __init__(
        self,
        compute: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        device: torch.device,
        graphs: bool,
    ) -> None:
        self._compute, self._device = compute, device
        self._inputs = [rows.to(device) for rows in inputs]
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self.max_rows = len(inputs[0])
        if device.type == "cuda":
            # Two slots: one is filled while the rows of the other are computed.
            self._slots = [_Slot(inputs, device), _Slot(inputs, device)]
            self._copies, self._computed = torch.cuda.Stream(device), torch.cuda.Event()
        if graphs:
            self._record_all()

    def __call__(self, *inputs: NDArray[Any]) -> tuple[Tensor, ...]:
        """Compute n <= max_rows rows of each input.

        Returns:
            The computed tensors [n, ...] on the device. The next call overwrites them.
        """
        n = len(inputs[0])
        self._send([torch.from_numpy(rows) for rows in inputs])
        outputs = self.replay_of(n)()
        if self._device.type == "cuda":
            self._computed.record()
        return tuple(output[:n] for output in outputs)

    def replay_of(self, n: int) -> Callable[[], tuple[Tensor, ...]]:
        """Return the function that computes the first n rows of the inputs, rounded up to a recorded size."""
        if not self._recorded:
            return lambda: self._compute(*_first(self._inputs, n))
        graph, outputs = self._recorded[min(size for size in self._recorded if size >= n)]

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay

    def fetch(self, tensors: dict[str, Tensor]) -> Finish:
        """Start to copy tensors to the host as float32. The returned function waits for them."""
        if self._device.type != "cuda":
            arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            return lambda: arrays
        hosts = {}
        for name, tensor in tensors.items():
            hosts[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
            hosts[name].copy_(tensor.float(), non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def finish() -> Arrays:
            done.synchronize()
            return {name: host.numpy() for name, host in hosts.items()}

        return finish

    def _send(self, rows: Sequence[Tensor]) -> None:
        """Copy rows into the inputs, on a stream of their own while the previous call computes."""
        n = len(rows[0])
        if self._device.type != "cuda":
            _copy(rows, self._inputs)
            return
        slot = self._slots[0]
        self._slots.reverse()
        slot.copied.synchronize()
        rows = [
            source if source.is_pinned() else host[:n].copy_(source)
            for source, host in zip(rows, slot.host, strict=True)
        ]
        compute = torch.cuda.current_stream(self._device)
        if self._computed.query():  # nothing to overlap with, so fewer calls count more
            _copy(rows, self._inputs)
            slot.copied.record(compute)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.read)
            _copy(rows, slot.device)
            slot.copied.record()
        compute.wait_event(slot.copied)
        _copy(_first(slot.device, n), self._inputs)
        slot.read.record(compute)

    @torch.inference_mode()
    def _record_all(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        sizes = {size for size in BUCKETS if size < self.max_rows} | {self.max_rows}
        for rows in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            try:
                self._recorded[rows] = record(partial(self._compute, *_first(self._inputs, rows)), pool)
            except RuntimeError as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
        self.max_rows = max(self._recorded)


class _Slot:
    """Buffers in which rows wait on their way to the device."""

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        # Copies from pageable memory go through a buffer of the driver's and block the caller.
        self.host = [rows.pin_memory() for rows in inputs]
        self.device = [rows.to(device) for rows in self.host]
        self.copied, self.read = torch.cuda.Event(), torch.cuda.Event()


def _first(tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    return [tensor[:rows] for tensor in tensors]


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Start to copy sources into the first rows of targets."""
    for source, target in zip(sources, targets, strict=True):
        target[: len(source)].copy_(source, non_blocking=True)


def record(compute: Callable[[], _Computed], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, _Computed]:
    """Record a computation as a CUDA graph.

    Args:
        compute: runs the same kernels on the same memory every time.
        pool: memory pool of another graph to share, from `torch.cuda.graph_pool_handle`.

    Returns:
        The graph, and what `compute` returned. Each replay writes its tensors anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # This compiles, allocates and chooses, which a recording must not.
    with torch.cuda.stream(stream), products.tried():
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = compute()
    return graph, outputs

"""Computations on a GPU, recorded as CUDA graphs, and how rows get there and results come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.engine.buckets import BUCKETS
from siglip_serve.engine.passes import Arrays, Finish, is_out_of_memory

__all__ = ["Replays", "record"]

_Computed = TypeVar("_Computed")


class Replays:
    """Run a computation on a GPU, recorded for several numbers of rows.

    Args:
        compute: rows on the device -> tensors with as many rows. It runs the same kernels every time.
        rows: the most rows of one call, of the dtype and shape of all later ones.
        device: device of the computation. On the CPU rows are computed at once.
        graphs: record, which needs a CUDA device. Without, `compute` is called each time.

    Attributes:
        max_rows: most rows of one call. They are fewer than `rows` if there is no memory for more.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], tuple[Tensor, ...]],
        rows: Tensor,
        device: torch.device,
        graphs: bool,
    ) -> None:
        self._compute, self._device = compute, device
        self._input = rows.to(device)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self.max_rows = len(rows)
        if device.type == "cuda":
            # Two slots: one is filled while the rows of the other are computed.
            self._slots = [_Slot(rows, device), _Slot(rows, device)]
            self._copies = torch.cuda.Stream(device)
        if graphs:
            self._record_all()

    def __call__(self, rows: NDArray[Any]) -> tuple[Tensor, ...]:
        """Compute n <= max_rows rows.

        Returns:
            The computed tensors [n, ...] on the device. The next call overwrites them.
        """
        n = len(rows)
        self._send(rows)
        return tuple(output[:n] for output in self.replay_of(n)())

    def replay_of(self, n: int) -> Callable[[], tuple[Tensor, ...]]:
        """Return the function that computes the first n rows of the input, rounded up to a recorded size."""
        if not self._recorded:
            return lambda: self._compute(self._input[:n])
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

    def _send(self, rows: NDArray[Any]) -> None:
        """Copy rows into the input. A full batch uses its own stream while the previous call computes."""
        n, source = len(rows), torch.from_numpy(rows)
        if self._device.type != "cuda":
            self._input[:n].copy_(source)
            return
        slot = self._slots[0]
        self._slots.reverse()
        slot.copied.synchronize()
        if not source.is_pinned():
            source = slot.host[:n].copy_(source)
        compute = torch.cuda.current_stream(self._device)
        if n < self.max_rows:  # usually the only pass: fewer calls count more than overlap
            self._input[:n].copy_(source, non_blocking=True)
            slot.copied.record(compute)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.read)
            slot.device[:n].copy_(source, non_blocking=True)
            slot.copied.record()
        compute.wait_event(slot.copied)
        self._input[:n].copy_(slot.device[:n])
        slot.read.record(compute)

    @torch.inference_mode()
    def _record_all(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        sizes = {size for size in BUCKETS if size < self.max_rows} | {self.max_rows}
        for rows in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            try:
                self._recorded[rows] = record(partial(self._compute, self._input[:rows]), pool)
            except RuntimeError as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
        self.max_rows = max(self._recorded)


class _Slot:
    """Buffers in which rows wait on their way to the device."""

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        # Copies from pageable memory go through a buffer of the driver's and block the caller.
        self.host = rows.pin_memory()
        self.device = self.host.to(device)
        self.copied, self.read = torch.cuda.Event(), torch.cuda.Event()


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
    with torch.cuda.stream(stream):  # compiles, allocates and chooses, which a recording must not
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = compute()
    return graph, outputs

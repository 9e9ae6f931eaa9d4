"""Processes that decode pictures for one worker. One that dies is replaced, and its task is tried again."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from siglip_serve.bulk import decoder
from siglip_serve.bulk.child import start_child
from siglip_serve.bulk.decoder import Decoded, Setup, Task, map_slots
from siglip_serve.errors import ServerStartError

__all__ = ["Decoders"]

_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_ATTEMPTS = 3  # of a task whose process dies
_START_SECONDS = 300.0  # a machine may be busy
_PATIENCE = 30.0  # seconds for a task, in addition to those that its pictures may take, several times over


class Decoders:
    """Decodes tasks in several processes.

    Args:
        count: of processes.
        setup: for each of them.

    Attributes:
        slots: the shared memory, uint8 [slots, rows, ...].
        seconds: that the processes have been busy, in all.
        restarts: processes that had to be replaced.

    Raises:
        ServerStartError: a process does not start.
    """

    def __init__(self, count: int, setup: Setup) -> None:
        self._setup, self.count = setup, count
        self._memory = os.memfd_create("siglip-serve-bulk")
        os.ftruncate(self._memory, int(np.prod(setup.shape, dtype=np.int64)))
        self.slots: NDArray[np.uint8] = map_slots(self._memory, setup.shape)
        self._pinned = setup.device != "cpu" and _pin(self.slots)
        self.seconds, self.restarts = 0.0, 0
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[tuple[Task, Callable[[Sequence[Decoded]], None]] | None]
        self._tasks = queue.SimpleQueue()
        self._processes = [_Process(self._memory, setup) for _ in range(count)]
        for process in self._processes:
            process.wait_ready()
        self._threads = [
            threading.Thread(target=self._run, args=(process,), daemon=True) for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task, done: Callable[[Sequence[Decoded]], None]) -> None:
        """Decode a task. `done` is called with its results in another thread."""
        self._tasks.put((task, done))

    def close(self) -> None:
        """End the processes when they have no more tasks."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        if self._pinned:
            _unpin(self.slots)
        self.slots = np.empty(0, np.uint8)
        os.close(self._memory)

    def _run(self, process: _Process) -> None:
        while (got := self._tasks.get()) is not None:
            task, done = got
            begin = time.perf_counter()
            results, process = self._decode(process, task)
            with self._lock:
                self.seconds += time.perf_counter() - begin
            done(results)
        process.end()

    def _decode(self, process: _Process, task: Task) -> tuple[Sequence[Decoded], _Process]:
        """The results of a task, and the process that works now."""
        for _ in range(_ATTEMPTS):
            found = process.ask(task)
            if found is not None:
                return found, process
            process.end()
            with self._lock:
                self.restarts += 1
            process = _Process(self._memory, self._setup)
            process.wait_ready()
        if len(task.files) == 1:
            return [Decoded(error=f"broken picture: its decoder crashed {_ATTEMPTS} times")], process
        results: list[Decoded] = []
        for number, file in enumerate(task.files):  # one of them is at fault
            alone = replace(
                task, first=task.first + number, files=[file], texts=task.texts[number : number + 1]
            )
            found, process = self._decode(process, alone)
            results += found
        return results, process


def _pin(memory: NDArray[np.uint8]) -> bool:
    """Let the GPU read memory directly, which saves a copy. False if the system has not as much to pin."""
    import torch

    return int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0


def _unpin(memory: NDArray[np.uint8]) -> None:
    import torch

    torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)


class _Process:
    def __init__(self, memory: int, setup: Setup) -> None:
        self._seconds = 4 * setup.limits.max_seconds
        self._process, self._channel = start_child(decoder.__name__, [memory], _ONE_THREAD)
        with suppress(OSError):
            self._channel.send(setup)

    def wait_ready(self) -> None:
        """Wait until the process has loaded what it needs.

        Raises:
            ServerStartError: it has ended, or takes too long.
        """
        with suppress(EOFError, OSError):
            if self._channel.poll(_START_SECONDS) and self._channel.recv() == "ready":
                return
        self.end()
        raise ServerStartError("a process that decodes pictures did not start; its reason stands above")

    def ask(self, task: Task) -> Sequence[Decoded] | None:
        """The results of a task, or None if the process has died or does not answer."""
        with suppress(EOFError, OSError):
            self._channel.send(task)
            if self._channel.poll(_PATIENCE + self._seconds * len(task.files)):
                found: Sequence[Decoded] = self._channel.recv()
                return found
        return None

    def end(self) -> None:
        """Kill the process and wait until it is gone."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

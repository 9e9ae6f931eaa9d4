"""Work of one device: units are read, decoded, embedded and written, all at the same time.

Two threads read units and fill batches, processes decode them, the calling thread runs the towers, and one
more thread writes the results. A batch holds consecutive pictures of one unit. Its rows do not move when a
picture fails, so results do not depend on the order in which anything happens.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.bulk.decoder import Decoded, Setup, Task
from siglip_serve.bulk.decoders import Decoders
from siglip_serve.bulk.items import Item, read_items
from siglip_serve.bulk.job import Job
from siglip_serve.bulk.outputs import Rows, write_unit
from siglip_serve.bulk.storage import Folder
from siglip_serve.bulk.tower import Towers
from siglip_serve.bulk.units import Unit
from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.errors import SiglipServeError
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.scaled import check_numba
from siglip_serve.machine import available_cores

__all__ = ["STAGES", "Finished", "Worker", "end_with_any_thread"]

STAGES = ("read", "decode", "embed", "write")

_READERS = 2
_TASK_ROWS = 16  # pictures that one process decodes at a time
_TASK_ROWS_GPU = 64
_NOT_DECODED = Decoded(error="not decoded")


@dataclass(frozen=True)
class Finished:
    """Outcome of a unit.

    Attributes:
        unit: its name.
        rows: pictures with an embedding.
        failed: pictures without.
        error: the reason if the unit as a whole could not be done; it is then not finished.
    """

    unit: str
    rows: int = 0
    failed: int = 0
    error: str = ""


@dataclass
class _Batch:
    """Consecutive pictures of a unit, in one slot of the shared memory."""

    work: _Work
    slot: int
    items: list[Item] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    embeddings: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    text_embeddings: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    ready: threading.Event = field(default_factory=threading.Event)
    waiting: int = 1  # tasks under way, and one for the reader itself
    lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self) -> None:
        """Note the end of a task, or of the reading."""
        with self.lock:
            self.waiting -= 1
            if not self.waiting:
                self.ready.set()


@dataclass
class _Work:
    """A unit under way."""

    unit: Unit
    rows: Rows = field(default_factory=Rows)
    error: str = ""


def end_with_any_thread() -> None:
    """Have this process end when one of its threads fails. The others would wait for that thread forever."""

    def end(failure: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(failure)
        os._exit(1)

    threading.excepthook = end


class Worker:
    """Embeds units on one device.

    Args:
        job: to be run.
        config: of its checkpoint.
        device: `cpu` or `cuda:<index>`.
        decoders: processes that decode. 0 fits them to the machine.
        cores: that this worker may use. 0 means all of the machine.

    Attributes:
        description: of the device and its arithmetic, for people.

    Raises:
        SiglipServeError: the checkpoint cannot be run like this.
    """

    def __init__(self, job: Job, config: ModelConfig, device: str, decoders: int = 0, cores: int = 0) -> None:
        self._job, self._config, self._folder = job, config, Folder(job.output)
        cores = cores or available_cores()
        self._towers = Towers(job, config, device, cores)
        self._width = tensor_dims(config)["EMBEDDING"][0]
        if job.settings.preprocess == "scaled":
            check_numba()
        on_gpu = job.settings.preprocess == "gpu"
        self._task_rows = _TASK_ROWS_GPU if on_gpu else min(_TASK_ROWS, self._towers.batch_rows)
        count = decoders or (min(4, cores) if on_gpu else _decoders(device, cores))
        rows = self._towers.batch_rows
        slots = _READERS + 2 + -(-count * self._task_rows // rows)
        shape = (slots, rows, *tensor_dims(config)["PIXEL_VALUES"])
        setup = Setup(
            config,
            job.settings.preprocess,
            device,
            job.settings.color,
            ImageLimits.of(job.settings),
            shape,
            bool(job.columns.text),
        )
        self._decoders = Decoders(count, setup)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._units: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[_Batch | _Work | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Batch | _Work | None] = queue.SimpleQueue()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._pictures = 0
        self.description = f"{device}, {self._towers.dtype}, {count} decoders"

    def add(self, unit: Unit | None) -> None:
        """Queue a unit. None is the end: `run` returns when everything before is done."""
        self._units.put(unit)

    def usage(self) -> dict[str, float]:
        """Pictures so far, seconds since the start, and the part of them that each stage was busy, 0 to 1."""
        elapsed = max(1e-9, time.perf_counter() - self._begin)
        busy = {**self._seconds, "decode": self._decoders.seconds / self._decoders.count}
        busy["read"] /= _READERS
        return {
            "pictures": self._pictures,
            "seconds": elapsed,
            **{name: busy[name] / elapsed for name in STAGES},
        }

    def run(self, report: Callable[[Finished], None]) -> None:
        """Do all units.

        Args:
            report: called with the outcome of each, in another thread.
        """
        self._begin = time.perf_counter()
        readers = [threading.Thread(target=self._read_units, daemon=True) for _ in range(_READERS)]
        writer = threading.Thread(target=self._write_units, args=(report,), daemon=True)
        for thread in (*readers, writer):
            thread.start()
        open_readers = _READERS
        while open_readers:
            got = self._batches.get()
            if got is None:
                open_readers -= 1
            elif isinstance(got, _Work):
                self._done.put(got)
            else:
                self._embed(got)
        self._done.put(None)
        writer.join()
        self._decoders.close()

    def _read_units(self) -> None:
        while (unit := self._units.get()) is not None:
            work = _Work(unit)
            begin, self_waited = time.perf_counter(), 0.0
            try:
                self_waited = self._read(work)
            except (OSError, ValueError, LookupError, RuntimeError, SiglipServeError) as error:
                work.error = f"{unit.source}: {error}"
            self._seconds["read"] += time.perf_counter() - begin - self_waited
            self._batches.put(work)  # after its last batch
        self._units.put(None)  # for the other readers
        self._batches.put(None)

    def _read(self, work: _Work) -> float:
        """Fill batches with a unit's pictures. Returns the seconds that it waited for free memory."""
        waited = 0.0
        batch: _Batch | None = None
        pending: list[Item] = []
        try:
            for item in read_items(work.unit, self._job.columns, self._job.inputs):
                if batch is None:
                    begin = time.perf_counter()
                    batch = _Batch(work, self._free.get())
                    waited += time.perf_counter() - begin
                batch.items.append(item)
                pending.append(item)
                full = len(batch.items) == self._towers.batch_rows
                if len(pending) == self._task_rows or full:
                    self._submit(batch, pending)
                    pending = []
                if full:
                    self._batches.put(batch)
                    batch.settle()
                    batch = None
        finally:
            if batch is not None:
                if pending:
                    self._submit(batch, pending)
                self._batches.put(batch)
                batch.settle()
        return waited

    def _submit(self, batch: _Batch, items: Sequence[Item]) -> None:
        """Have the last pictures of a batch decoded."""
        first = len(batch.items) - len(items)
        batch.decoded += [_NOT_DECODED] * len(items)
        with batch.lock:
            batch.waiting += 1
        text = self._job.columns.text
        texts = [item.values.get(text) for item in items] if text else []

        def done(results: Sequence[Decoded]) -> None:
            batch.decoded[first : first + len(results)] = results
            batch.settle()

        self._decoders.submit(Task(batch.slot, first, [item.data for item in items], texts), done)

    def _embed(self, batch: _Batch) -> None:
        """Run the towers over a batch, and pass the results on to the thread that writes."""
        batch.ready.wait()
        begin = time.perf_counter()
        try:
            if not batch.work.error:
                self._run_towers(batch)
        except SiglipServeError as error:
            batch.work.error = str(error)
        finally:
            self._free.put(batch.slot)
        self._pictures += len(batch.items)
        self._seconds["embed"] += time.perf_counter() - begin
        self._done.put(batch)

    def _run_towers(self, batch: _Batch) -> None:
        if all(found.error for found in batch.decoded):
            return
        pixels = self._decoders.slots[batch.slot, : len(batch.items)]
        batch.embeddings = self._towers.embed_images(pixels, [found.size for found in batch.decoded])
        if self._job.columns.text:
            ids = np.zeros((len(batch.items), *tensor_dims(self._config)["INPUT_IDS"]), dtype=np.int64)
            for number, found in enumerate(batch.decoded):
                if found.ids is not None:
                    ids[number] = found.ids
            batch.text_embeddings = self._towers.embed_ids(ids)

    def _keep(self, batch: _Batch) -> None:
        """Add a batch to the rows of its unit."""
        rows, decoded = batch.work.rows, batch.decoded
        reasons = [item.error or found.error for item, found in zip(batch.items, decoded, strict=True)]
        good = [number for number, reason in enumerate(reasons) if not reason]
        rows.failed += [
            (item.key, reason) for item, reason in zip(batch.items, reasons, strict=True) if reason
        ]
        if not good:
            return
        embeddings = batch.embeddings[good]
        rows.embeddings.append(embeddings)
        self._keep_columns(
            rows, [batch.items[number] for number in good], [decoded[number] for number in good]
        )
        if self._job.columns.text:
            rows.text_embeddings.append(batch.text_embeddings[good])
            rows.no_text += [decoded[number].ids is None for number in good]
        if self._towers.labels is not None:
            for names, probabilities in self._towers.labels(embeddings):
                rows.columns.setdefault("labels", []).append(names)
                rows.columns.setdefault("probabilities", []).append(probabilities)

    def _keep_columns(self, rows: Rows, items: Sequence[Item], decoded: Sequence[Decoded]) -> None:
        columns: dict[str, list[Any]] = {
            "id": [item.key for item in items],
            "path": [item.path for item in items],
            "sha256": [found.sha256 for found in decoded],
            "size": [found.bytes for found in decoded],
            "height": [found.size[0] for found in decoded],
            "width": [found.size[1] for found in decoded],
        }
        columns |= {name: [item.values.get(name) for item in items] for name in self._job.columns.all_kept}
        for name, values in columns.items():
            rows.columns.setdefault(name, []).extend(values)

    def _write_units(self, report: Callable[[Finished], None]) -> None:
        while (work := self._done.get()) is not None:
            if isinstance(work, _Batch):
                if not work.work.error:
                    self._keep(work)
                continue
            begin = time.perf_counter()
            if not work.error:
                try:
                    write_unit(self._folder, self._job, work.unit.name, work.rows, self._width)
                except (OSError, ValueError, RuntimeError) as error:  # also of pyarrow and Lance
                    work.error = f"{self._folder.path}: {error}"
            self._seconds["write"] += time.perf_counter() - begin
            name = work.unit.name
            if work.error:
                report(Finished(name, error=work.error))
            else:
                report(Finished(name, len(work.rows), len(work.rows.failed)))


def _decoders(device: str, cores: int) -> int:
    """Processes that decode: on a CPU the towers need the cores, on a GPU only decoding does."""
    return max(1, cores // 4) if device == "cpu" else max(1, cores - 1)

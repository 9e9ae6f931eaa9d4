"""Deaths and interruptions of a job: nothing is lost, nothing is done twice, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from bulk_inputs import BROKEN, small_jpeg, write_tar
from bulk_jobs import bulk, bulk_words, snapshot
from paths import TINY
from processes import still_running

from siglip_serve.bulk import decoders as decoders_module
from siglip_serve.bulk.decoder import Decoded, Setup, Task
from siglip_serve.bulk.decoders import Decoders, _Process
from siglip_serve.bulk.items import Columns
from siglip_serve.bulk.job import Job
from siglip_serve.bulk.units import Unit
from siglip_serve.bulk.worker import Finished, Worker
from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Settings
from siglip_serve.errors import ServerStartError
from siglip_serve.images.formats import ImageLimits

SHARDS = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        members = {f"{number}.jpg": small_jpeg(100 * shard + number) for number in range(24)}
        write_tar(folder / f"{shard}.tar", members)
    return folder


@contextmanager
def running(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A job, and the check that none of its processes outlives it."""
    job = subprocess.Popen(bulk_words(*words), stderr=subprocess.PIPE, text=True)
    below: set[psutil.Process] = set()
    try:
        yield job
        if job.poll() is None:
            below = set(psutil.Process(job.pid).children(recursive=True))
            job.send_signal(signal.SIGKILL)
    finally:
        job.kill()
        job.communicate(timeout=60)
    assert not still_running(below, timeout=20)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def finished(output: Path) -> int:
    return len(list(output.glob("embeddings/[!.]*.parquet")))


def whole_files(output: Path) -> dict[str, bytes]:
    """The files of embeddings, without what a killed writer has left aside."""
    return {name: data for name, data in snapshot(output / "embeddings").items() if not name.endswith(".tmp")}


def child(job: subprocess.Popen[str], words: str) -> psutil.Process | None:
    for one in psutil.Process(job.pid).children(recursive=True):
        try:
            if words in " ".join(one.cmdline()):
                return one
        except psutil.Error:
            continue
    return None


def test_a_job_survives_the_deaths_of_all_its_processes(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = (shards, "-o", output, "--max-rows", "8")
    with running(*words) as job:
        wait_for(lambda: finished(output) >= 1)
        decoder = child(job, "siglip_serve.bulk.decoder")
        assert decoder is not None
        decoder.kill()
        wait_for(lambda: finished(output) >= 2)
        worker = child(job, "siglip_serve.bulk.worker_process")
        assert worker is not None
        # Memory without a name: a death leaves nothing of it behind.
        assert any("memfd:siglip-serve-bulk" in mapped.path for mapped in worker.memory_maps())
        worker.kill()
        wait_for(lambda: finished(output) >= 4)
    before = whole_files(output)
    assert len(before) < SHARDS
    with running(*words) as job:  # Ctrl-C while it starts
        wait_for(lambda: child(job, "siglip_serve.bulk.worker_process"))
        below = psutil.Process(job.pid).children(recursive=True)
        for pid in (job.pid, *(one.pid for one in below)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)  # as a terminal does
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 130
        assert "interrupted; the same command resumes" in errors
        assert "Traceback" not in errors
        assert not still_running(below, timeout=20)
    ended = bulk(*words)
    assert ended.returncode == 0, ended.stderr
    after = whole_files(output)
    assert {name: after[name] for name in before} == before
    undisturbed = bulk(shards, "-o", tmp_path / "right", "--max-rows", "8")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert after == whole_files(tmp_path / "right")


def test_a_unit_that_cannot_be_written_is_lost_alone(shards: Path, tmp_path: Path) -> None:
    job = Job(Settings(checkpoint=str(TINY), dtype="float32", threads=1), str(tmp_path), device="cpu")
    worker = Worker(job, load_config(TINY), "cpu", cores=1)
    (tmp_path / "embeddings" / "first.parquet").mkdir(parents=True)
    units = [Unit("first", "tar", str(shards / "0.tar")), Unit("second", "tar", str(shards / "1.tar"))]
    units += [Unit("third", "tar", str(shards / "none.tar"))]
    for unit in (*units, None):
        worker.add(unit)
    outcomes: dict[str, Finished] = {}
    worker.run(lambda outcome: outcomes.update({outcome.unit: outcome}))
    assert "Is a directory" in outcomes["first"].error
    assert outcomes["second"] == Finished("second", 24)
    assert "No such file or directory" in outcomes["third"].error
    left = sorted(path.name for path in (tmp_path / "embeddings").iterdir())
    assert left == ["first.parquet", "second.parquet"]


@pytest.fixture
def setup() -> Setup:
    config = load_config(TINY)
    size = config.image.size
    return Setup(config, "fast", "cpu", "stored", ImageLimits(), (1, 4, size, size, 3), bool(Columns().text))


def test_pictures_are_decoded_again_when_their_process_ends(setup: Setup) -> None:
    decoders = Decoders(1, setup)
    answers: list[list[Decoded]] = []
    decoders._processes[0]._process.kill()
    files = [small_jpeg(1), BROKEN, small_jpeg(2)]
    decoders.submit(Task(0, 0, files), lambda results: answers.append(list(results)))
    wait_for(lambda: answers)
    assert [bool(result.error) for result in answers[0]] == [False, True, False]
    assert decoders.restarts == 1
    assert decoders.slots[0, 0].any()
    assert not decoders.slots[0, 1].any()
    decoders.close()


def test_a_decoder_that_hangs_is_replaced(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = Decoders(1, replace(setup, limits=ImageLimits(max_seconds=0.5)))
    hanging = decoders._processes[0]._process
    monkeypatch.setattr(decoders_module, "_PATIENCE", 1.0)
    hanging.send_signal(signal.SIGSTOP)
    answers: list[list[Decoded]] = []
    decoders.submit(Task(0, 0, [small_jpeg(1)]), lambda results: answers.append(list(results)))
    wait_for(lambda: answers)
    assert [result.error for result in answers[0]] == [""]
    assert decoders.restarts >= 1
    assert hanging.returncode == -signal.SIGKILL
    decoders.close()


def test_a_decoder_that_ends_while_it_starts_is_an_error(setup: Setup) -> None:
    memory = os.memfd_create("test")
    process = _Process(memory, setup)
    os.close(memory)
    process._process.kill()
    with pytest.raises(ServerStartError, match="did not start"):
        process.wait_ready()

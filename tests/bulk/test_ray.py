"""`--on ray`: the files are those of a run without Ray, and no process of the cluster stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from bulk_inputs import BROKEN, small_jpeg, write_tar
from bulk_jobs import bulk, bulk_words, snapshot
from processes import still_running

# The driver, with an actor that ends whenever it starts, and with one beside it that does its units.
PROGRAM = """
import logging, os, ray, time
from siglip_serve.bulk import on_ray
from siglip_serve.bulk.progress import Progress
from siglip_serve.bulk.units import Unit
from siglip_serve.bulk.worker import Finished
from siglip_serve.errors import ServerStartError

@ray.remote
class Ending:
    def ready(self): os._exit(1)

@ray.remote
class Working:
    def ready(self): return "a worker", ""
    def usage(self): return {}
    def do(self, unit):
        while not os.path.exists(unit.source):
            time.sleep(0.1)
        return Finished(unit.name)

class Told(Progress):
    def note(self, text):
        print(text, flush=True)
        if "go on without" in text:
            open("given up", "w").close()

on_ray._MOST_STARTS, on_ray._LEAST_PATIENCE = 3, 0.5
ray.init(num_cpus=2, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
ending = on_ray._Actor("cpu 0", Ending.options(max_restarts=-1).remote())
working = on_ray._Actor("cpu 1", Working.options(max_concurrency=4).remote())
units = [Unit("a", "listing", os.path.abspath("given up")), Unit("b", "listing", os.path.abspath("given up"))]
progress = Told(2, 0, "json")
on_ray._Driver(units, progress, [ending, working]).run()
print("units", progress.close().units)
ending = on_ray._Actor("cpu 0", Ending.options(max_restarts=-1).remote())
try:
    on_ray._Driver(units, progress, [ending]).run()
except ServerStartError as error:
    print(error)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder by which the processes of the cluster are told from others. Names of sockets must be short."""
    with TemporaryDirectory(prefix="ray-") as path:
        yield Path(path)


def environment(folder: Path) -> dict[str, str]:
    """Variables with which Ray starts a cluster of its own, with its files in a folder."""
    variables = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    variables.pop("RAY_ADDRESS", None)
    return variables


def test_a_cluster_makes_the_same_files(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("ray")
    for shard in range(4):
        members = {f"{number}.jpg": small_jpeg(100 * shard + number) for number in range(12)}
        write_tar(tmp_path / "in" / f"{shard}.tar", {**members, "broken.jpg": BROKEN})
    common = (tmp_path / "in", "--threads", "1")
    local = bulk(*common, "-o", tmp_path / "local")
    assert local.returncode == 1, local.stderr
    words = bulk_words(*common, "-o", tmp_path / "ray", "--on", "ray", "--worker-cpus", "1", "--workers", "1")
    with subprocess.Popen(
        words,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        said, _ = job.communicate(timeout=250)
    assert job.returncode == 1, said
    assert snapshot(tmp_path / "ray") == snapshot(tmp_path / "local")
    left = [
        one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])
    ]
    assert not still_running(left, timeout=30)


def test_an_actor_that_ends_whenever_it_starts_is_given_up(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("ray")
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stdout.splitlines() if line.startswith(("cpu", "units"))]
    reason = r"cpu 0: its process ended \d+ times while it started"
    assert re.fullmatch(f"{reason}; the others go on without it", said[-3])
    assert said[-2] == "units 2"
    assert re.fullmatch(f"{reason}; the logs of Ray's workers say why", said[-1])

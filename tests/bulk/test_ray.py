"""`--on ray`: the files are those of a run without Ray, and no process of the cluster stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from bulk_inputs import BROKEN, small_jpeg, write_tar
from bulk_jobs import bulk, bulk_words, snapshot
from processes import still_running


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder by which the processes of the cluster are told from others. Names of sockets must be short."""
    with TemporaryDirectory(prefix="ray-") as path:
        yield Path(path)


def test_a_cluster_makes_the_same_files(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("ray")
    for shard in range(4):
        members = {f"{number}.jpg": small_jpeg(100 * shard + number) for number in range(12)}
        write_tar(tmp_path / "in" / f"{shard}.tar", {**members, "broken.jpg": BROKEN})
    common = (tmp_path / "in", "--threads", "1")
    local = bulk(*common, "-o", tmp_path / "local")
    assert local.returncode == 1, local.stderr
    words = bulk_words(*common, "-o", tmp_path / "ray", "--on", "ray", "--worker-cpus", "1", "--workers", "1")
    variables = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    variables.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        words,
        env=variables,
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

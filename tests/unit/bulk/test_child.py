"""Processes of a bulk job that start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from siglip_serve.bulk.child import start_child

MODULE = """from multiprocessing.connection import Connection
def main(words):
    Connection(int(words[0])).send("started")
"""


def test_ctrl_c_leaves_a_process_that_starts_to_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A terminal sends SIGINT to all processes of a job, at any moment."""
    (tmp_path / "module_of_a_child.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process, connection = start_child("module_of_a_child")
    os.kill(process.pid, signal.SIGINT)
    assert connection.recv() == "started"
    assert process.wait() == 0
    assert not capfd.readouterr().err
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before

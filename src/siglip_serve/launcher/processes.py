"""Start the process of a server, and end it together with its model processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from siglip_serve.launcher.log import read

__all__ = ["end", "spawn"]


def spawn(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log_file: Path
) -> subprocess.Popen[bytes]:
    """Start a server in `folder`, with its output appended to `log_file`.

    If the calling thread ends, the kernel asks the server to stop (where `setpriv` is installed).
    """
    setpriv = shutil.which("setpriv")
    if setpriv:
        command = [setpriv, "--pdeathsig", "TERM", "--", *command]
    with _output(log_file) as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C goes to the launcher, which then stops the server
        )
    threading.Thread(target=_kill_orphans, args=(process,), daemon=True).start()
    return process


def _output(log_file: Path) -> IO[bytes]:
    """Open the log to append, because the watcher writes to it as well; the null device if that fails."""
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        return log_file.open("ab")
    except OSError:  # a server without a log is better than none
        return Path(os.devnull).open("ab")


def end(server: subprocess.Popen[bytes], timeout: float, log_file: Path | None) -> None:
    """Ask a server to stop, which lets running requests complete, and kill what is left after `timeout`.

    Args:
        server: process of `tritonserver`.
        timeout: seconds; 0 kills at once.
        log_file: the server's log, if one of its model processes was replaced. Triton never unloads a model
            whose process died and waits until its own timeout. Such a server is killed as soon as its log
            says that the last request has completed.
    """
    try:
        family = psutil.Process(server.pid).children(recursive=True)
    except psutil.Error:
        family = []
    if timeout > 0:
        server.terminate()
    deadline = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if log_file and "All models are stopped" in read(log_file):
            psutil.wait_procs(family, timeout=5)
            break
    if server.poll() is None:
        server.kill()
        server.wait()
    psutil.wait_procs(family, timeout=3)
    _kill_orphans(server)
    psutil.wait_procs(family, timeout=3)


def _kill_orphans(server: subprocess.Popen[bytes]) -> None:
    """Kill the model processes of a dead server: they hold its sockets, so its callers would wait forever."""
    server.wait()
    with suppress(ProcessLookupError):  # the server leads a session of its own, orphans stay in its group
        os.killpg(server.pid, signal.SIGKILL)

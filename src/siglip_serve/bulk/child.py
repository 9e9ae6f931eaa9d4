"""Start a process of this package that speaks with its parent over a socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

__all__ = ["start_child"]

# Not `-m`: the classes of the module would then have another name than here. Ctrl-C is for the driver alone.
# Its signal is blocked while Python starts, and ignored from here on.
_PROGRAM = """import importlib, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
importlib.import_module(sys.argv[1]).main(sys.argv[2:])"""


def start_child(
    module: str, files: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Run `main` of a module in a new process.

    Args:
        module: its dotted name. `main` gets the descriptors of the socket and of the files as texts.
        files: descriptors that the process inherits.
        environment: further variables.

    Returns:
        The process, and this end of the socket.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        passed = [theirs.fileno(), *files]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a new process inherits it
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, module, *map(str, passed)],
                pass_fds=passed,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    **(environment or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process, Connection(ours.detach())

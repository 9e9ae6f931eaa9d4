"""Programs that some tests run beside the server."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from wire import ROOT

__all__ = ["PROGRAM_PATH", "free_port", "program"]

# Those of the system first, then what `make tools` has fetched.
PROGRAM_PATH = os.pathsep.join(
    [
        str(Path(sys.executable).parent),
        os.environ.get("PATH", ""),
        "/usr/sbin",
        str(ROOT / ".tools/usr/sbin"),
        str(ROOT / ".tools/usr/bin"),
    ]
)


def program(name: str) -> str:
    """The path of a program; the test is skipped where there is none."""
    found = shutil.which(name, path=PROGRAM_PATH)
    if found is None:
        pytest.skip(f"{name} is not installed: install it, or run `make tools`")
    return found


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

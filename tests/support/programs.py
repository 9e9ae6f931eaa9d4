"""Programs that some tests run next to the server."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from paths import ROOT

__all__ = ["PROGRAM_PATH", "free_port", "program"]

# Programs of the system come before those of `make tools`.
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
    """Find the path of a program; the test is skipped where it is missing."""
    found = shutil.which(name, path=PROGRAM_PATH)
    if found is None:
        import pytest  # here, because programs that are no tests use this module too

        pytest.skip(f"{name} is not installed: install it, or run `make tools`")
    return found


def free_port() -> int:
    """Find a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

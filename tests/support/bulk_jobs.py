"""Runs of `siglip-serve bulk` for the tests, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paths import TINY
from pyarrow import parquet

__all__ = ["bulk", "bulk_words", "read_output", "search", "snapshot"]

# `siglip-serve`, ended by Ctrl-C even where the tests run in the background of a shell, which ignores it.
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from siglip_serve_client.commands.main import main; sys.exit(main())"
)


def bulk_words(*words: str | Path) -> list[str]:
    """The command line of a job on the CPU with siglip-tiny, unless the words name another checkpoint."""
    given = [*map(str, words)]
    if "--checkpoint" not in given:
        given += ["--checkpoint", str(TINY)]
    return [sys.executable, "-c", _PROGRAM, "bulk", *given, "--device", "cpu"]


def bulk(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a job to its end."""
    return _run(bulk_words(*words), environment)


def search(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a search."""
    return _run([sys.executable, "-c", _PROGRAM, "search", *map(str, words)], environment)


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def read_output(output: Path, folder: str = "embeddings") -> dict[str, dict[str, Any]]:
    """Rows of all Parquet files of an output, by id."""
    rows = [
        row
        for path in sorted((output / folder).glob("*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows), "an id comes twice"
    return found


def snapshot(output: Path) -> Mapping[str, bytes]:
    """All files of an output but the manifest, with their contents."""
    files = [path for path in output.rglob("*") if path.is_file() and path.name != "bulk.json"]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}

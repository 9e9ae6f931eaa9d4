"""CSV files of results: the columns that name a run, fidelity, and writing rows."""

from __future__ import annotations

import csv
import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["about", "cosine", "gpu_names", "publish", "write_csv"]


def about(packages: Sequence[str], device: str | None = None) -> dict[str, str]:
    """The columns that name the run: date, commit, device, versions, command."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "device": device or _cpu_name(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, str]], append: bool = False) -> None:
    """Write rows that all have the columns of the first one."""
    kept: list[Mapping[str, str]] = []
    if append and path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != list(rows[0]):
                raise ValueError(f"{path}: its columns are {reader.fieldnames}, not {list(rows[0])}")
            kept = list(reader)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def publish(
    rows: Sequence[Mapping[str, str]], packages: Sequence[str], output: Path | None, append: bool = True
) -> None:
    """Print rows without the columns that name the run, and write them to a CSV if one is named."""
    columns = list(rows[0])[len(about(packages)) :]
    for row in rows:
        print({column: row[column] for column in columns}, flush=True)
    if output:
        write_csv(output, rows, append)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Cosine of each row of one array with the same row of the other."""
    product: NDArray[Any] = (a * b).sum(-1)
    return product / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def gpu_names() -> list[str]:
    """The NVIDIA GPUs of this machine, by the driver's tool, since importing torch takes seconds."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.strip() for line in found.stdout.splitlines() if line.strip()] if not found.returncode else []
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

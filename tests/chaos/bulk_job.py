"""A bulk job of small pictures: its input, its processes, and what its output must hold."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from bulk_inputs import BROKEN, small_jpeg, write_parquet, write_tar
from processes import still_running
from pyarrow import parquet

from tests.chaos.server import ChaosError

__all__ = ["UNIT", "BulkJob", "Flaws", "below", "command_of", "compare", "make_inputs", "states"]

UNIT = 250  # pictures
_BROKEN_EACH = 400  # pictures, of which one cannot be decoded
_AGAIN = re.compile(r"its process has ended and is replaced; (\d+) units are done again")


def make_inputs(folder: Path, pictures: int, seed: int) -> list[str]:
    """Write pictures, half of them in tar archives, the others in a listing and a Parquet file.

    Returns:
        Arguments of the command.
    """
    units = [range(start, min(start + UNIT, pictures)) for start in range(0, pictures, UNIT)]
    alone, tabled, archived = units[::4], units[1::4], units[2::4] + units[3::4]
    done = folder / f"{pictures}-{seed}"
    arguments = [f"{folder}/shards/*.tar", f"{folder}/pictures.txt", f"{folder}/table.parquet"]
    if done.exists():
        return arguments

    def data(number: int) -> bytes:
        return small_jpeg(seed * 1_000_003 + number) if number % _BROKEN_EACH else BROKEN

    for numbers in archived:
        members = {f"{number:06}.jpg": data(number) for number in numbers}
        write_tar(folder / "shards" / f"{numbers[0]:06}.tar", members)
    cells = [data(number) for numbers in tabled for number in numbers]
    write_parquet(folder / "table.parquet", {"image": cells}, UNIT)
    (folder / "files").mkdir()
    paths = [folder / "files" / f"{number:06}.jpg" for numbers in alone for number in numbers]
    for path in paths:
        path.write_bytes(data(int(path.stem)))
    (folder / "pictures.txt").write_text("".join(f"{path}\n" for path in paths))
    done.touch()
    return arguments


@dataclass
class BulkJob:
    """The command of a job, started as often as it is killed.

    Attributes:
        words: its arguments.
        log: file of what it prints.
        process: the driver, while one runs.
        starts: of the driver.
        seen: processes below it, as often as they were looked at.
    """

    words: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    seen: set[psutil.Process] = field(default_factory=set)

    def start(self) -> None:
        """Start the driver."""
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("siglip-serve")), "bulk", *self.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Return True while the driver runs."""
        return self.process is not None and self.process.poll() is None

    def members(self, words: str) -> list[psutil.Process]:
        """Processes below the driver whose command line has these words."""
        if self.process is None or not self.running():
            return []
        found = below(self.process.pid)
        self.seen |= set(found)
        return [one for one in found if words in command_of(one)]

    def left_over(self, seconds: float = 20.0) -> int:
        """Count the processes that were seen and still run after some seconds."""
        return len(still_running(self.seen, timeout=seconds))

    def kill_group(self) -> None:
        """Kill the driver and all processes of its group."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self, seconds: float) -> int:
        """Wait for the driver's end, and return its exit status.

        Raises:
            ChaosError: it takes longer.
        """
        if self.process is None:
            raise ChaosError("the job was never started")
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            self.kill_group()
            raise ChaosError(f"the job has not ended after {seconds:.0f} s; its log is {self.log}") from error

    def done_again(self) -> list[int]:
        """Units that were done again after each death of a worker, by what the driver says."""
        return [int(number) for number in _AGAIN.findall(self.log.read_text(errors="replace"))]


@dataclass
class Flaws:
    """Differences of an output from that of an undisturbed run."""

    missing: list[str] = field(default_factory=list)
    further: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    twice: int = 0
    items: int = 0


def compare(output: Path, right: Path) -> Flaws:
    """Compare every file of an output with that of an undisturbed run, byte for byte."""
    flaws = Flaws()
    found, wanted = _digests(output), _digests(right)
    flaws.missing, flaws.further = sorted(wanted.keys() - found), sorted(found.keys() - wanted)
    flaws.different = sorted(name for name in wanted.keys() & found if wanted[name] != found[name])
    keys: Counter[str] = Counter()
    for folder in ("embeddings", "failed"):
        for path in (output / folder).glob("*.parquet"):
            keys.update(parquet.read_table(path, columns=["id"])["id"].to_pylist())
    flaws.items = len(keys)
    flaws.twice = sum(count > 1 for count in keys.values())
    return flaws


def _digests(output: Path) -> dict[str, str]:
    files = [path for path in output.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "bulk.json" and not path.name.endswith(".tmp")
    }


def below(pid: int) -> list[psutil.Process]:
    """All processes below another one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process) -> str:
    """The command line of a process, or "" if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def states(output: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished file, which no later run may write again."""
    found = {}
    for path in (output / "embeddings").glob("[!.]*.parquet"):
        about = path.stat()
        found[path.name] = (about.st_ino, about.st_mtime_ns)
    return found

"""The processes of a server: their kinds, their deaths, and what they hold."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["HELPER", "TRITON", "Death", "Member", "Watch", "family", "grouped", "kind_of", "shared_memory"]

TRITON = "tritonserver"
HELPER = " helper"  # ends the kind of a process that a model process started
_STUB = "triton_python_b"
_MODEL = re.compile(r"/models/(\w+)/")
_DOOR = re.compile(r"siglip_gateway\.doors (\w+)")
_INTERVAL = 0.2
_SAME_DEATH = 30.0  # seconds within which processes of one kind end for one reason
_BEFORE, _AFTER = 3.0, 20.0  # around the death of tritonserver its model processes end with it
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Member:
    """A process of a server."""

    pid: int
    kind: str


@dataclass(frozen=True)
class Death:
    """Processes of one kind that ended for one reason, at a time of time.monotonic()."""

    kind: str
    at: float
    pids: tuple[int, ...]


def kind_of(words: Sequence[str], parent: str = "") -> str:
    """Name the kind of a process: tritonserver, a model, a door, or the helper of a model.

    Args:
        words: its command line.
        parent: the kind of its parent, if known.

    Returns:
        The kind, or "" for a process that is none of the server's.
    """
    if not words:
        return ""
    # Until it runs its own program, a new process has the command line of its parent.
    if parent == TRITON and Path(words[0]).name == TRITON:
        return ""
    owner = parent.removesuffix(HELPER)
    if owner and owner != TRITON and not owner.endswith(" door"):
        return f"{owner}{HELPER}"
    line, program = " ".join(words), Path(words[0]).name
    if program.startswith(_STUB):
        found = _MODEL.search(line)
        return found[1] if found else ""
    door = _DOOR.search(line)
    return TRITON if program == TRITON else f"{door[1]} door" if door else ""


def family(launcher: int, known: dict[int, Member] | None = None) -> dict[int, Member]:
    """Find the living processes of a server by the process id of its launcher.

    Args:
        launcher: process id.
        known: members of an earlier call, whose command lines are not read again.
    """
    found: dict[int, Member] = {}
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return found
    for process in children:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            old = (known or {}).get(process.pid)
            parent = found.get(process.ppid())
            kind = old.kind if old else kind_of(process.cmdline(), parent.kind if parent else "")
            if kind:
                found[process.pid] = Member(process.pid, kind)
    return found


def grouped(ended: Iterable[tuple[float, Member]]) -> list[Death]:
    """Count as one death what ended for one reason.

    The other processes of a model end when the model is loaded again, and all of them with tritonserver.
    """
    events = sorted(ended, key=lambda event: event[0])
    servers = [at for at, member in events if member.kind == TRITON]
    found: list[Death] = []
    for at, member in events:
        model = member.kind != TRITON and not member.kind.endswith(" door")
        if model and any(-_BEFORE <= at - server <= _AFTER for server in servers):
            continue
        last = next((death for death in reversed(found) if death.kind == member.kind), None)
        if last is not None and member.kind != TRITON and at - last.at < _SAME_DEATH:
            found[found.index(last)] = Death(last.kind, last.at, (*last.pids, member.pid))
        else:
            found.append(Death(member.kind, at, (member.pid,)))
    return found


class Watch(threading.Thread):
    """A thread that notes which processes of a server ended, and when.

    Args:
        launcher: process id of the launcher.
    """

    def __init__(self, launcher: int) -> None:
        super().__init__(name="chaos-watch", daemon=True)
        self._launcher = launcher
        self._ending = threading.Event()
        self._ended: list[tuple[float, Member]] = []
        self.members = family(launcher)

    def run(self) -> None:
        """Poll until `stop`."""
        while not self._ending.wait(_INTERVAL):
            present = family(self._launcher, self.members)
            now = time.monotonic()
            if not self._ending.is_set():
                gone = [member for pid, member in self.members.items() if pid not in present]
                self._ended += [(now, member) for member in gone]
            self.members = present

    def stop(self) -> None:
        """End the thread; what ends from now on is no death."""
        self._ending.set()

    def deaths(self) -> list[Death]:
        """The deaths until now, those of helpers included."""
        return grouped(self._ended)


def shared_memory(launcher: int) -> dict[str, int]:
    """Sizes in bytes of the files in shared memory that belong to a launcher's server, by name."""
    found = {}
    for file in _SHM.glob(f"siglip-serve-{launcher}-*"):
        with suppress(OSError):
            found[file.name] = file.stat().st_blocks * 512
    return found

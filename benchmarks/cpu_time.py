"""CPU time of a run, the whole machine's and each process's of a server, and the memory of a server."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil

__all__ = ["cpu_of", "cpu_used", "family", "machine_cpu", "memory_of", "what"]

_TICKS_PER_SECOND = 100  # of /proc/stat, the same on every Linux
_IDLE = (3, 4)  # idle and iowait
# user, nice, system, idle, iowait, irq, softirq; what follows belongs to other guests, or is counted already
_OURS = 7


def machine_cpu() -> float:
    """Seconds that all cores together have been busy since the machine's start, or 0 where it is not told."""
    fields = [
        int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
    ]
    return sum(value for n, value in enumerate(fields[:_OURS]) if n not in _IDLE) / _TICKS_PER_SECOND


def family(root: int) -> list[psutil.Process]:
    """A process and all below it, none if it has ended."""
    try:
        parent = psutil.Process(root)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(root: int) -> int:
    """Proportional size in bytes of a process and all below it: what they share counts once."""
    size = 0
    for process in family(root):
        try:
            size += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile, or is of another user
            continue
    return size


def cpu_of(root: int | None) -> dict[tuple[int, str], float]:
    """CPU seconds so far of a process and all below it, as (process id, its name) -> seconds."""
    if root is None:
        return {}
    found = {}
    for process in family(root):
        try:
            times = process.cpu_times()
            found[process.pid, what(process.cmdline(), process.name())] = times.user + times.system
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return found


def cpu_used(
    before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float]
) -> dict[str, float]:
    """CPU seconds between two calls of `cpu_of`, summed over the processes that are the same thing."""
    used: defaultdict[str, float] = defaultdict(float)
    for key, seconds in after.items():
        used[key[1]] += seconds - before.get(key, 0.0)
    return dict(sorted(used.items(), key=lambda pair: -pair[1]))


def what(command: list[str], name: str) -> str:
    """A model process is named by its model, which its command line tells, and a module by its name."""
    for argument in command:
        if model := re.search(r"/([^/]+)/\d+/model\.py$", argument):
            return model[1]
    if "-m" in command[:-1]:
        module, *words = command[command.index("-m") + 1 :]
        # The doors are one module. Its first word is the protocol.
        return f"{module} {words[0]}" if words and module.endswith(".doors") else module
    return name

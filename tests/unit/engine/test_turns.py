"""Turns of real processes, which take commands line by line and answer with times of one clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from siglip_serve.engine.turns import _PATIENCE, Turns

PEER = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from siglip_serve.engine import turns as module

module._PATIENCE = float(sys.argv[3])
turns, held = module.Turns(sys.argv[1], Path(sys.argv[2])), ExitStack()
print(time.monotonic(), flush=True)
for line in sys.stdin:
    verb, *numbers = line.split()
    answers = []
    if verb == "enter":
        held.enter_context(turns.turn(int(numbers[0])))
    elif verb == "leave":
        answers = [time.monotonic()]
        held.close()
    elif verb == "compute":
        for _ in range(int(numbers[2])):
            with turns.turn(int(numbers[0])):
                begin = time.monotonic()
                time.sleep(float(numbers[1]))
                answers += [begin, time.monotonic()]
    elif verb == "close":
        turns.close()
    print(*(answers or [time.monotonic()]), flush=True)
"""


class Peer:
    """A process with its `Turns`."""

    def __init__(self, name: str, folder: Path, patience: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, name, str(folder), str(patience)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hear()

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def hear(self) -> list[float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process died"
        return [float(word) for word in line.split()]

    def ask(self, *words: object) -> list[float]:
        self.tell(*words)
        return self.hear()

    def learn(self) -> None:
        """Compute once, so that a row is expected to take 5 ms."""
        self.ask("compute", 10, 0.05, 1)


Start = Callable[..., Peer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that know how long they compute."""
    peers: list[Peer] = []

    def start_one(name: str = "name", learned: bool = True, patience: float = _PATIENCE) -> Peer:
        peers.append(Peer(name, tmp_path, patience))
        if learned:
            peers[-1].learn()
        return peers[-1]

    yield start_one
    for peer in peers:
        peer.process.kill()
        peer.process.communicate()


def test_one_process_computes_at_a_time(start: Start) -> None:
    peers = [start() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        stamps = list(pool.map(lambda peer: peer.ask("compute", 10, 0.03, 8), peers))
    spans = sorted(pair for own in stamps for pair in zip(own[::2], own[1::2], strict=True))
    assert len(spans) == 24
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_the_turn_of_a_killed_process_ends(start: Start) -> None:
    holder, other = start(), start()
    holder.ask("enter", 100)
    other.tell("enter", 100)
    time.sleep(0.2)
    killed = time.monotonic()
    holder.process.kill()
    assert other.hear()[0] >= killed


def test_does_not_wait_for_a_process_that_hangs(start: Start) -> None:
    """The first wait is long and the next ones short, until the process moves again."""
    holder, other = start(), start(patience=1.0)
    holder.ask("enter", 10)
    os.kill(holder.process.pid, signal.SIGSTOP)
    waits = []
    for _ in range(2):
        asked = time.monotonic()
        waits.append(other.ask("enter", 10)[0] - asked)
        other.ask("leave")
    assert waits[1] < 1 <= waits[0]
    os.kill(holder.process.pid, signal.SIGCONT)
    holder.ask("leave")
    other.ask("enter", 10)
    other.ask("leave")
    holder.ask("enter", 10)
    other.tell("enter", 10)
    time.sleep(0.2)
    assert holder.ask("leave")[0] <= other.hear()[0]


def test_short_computations_take_no_turns(start: Start) -> None:
    holder, other = start(), start()
    holder.ask("enter", 10)
    other.ask("enter", 2)
    other.ask("leave")
    other.tell("enter", 10)
    assert holder.ask("leave")[0] <= other.hear()[0]


def test_computations_of_unknown_length_take_no_turns(start: Start) -> None:
    holder, other = start(learned=False), start(learned=False)
    holder.ask("enter", 100)
    other.ask("enter", 100)


def test_an_error_ends_the_turn(tmp_path: Path, start: Start) -> None:
    turns = Turns("name", tmp_path)
    with turns.turn(1):
        time.sleep(0.03)
    with pytest.raises(ValueError, match="of the computation"), turns.turn(1):
        raise ValueError("of the computation")
    other = start()
    other.ask("enter", 10)
    other.ask("leave")
    turns.close()


def test_the_last_process_removes_the_file(start: Start, tmp_path: Path) -> None:
    first, second = start(learned=False), start(learned=False)
    first.ask("close")
    assert len(list(tmp_path.iterdir())) == 1
    second.ask("close")
    assert not list(tmp_path.iterdir())


def test_removes_files_of_killed_processes_only(start: Start, tmp_path: Path) -> None:
    killed, living = start("killed"), start("living")
    killed.process.kill()
    killed.process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    start("new")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "siglip-serve-turns-living",
        "siglip-serve-turns-new",
    ]
    another = start("living")  # both still use the same file
    living.ask("enter", 100)
    another.tell("enter", 100)
    assert living.ask("leave")[0] <= another.hear()[0]


def test_processes_that_come_and_go_share_one_file_and_leave_none(tmp_path: Path) -> None:
    """Four processes open and remove the file at once, and each always has the one at the path."""
    code = (
        "import os, sys; from pathlib import Path; from siglip_serve.engine.turns import Turns\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(1500):\n"
        "    turns = Turns('name', folder)\n"
        "    same = os.path.samestat(os.stat(folder / 'siglip-serve-turns-name'), os.fstat(turns._file))\n"
        "    assert same\n"
        "    turns.close()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert not list(tmp_path.iterdir())


def test_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "siglip-serve-turns-name").symlink_to(target)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        Turns("name", tmp_path)
    assert target.read_bytes() == b"precious"


def test_opens_no_file_without_a_name(tmp_path: Path) -> None:
    turns = Turns("", tmp_path)
    for _ in range(2):
        with turns.turn(1):
            time.sleep(0.03)
    turns.close()
    assert not list(tmp_path.iterdir())


def test_expects_of_few_rows_less_time_than_of_many(start: Start) -> None:
    holder, other = start(), start()  # a row is expected to take 5 ms
    holder.ask("enter", 10)
    began = time.monotonic()
    assert other.ask("enter", 1)[0] - began < 1  # 5 ms need no turn
    other.ask("leave")
    other.tell("enter", 5)
    time.sleep(0.2)
    assert holder.ask("leave")[0] <= other.hear()[0]

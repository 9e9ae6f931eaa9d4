"""Hung model processes, with short-lived processes in place of those of models."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import pytest

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.hangs import Hangs, Probes, Work, read_work

SLEEPS = "import time; time.sleep(600)"
COMPUTES = "while True: pass"
AFTER = 1.0
Make = Callable[[str], int]


@pytest.fixture
def make() -> Iterator[Make]:
    """Starts a process that runs a line of Python; all are killed after the test."""
    made: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> int:
        made.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        return made[-1].pid

    yield start
    for process in made:
        process.kill()
        process.wait()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def look(
    processes: Mapping[int, str],
    work: Callable[[], Mapping[str, Work]],
    until: Callable[[list[str]], bool],
    probes: Probes | None = None,
) -> list[str]:
    """Watch processes until that is true of what is said, or for some time; return what was said."""
    said: list[str] = []
    running = lambda: {pid: model for pid, model in processes.items() if alive(pid)}  # noqa: E731
    hangs = Hangs(
        AFTER, lambda: next(iter(processes)), running, work, probes or Probes(AFTER, {}), said.append
    )
    deadline = time.monotonic() + 30
    while not until(said) and time.monotonic() < deadline:
        hangs.look()
        time.sleep(0.05)
    while any(alive(int(line.split()[2])) for line in said) and time.monotonic() < deadline:
        time.sleep(0.01)  # a kill takes its time
    return said


def for_a_while() -> Callable[[object], bool]:
    end = time.monotonic() + 3 * AFTER
    return lambda _: time.monotonic() > end


def test_kills_a_process_that_does_nothing_while_requests_wait(make: Make) -> None:
    hung, idle, busy, other = make(SLEEPS), make(SLEEPS), make(COMPUTES), make(SLEEPS)
    processes = {hung: "hung", idle: "idle", busy: "busy", other: "unknown"}
    work = {"hung": Work(2, 7), "idle": Work(0, 7), "busy": Work(9, 7)}
    said = look(processes, lambda: work, until=bool)
    assert said == [f"hung: process {hung} did nothing for 1 s while 2 requests waited for it; killing it"]
    assert [alive(pid) for pid in (hung, idle, busy, other)] == [False, True, True, True]


def test_leaves_a_model_alone_that_answers_or_whose_queue_is_empty_at_times(make: Make) -> None:
    answers, drains = make(SLEEPS), make(SLEEPS)
    count = 0

    def work() -> Mapping[str, Work]:
        nonlocal count
        count += 1
        return {"answers": Work(1, count), "drains": Work(count % 3, 7)}

    assert look({answers: "answers", drains: "drains"}, work, until=for_a_while()) == []


def test_kills_the_hung_one_of_two_processes_whose_model_answers(make: Make) -> None:
    hung, busy = make(SLEEPS), make(COMPUTES)
    count = 0

    def work() -> Mapping[str, Work]:
        nonlocal count
        count += 1
        return {"tower": Work(3, count)}

    said = look({hung: "tower", busy: "tower"}, work, until=bool)
    assert [line.split()[2] for line in said] == [str(hung)]
    assert alive(busy)


def test_begins_anew_while_the_server_is_away(make: Make) -> None:
    pid, count = make(SLEEPS), 0

    def work() -> Mapping[str, Work]:
        nonlocal count
        count += 1
        if count % 5 == 0:
            raise ConnectionRefusedError
        return {"hung": Work(1, 7)}

    assert look({pid: "hung"}, work, until=for_a_while()) == []


@pytest.mark.parametrize(
    ("code", "error", "killed"),
    [
        (SLEEPS, TimeoutError(), True),
        (SLEEPS, URLError(TimeoutError()), True),
        (COMPUTES, TimeoutError(), False),
        (SLEEPS, ConnectionRefusedError(), False),
    ],
)
def test_kills_a_server_that_does_nothing_and_tells_nothing(
    code: str, error: OSError, killed: bool, make: Make
) -> None:
    pid = make(code)

    def work() -> Mapping[str, Work]:
        raise error

    said = look({pid: "server"}, work, until=bool if killed else for_a_while())
    told = f"tritonserver: process {pid} did not answer for 1 s; killing it"
    assert said == [told] * killed
    assert alive(pid) != killed


def test_asks_a_model_that_stands_still_until_its_queue_tells(make: Make) -> None:
    """The one request of all is in the process, so that nothing waits before it is asked."""
    pid, asked, over = make(SLEEPS), [], threading.Event()

    def question() -> None:
        asked.append(time.monotonic())
        over.wait(60)
        raise ServerStartError("the process died")

    probes = Probes(AFTER, {"hung": question})
    work = lambda: {"hung": Work(max(len(asked) - 1, 0), 7)}  # noqa: E731 - Triton took one out of the queue
    said = look({pid: "hung"}, work, until=bool, probes=probes)
    over.set()
    assert len(said) == 1
    assert not alive(pid)
    assert 2 <= len(asked) <= 3


def test_asks_seldom_and_not_where_counts_move() -> None:
    asked: list[str] = []
    probes = Probes(0.5, {"still": lambda: asked.append("still"), "moves": lambda: asked.append("moves")})
    begin, count = time.monotonic(), 0
    while time.monotonic() - begin < 2:
        count += 1
        probes.ask({"still": 3, "moves": count})
        time.sleep(0.01)
    assert 1 <= len(asked) <= 4
    assert set(asked) == {"still"}


METRICS = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
nv_inference_request_success{model="embed_text",version="1"} 12
nv_inference_request_failure{model="embed_text",reason="OTHER",version="1"} 2
nv_inference_request_failure{model="embed_text",reason="REJECTED",version="1"} 1e+06
nv_inference_count{model="embed_text",version="1"} 99
nv_inference_pending_request_count{model="embed_text",version="1"} 3
nv_inference_pending_request_count{model="label_scores",version="1"} 0
siglip_serve_images_total{model="embed_text"} 5
"""


def test_reads_metrics() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = read_work(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert found == {"embed_text": Work(3, 1_000_014), "label_scores": Work(0, 0)}

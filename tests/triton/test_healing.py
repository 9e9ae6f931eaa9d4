"""Deaths and hangs of the real server, whose log cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from images import encode, photo
from tritonclient.utils import InferenceServerException
from wire import ROOT, TINY, GrpcCaller

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher import ServeOptions, TritonServer

PICTURE = encode(photo(80, 60), "JPEG")
TOWER, DECODER = "siglip_vision_model", "siglip_vision_process"


def options(log: Path, **more: Any) -> ServeOptions:
    given = {
        "models": ("embed_image",),
        "device": "cpu",
        "settings": {"decoders": "1", "preprocess": "pil"},
        **more,
    }
    return ServeOptions(ROOT / "model_repository", str(TINY), log_file=log, **given)


@pytest.fixture(scope="module")
def faulty() -> Iterator[TritonServer]:
    with TritonServer(options(Path("/dev/full"))) as running:
        yield running


def health(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://{url}/health", timeout=10) as response:
            return {"code": response.status, **json.load(response)}
    except urllib.error.HTTPError as error:
        return {"code": error.code, **json.load(error)}


def processes_of(server_pid: int, model: str) -> list[psutil.Process]:
    family = psutil.Process(server_pid).children(recursive=True)
    alive = [process for process in family if process.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if any(f"/{model}/" in word for word in process.cmdline())]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(server: TritonServer) -> bool:
    try:
        return GrpcCaller(server.grpc_url).embed([PICTURE]).shape[0] == 1
    except InferenceServerException:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("model", [TOWER, DECODER])
def test_a_model_comes_back_and_leaves_no_shared_memory(
    faulty: TritonServer, model: str, number: signal.Signals
) -> None:
    wait_for(lambda: answers(faulty))
    prefix = f"siglip-serve-{os.getpid()}-"
    before, deaths = set(shared_memory(prefix)), health(faulty.status_url)["model_deaths"]
    restarts = health(faulty.status_url)["restarts"]
    (process,) = processes_of(faulty.pid, model)
    process.send_signal(number)
    wait_for(lambda: health(faulty.status_url)["status"] in ("degraded", "restarting"))
    wait_for(lambda: health(faulty.status_url)["status"] == "serving")
    assert process not in processes_of(faulty.pid, model)
    wait_for(lambda: answers(faulty))
    if health(faulty.status_url)["restarts"] == restarts:  # Triton may die as well
        assert health(faulty.status_url)["model_deaths"] == deaths + 1
    wait_for(lambda: len(shared_memory(prefix)) <= len(before))


def shared_memory(prefix: str) -> list[str]:
    return [file.name for file in Path("/dev/shm").glob(f"{prefix}*")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_tritonserver_comes_back(faulty: TritonServer, number: signal.Signals) -> None:
    wait_for(lambda: answers(faulty))
    restarts = health(faulty.status_url)["restarts"]
    os.kill(faulty.pid, number)
    wait_for(lambda: health(faulty.status_url)["status"] == "restarting")
    assert health(faulty.status_url)["code"] == 503
    wait_for(lambda: health(faulty.status_url)["status"] == "serving")
    told = health(faulty.http_url)  # through the door
    assert (told["code"], told["restarts"]) == (200, restarts + 1)
    assert "tritonserver died (signal 9)" in told["last_death"]
    wait_for(lambda: answers(faulty))


def starting_processes(server: TritonServer) -> list[psutil.Process]:
    with suppress(psutil.Error, ServerStartError):
        return processes_of(server.pid, TOWER)
    return []


def test_a_start_that_hangs_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model process is stopped while it starts, in a log folder that is deleted meanwhile."""
    folder = tmp_path / "logs"
    starting = TritonServer(options(folder / "log", stalled_after=4.0))
    stopped = threading.Event()

    def stop() -> None:
        while not stopped.is_set():
            for process in starting_processes(starting):
                process.suspend()
                shutil.rmtree(folder)
                stopped.set()
            time.sleep(0.02)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with starting as server:
            assert stopped.is_set()
            assert answers(server)
            assert health(server.status_url)["status"] == "serving"
    finally:
        stopped.set()
        thread.join()
    assert "; starting tritonserver again (attempt 2 of 3)\n" in capsys.readouterr().err
    assert (folder / "log").is_file()  # of the second attempt

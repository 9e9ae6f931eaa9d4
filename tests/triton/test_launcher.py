"""Starts, failed starts, faults and stops of the real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from explaining import MAPS, explain
from images import encode, photo
from tritonclient.utils import InferenceServerException
from wire import OPENER, ROOT, TINY, GrpcCaller, HttpCaller, post, post_image

from siglip_serve.errors import CheckpointError, ServerStartError, SettingsError
from siglip_serve.launcher import ServeOptions, TritonServer
from siglip_serve.launcher.tritonserver import library_path, server_command

REPOSITORY = ROOT / "model_repository"
PICTURE = encode(photo(80, 60), "JPEG")


def processes_of(server: TritonServer) -> list[psutil.Process]:
    parent = psutil.Process(server.pid)
    family = [parent, *parent.children(recursive=True)]
    return [process for process in family if process.status() != psutil.STATUS_ZOMBIE]


def front_door(log: Path, repository: Path = REPOSITORY, **more: Any) -> TritonServer:
    """A server of `embed_image` and its steps: it starts in half the time of all models."""
    return TritonServer(ServeOptions(repository, str(TINY), models=("embed_image",), log_file=log, **more))


def left_behind() -> list[Path]:
    name = f"siglip-serve-{os.getpid()}-*"
    return [*Path("/dev/shm").glob(name), *Path(tempfile.gettempdir()).glob(name)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_killed_model_process_is_replaced(log: Path) -> None:
    """The processes of each model in turn, while requests run."""
    with front_door(log) as server:
        caller = GrpcCaller(server.grpc_url)
        stop = threading.Event()

        def keep_asking() -> None:
            while not stop.is_set():
                try:
                    caller.embed([PICTURE])
                except InferenceServerException:
                    time.sleep(0.01)

        asking = [threading.Thread(target=keep_asking) for _ in range(4)]
        for thread in asking:
            thread.start()
        try:
            for model in ("siglip_vision_model", "siglip_vision_process"):
                for process in processes_of_model(server, model):
                    process.kill()
                time.sleep(0.5)
                wait_until_served(caller)
        finally:
            stop.set()
            for thread in asking:
                thread.join()
        wait_for_lines(log, "served again after", 2)


def test_a_server_that_died_is_started_again(log: Path) -> None:
    """On the same ports, with nothing left of the one before; one that keeps dying is given up."""
    with front_door(log) as server:
        for count in range(1, 4):
            family = processes_of(server)
            os.kill(server.pid, signal.SIGABRT)
            wait_for_lines(log, "tritonserver: served again after", count)
            assert not [process for process in family if process.is_running()]
            assert GrpcCaller(server.grpc_url).embed([PICTURE]).shape[0] == 1
        next(processes_of_model(server, "siglip_vision_process")).kill()
        wait_for_lines(log, "siglip_vision_process: served again after", 1)
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    assert "tritonserver died (signal 9), 4 times within 600 s; giving up" in log.read_text()


def test_a_server_that_was_asked_to_end_is_not_started_again(log: Path) -> None:
    with front_door(log) as server:
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 0
    assert "starting it again" not in log.read_text()


def test_one_death_means_one_reload(log: Path) -> None:
    """One of two decode processes dies: its sibling, which Triton then retires, is no second death."""
    settings = {"decoders": "2"}
    with front_door(log, settings=settings) as server:
        next(processes_of_model(server, "siglip_vision_process")).kill()
        wait_for_lines(log, "served again after", 1)
        time.sleep(6)
        assert GrpcCaller(server.grpc_url).embed([PICTURE]).shape[0] == 1
        assert log.read_text().count("loading the model again") == 1


def test_a_death_during_a_reload_is_not_forgotten(log: Path) -> None:
    with front_door(log) as server:
        for model in ("siglip_vision_process", "siglip_vision_model"):
            for process in processes_of_model(server, model):
                process.kill()
            wait_for_lines(log, "loading the model again", 1)
        wait_until_served(GrpcCaller(server.grpc_url))


def processes_of_model(server: TritonServer, model: str) -> Iterator[psutil.Process]:
    for process in processes_of(server):
        if any(f"/{model}/" in word for word in process.cmdline()):
            yield process


def wait_for_lines(log: Path, text: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while log.read_text().count(text) < count:
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)


def wait_until_served(caller: GrpcCaller) -> None:
    """Until ten requests in a row are answered."""
    deadline = time.monotonic() + 60
    in_a_row = 0
    while in_a_row < 10:
        assert time.monotonic() < deadline
        try:
            caller.embed([PICTURE])
            in_a_row += 1
        except InferenceServerException:
            in_a_row = 0
            time.sleep(0.02)


def test_what_is_named_is_served_with_its_steps_and_nothing_else(log: Path) -> None:
    options = ServeOptions(REPOSITORY, str(TINY), models=("explain_image",), log_file=log)
    with TritonServer(options) as server:
        steps = ["explain_maps", "explain_overlays", "explain_prompts", "explain_vectors"]
        towers = ["siglip_text_model", "siglip_vision_model", "siglip_vision_process"]
        assert server.models == ["explain_image", *steps, *towers]
        found = explain(GrpcCaller(server.grpc_url), PICTURE, ["dog"], (*MAPS, "OVERLAY"))
        total = found["PATCH_MAPS"].sum((1, 2)) + found["UNATTRIBUTED"]
        np.testing.assert_allclose(total, found["SCORES"], atol=1e-5)


def test_stop_leaves_nothing(log: Path) -> None:
    others = left_behind()  # of the servers that other tests share
    server = front_door(log)
    with server:
        family = processes_of(server)
        assert len(family) > 2
        assert len(left_behind()) > len(others)
        assert GrpcCaller(server.grpc_url).embed([PICTURE]).shape[0] == 1
    assert not [process for process in family if process.is_running()]
    assert left_behind() == others


def test_a_server_outlives_the_thread_that_started_it(log: Path) -> None:
    server = front_door(log)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        time.sleep(2)
        assert GrpcCaller(server.grpc_url).embed([PICTURE]).shape[0] == 1
    finally:
        server.stop()


def test_overload_is_refused_and_nothing_is_lost(tmp_path: Path, log: Path) -> None:
    """A queue of four: of many requests at once some are told to come back, the others are answered."""
    repository = Path(shutil.copytree(REPOSITORY, tmp_path / "models"))
    config = repository / "siglip_vision_process" / "config.pbtxt"
    config.write_text(re.sub(r"max_queue_size: \d+", "max_queue_size: 4", config.read_text()))
    large = encode(photo(3000, 2000), "JPEG")
    with front_door(log, repository) as server:
        caller = GrpcCaller(server.grpc_url)

        def ask(_: int) -> str:
            try:
                caller.embed([large])
            except InferenceServerException as error:
                return str(error.status())
            return "answered"

        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(ask, range(40)))
        assert set(answers) == {"answered", "StatusCode.UNAVAILABLE"}
        assert caller.embed([PICTURE]).shape[0] == 1


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_a_killed_launcher_takes_its_server_along(log: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from siglip_serve.launcher import *\n"
        "repository, checkpoint, log = sys.argv[1:]\n"
        "options = dict(models=('embed_image',), log_file=Path(log))\n"
        "server = TritonServer(ServeOptions(Path(repository), checkpoint, **options))\n"
        "server.start(); print(server.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(REPOSITORY), str(TINY), str(log)], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        server = psutil.Process(int(launcher.stdout.readline()))
        family = [server, *server.children(recursive=True)]
        launcher.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"checkpoint": "/nowhere"}, CheckpointError, "'/nowhere': no such directory"),
        ({"checkpoint": str(ROOT)}, CheckpointError, "has no config.json"),
        ({"checkpoint": "not a hub id"}, CheckpointError, "not a hub id of the form"),
        ({"settings": {"dtipe": "float32"}}, SettingsError, "SIGLIP_SERVE_DTIPE: no such setting"),
        ({"settings": {"dtype": "float33"}}, SettingsError, "got 'float33', expected one of auto, float32"),
        ({"settings": {"max_rows": "-1"}}, SettingsError, "got '-1', expected a whole number"),
        ({"model_repository": Path("/nowhere")}, ServerStartError, "'/nowhere': no such directory"),
        ({"model_repository": ROOT / "tests"}, ServerStartError, "no <model>/config.pbtxt in it"),
    ],
)
def test_refused_before_the_start(
    change: dict[str, object], error: type[Exception], expected: str, log: Path
) -> None:
    options = {"model_repository": REPOSITORY, "checkpoint": str(TINY), "log_file": log, **change}
    with pytest.raises(error, match=expected.replace("[", r"\[")), TritonServer(ServeOptions(**options)):  # type: ignore[arg-type]
        pass
    assert not log.exists()


def test_wrong_weights_are_listed(tmp_path: Path, log: Path) -> None:
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    patch = config["vision_config"]["patch_size"]
    config["vision_config"]["patch_size"] = 2 * patch
    (checkpoint / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ServerStartError) as caught,
        TritonServer(ServeOptions(REPOSITORY, str(checkpoint), log_file=log)),
    ):
        pass
    message = str(caught.value)
    assert "mis-shaped: vision_model.embeddings.patch_embedding.weight is [" in message
    assert f"3, {patch}, {patch}], expected [" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) < 8


def test_the_command_serves_and_stops_cleanly(tmp_path: Path) -> None:
    """`siglip-serve serve`: prints where it serves and a line that works; SIGINT ends it with status 0."""
    http_port, grpc_port = free_port(), free_port()
    command = [str(Path(sys.executable).parent / "siglip-serve"), "serve"]
    arguments = [
        f"--model-repository={REPOSITORY}",
        f"--http-port={http_port}",
        f"--grpc-port={grpc_port}",
        "--metrics-port=0",
        f"--sample-image={next((TINY / 'samples').glob('*.jpg'))}",
        f"--log-file={tmp_path / 'log'}",
    ]
    environment = {**os.environ, "SIGLIP_SERVE_CHECKPOINT": str(TINY)}
    with subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "Ctrl-C" in line:
                break
        curl = output[output.index("curl") : output.index("Ctrl-C")].strip()
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
        width = json.loads((TINY / "config.json").read_text())["vision_config"]["hidden_size"]
        numbers = np.array(answer.stdout.split(), dtype=np.float32)
        assert numbers.shape == (width,)
        assert np.isfinite(numbers).all()
        arguments.append(f"--checkpoint={TINY}")
        second = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"HTTP port {http_port} on 127.0.0.1 cannot be bound" in second.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "stopped" in process.stdout.read()


def status_once_it_listens(http_url: str) -> int:
    deadline = time.monotonic() + 120
    while True:
        try:
            return post_image(http_url, PICTURE)[0]
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_plain_tritonserver_serves_the_repository(tmp_path: Path) -> None:
    """Without the launcher: dimensions by auto-completion, settings from the environment."""
    http_port, log = free_port(), tmp_path / "log"
    environment = {
        **os.environ,
        "SIGLIP_SERVE_CHECKPOINT": str(TINY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    options = [
        f"--model-repository={REPOSITORY}",
        "--model-config-name=cpu",
        f"--http-port={http_port}",
        "--http-address=127.0.0.1",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    try:
        command, libraries = stage.server_command(), stage.library_path(environment)
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [*command, *options], env=environment | libraries, cwd=tmp_path, stdout=output, stderr=output
            ) as server,
        ):
            try:
                assert status_once_it_listens(f"127.0.0.1:{http_port}") == 200
                found = explain(HttpCaller(f"127.0.0.1:{http_port}"), PICTURE, ["dog"])
                assert found["HEATMAPS"].shape == (1, 60, 80)
            finally:
                server.terminate()
    finally:
        stage.remove()


def test_administration_is_closed_to_others(server: TritonServer) -> None:
    base = f"http://{server.http_url}/v2"
    for path in (
        "repository/models/embed_image/load",
        "repository/models/embed_image/unload",
        "repository/index",
        "logging",
        "trace/setting",
        "systemsharedmemory/region/x/register",
    ):
        status, _ = post(f"{base}/{path}", b"{}", {})
        assert status == 403, path
    client = GrpcCaller(server.grpc_url).client
    for call in (client.get_model_repository_index, client.get_log_settings, client.get_trace_settings):
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            call()
    assert np.isfinite(GrpcCaller(server.grpc_url).embed([PICTURE])).all()


def test_metrics_are_served(server: TritonServer) -> None:
    GrpcCaller(server.grpc_url).embed([PICTURE])
    with OPENER.open(f"http://{server.address}:{server.metrics_port}/metrics", timeout=5) as answer:
        assert b'nv_inference_request_success{model="siglip_vision_model"' in answer.read()

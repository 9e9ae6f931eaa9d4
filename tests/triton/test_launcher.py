"""Starts, failed starts, faults and stops of the real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from explaining import MAPS, explain
from images import encode, photo
from processes import still_running
from programs import free_port
from random_checkpoints import random_model, save_checkpoint
from tritonclient.utils import InferenceServerException
from wire import ROOT, TINY, GrpcCaller, HttpCaller, post_image

from siglip_serve.errors import CheckpointError, ServerStartError, SettingsError
from siglip_serve.launcher import ServeOptions, TritonServer
from siglip_serve.launcher.tritonserver import library_path, server_command

REPOSITORY = ROOT / "model_repository"
PICTURE = encode(photo(80, 60), "JPEG")
LOADING, SERVED = "loading the model again", "served again after"  # lines of the log


def processes_of(server: TritonServer) -> list[psutil.Process]:
    parent = psutil.Process(server.pid)
    family = [parent, *parent.children(recursive=True)]
    return [process for process in family if process.status() != psutil.STATUS_ZOMBIE]


def left_behind() -> set[Path]:
    name = f"siglip-serve-{os.getpid()}-*"
    return {*Path("/dev/shm").glob(name), *Path(tempfile.gettempdir()).glob(name)}


def test_outlives_the_thread_that_started_it(mortal_server: TritonServer) -> None:
    pid = mortal_server.pid
    time.sleep(2)
    assert GrpcCaller(mortal_server.grpc_url).embed([PICTURE]).shape[0] == 1
    assert mortal_server.pid == pid


def test_loads_a_model_once_when_one_of_its_processes_dies(mortal_server: TritonServer) -> None:
    """Triton then ends the second decode process, which must not count as another death."""
    log, caller = mortal_server.log_file, GrpcCaller(mortal_server.grpc_url)
    loads, served = log.read_text().count(LOADING), log.read_text().count(SERVED)
    next(processes_of_model(mortal_server, "siglip_vision_process")).kill()
    wait_for_lines(log, SERVED, served + 1)
    time.sleep(6)
    assert caller.embed([PICTURE]).shape[0] == 1
    assert log.read_text().count(LOADING) == loads + 1


def test_replaces_killed_model_processes_under_load(mortal_server: TritonServer) -> None:
    """The processes of one model after the other are killed, while requests run."""
    log, caller = mortal_server.log_file, GrpcCaller(mortal_server.grpc_url)
    served = log.read_text().count(SERVED)
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
            for process in processes_of_model(mortal_server, model):
                process.kill()
            time.sleep(0.5)
            wait_until_served(caller)
    finally:
        stop.set()
        for thread in asking:
            thread.join()
    wait_for_lines(log, SERVED, served + 2)


def test_notices_a_death_during_a_reload(mortal_server: TritonServer) -> None:
    log = mortal_server.log_file
    loads = log.read_text().count(LOADING)
    for model in ("siglip_vision_process", "siglip_vision_model"):
        for process in processes_of_model(mortal_server, model):
            process.kill()
        wait_for_lines(log, LOADING, loads + 1)
    wait_until_served(GrpcCaller(mortal_server.grpc_url))


def test_starts_a_server_that_died_again_but_not_one_that_was_asked_to_end(log: Path) -> None:
    """The new server has the same ports, and no process of the old one is left."""
    settings = {"decoders": "1", "preprocess": "pil"}
    options = ServeOptions(REPOSITORY, str(TINY), models=("embed_image",), log_file=log, settings=settings)
    with TritonServer(options) as server:
        family = processes_of(server)
        os.kill(server.pid, signal.SIGABRT)
        wait_for_lines(log, "tritonserver: served again after", 1)
        assert not still_running(family)
        assert GrpcCaller(server.grpc_url).embed([PICTURE]).shape[0] == 1
        next(processes_of_model(server, "siglip_vision_process")).kill()
        wait_for_lines(log, "siglip_vision_process: served again after", 1)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 0
    assert log.read_text().count("starting it again") == 1


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


def test_serves_the_named_model_with_its_steps_and_leaves_nothing(log: Path) -> None:
    others = left_behind()  # of the servers that tests share, whose files may change meanwhile
    with TritonServer(ServeOptions(REPOSITORY, str(TINY), models=("explain_image",), log_file=log)) as server:
        steps = ["explain_maps", "explain_overlays", "explain_prompts", "explain_vectors"]
        towers = ["siglip_text_model", "siglip_vision_model", "siglip_vision_process"]
        assert server.models == ["explain_image", *steps, *towers]
        family = processes_of(server)
        assert len(family) > 2
        (folder,) = [path.name for path in left_behind() - others if path.is_dir()]
        assert len([path for path in left_behind() if path.name.startswith(folder)]) > 1
        found = explain(GrpcCaller(server.grpc_url), PICTURE, ["dog"], (*MAPS, "OVERLAY"))
        total = found["PATCH_MAPS"].sum((1, 2)) + found["UNATTRIBUTED"]
        np.testing.assert_allclose(total, found["SCORES"], atol=1e-5)
    assert not still_running(family)
    assert not [path for path in left_behind() if path.name.startswith(folder)]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_server_ends_with_a_killed_launcher(log: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from siglip_serve.launcher import *\n"
        "repository, checkpoint, log = sys.argv[1:]\n"
        "options = dict(models=('siglip_text_tokenize',), log_file=Path(log))\n"
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
    assert not still_running(family, timeout=20)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"checkpoint": "/nowhere"}, CheckpointError, "'/nowhere': no such directory"),
        ({"checkpoint": str(ROOT)}, CheckpointError, "has no config.json"),
        ({"checkpoint": "not a hub id"}, CheckpointError, "not a hub id of the form"),
        ({"settings": {"dtipe": "float32"}}, SettingsError, "SIGLIP_SERVE_DTIPE: no such setting"),
        ({"settings": {"dtype": "float33"}}, SettingsError, "got 'float33', expected one of auto, float32"),
        ({"settings": {"dtype": "float8"}, "device": "cpu"}, SettingsError, "dtype float8: not for CPUs"),
        ({"settings": {"dtype": "int8"}, "device": "cpu"}, SettingsError, "'calibration' is not given"),
        ({"settings": {"max_rows": "-1"}}, SettingsError, "got '-1', expected a whole number"),
        ({"model_repository": Path("/nowhere")}, ServerStartError, "'/nowhere': no such directory"),
        ({"model_repository": ROOT / "tests"}, ServerStartError, "no <model>/config.pbtxt in it"),
    ],
)
def test_refuses_options_before_the_server_starts(
    change: dict[str, object], error: type[Exception], expected: str, log: Path
) -> None:
    options = {"model_repository": REPOSITORY, "checkpoint": str(TINY), "log_file": log, **change}
    with pytest.raises(error, match=expected.replace("[", r"\[")), TritonServer(ServeOptions(**options)):  # type: ignore[arg-type]
        pass
    assert not log.exists()


def test_serves_int8_where_the_locale_is_c(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard output then takes ASCII only, but nncf draws a bar and a folder may have any name."""
    for name in ("LC_ALL", "LANG", "LC_CTYPE"):
        monkeypatch.setenv(name, "C")
    for name in ("PYTHONUTF8", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    pictures = tmp_path / "café"
    pictures.mkdir()
    for index in range(12):
        (pictures / f"{index}.jpg").write_bytes(encode(photo(80 + index, 60), "JPEG"))
    (pictures / "brisé.jpg").write_bytes(b"no picture")
    narrow = random_model({"image_size": 48, "patch_size": 16, "num_hidden_layers": 1})
    checkpoint = save_checkpoint(narrow, tmp_path / "model")
    settings = {"dtype": "int8", "calibration": str(pictures), "cache": str(tmp_path / "cache")}
    options = ServeOptions(
        REPOSITORY,
        str(checkpoint),
        models=("embed_image",),
        device="cpu",
        log_file=log,
        settings={**settings, "decoders": "1", "preprocess": "pil"},
    )
    with TritonServer(options) as server:
        embedding = GrpcCaller(server.grpc_url).embed([PICTURE])[0]
    said = log.read_text(encoding="utf-8", errors="replace")
    assert "calibrating int8 on 10 images" in said
    assert "int8 against float32: cosine 0.9" in said
    assert np.isfinite(embedding).all()
    assert np.linalg.norm(embedding) > 0


def test_lists_the_wrong_weights_once(tmp_path: Path, log: Path) -> None:
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    patch = config["vision_config"]["patch_size"]
    config["vision_config"]["patch_size"] = 2 * patch
    (checkpoint / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ServerStartError) as caught,
        # Two models load these weights.
        TritonServer(
            ServeOptions(
                REPOSITORY,
                str(checkpoint),
                models=("siglip_vision_model", "siglip_base_model"),
                log_file=log,
            )
        ),
    ):
        pass
    message = str(caught.value)
    assert "mis-shaped: vision_model.embeddings.patch_embedding.weight is [" in message
    assert f"3, {patch}, {patch}], expected [" in message
    assert message.count("vision_model.embeddings.patch_embedding.weight") == 1
    assert "Traceback" not in message
    assert len(message.splitlines()) < 8


def test_command_serves_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    """It prints its addresses, the checkpoint's note and a command that works; a taken port is refused."""
    http_port = free_port()
    command = [str(Path(sys.executable).parent / "siglip-serve"), "serve"]
    arguments = [
        f"--model-repository={REPOSITORY}",
        "--models=classify_image,embed_image",
        f"--http-port={http_port}",
        "--grpc-port=0",
        "--metrics-port=0",
        f"--log-file={tmp_path / 'log'}",
    ]
    environment = {**os.environ, "SIGLIP_SERVE_CHECKPOINT": str(TINY)}
    with subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            output = ""
            for line in process.stdout:
                output += line
                if "Ctrl-C" in line:
                    break
            assert output.count("\nsiglip-serve: note: siglip-tiny knows drawings only; ") == 1
            example = output.partition("Try it in another terminal:")[2].partition("Ctrl-C")[0].strip()
            answer = subprocess.run(["bash", "-c", example], capture_output=True, text=True, check=True)
            header, row = answer.stdout.splitlines()
            assert header.split(",")[:3] == ["path", "label", "automobile"]
            path, best, probability = row.split(",")[:3]
            assert (Path(path).absolute(), best) == (TINY / "samples" / "automobile.jpg", "automobile")
            assert float(probability) > 0.5
            arguments.append(f"--checkpoint={TINY}")
            second = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
            assert second.returncode == 1
            assert f"HTTP port {http_port} on 127.0.0.1 cannot be bound" in second.stderr
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert "stopped" in process.stdout.read()
        finally:
            process.terminate()


def status_once_it_listens(http_url: str) -> int:
    deadline = time.monotonic() + 120
    while True:
        try:
            return post_image(http_url, PICTURE)[0]
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_repository_is_served_by_a_plain_tritonserver(tmp_path: Path) -> None:
    """Without the launcher: dimensions by auto-completion, settings from the environment.

    The models of teams are left out and one process decodes, in place of eight: more only cost time.
    """
    of_teams = shutil.ignore_patterns("*team*", "jersey*", "siglip_base_model")
    repository = Path(shutil.copytree(REPOSITORY, tmp_path / "models", ignore=of_teams))
    decoders = repository / "siglip_vision_process" / "config.pbtxt"
    decoders.write_text(decoders.read_text().replace("count: 8", "count: 1"))
    http_port, log = free_port(), tmp_path / "log"
    environment = {
        **os.environ,
        "SIGLIP_SERVE_CHECKPOINT": str(TINY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    options = [
        f"--model-repository={repository}",
        "--model-config-name=cpu",
        f"--http-port={http_port}",
        "--http-address=127.0.0.1",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    command, libraries = server_command(tmp_path / "backends"), library_path(environment)
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

"""Load tests of a real server: `siglip-serve bench`, locust's web page, and perf_analyzer's input."""

from __future__ import annotations

import base64
import csv
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from front import Front
from PIL import Image
from programs import free_port
from siglip_serve_client.commands.bench import LOCUSTFILE
from siglip_serve_client.commands.bench.mix import photograph
from siglip_serve_client.commands.bench.perf_data import input_data
from siglip_serve_client.commands.bench.requests import METHOD
from siglip_serve_client.commands.options import API_KEY
from tritonclient.grpc import service_pb2
from wire import OPENER, TINY, GrpcCaller

from siglip_serve.launcher import TritonServer

Start: TypeAlias = Callable[..., "subprocess.Popen[str]"]
SECURE = ("grpcs", "https")
SHORT = ["--seconds", "1", "--warmup", "0.1"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `siglip-serve bench` with output in a folder of the test; ends what still runs."""
    started = []

    def run(name: str, *words: str, key: str = "") -> subprocess.Popen[str]:
        # Where the tests run in the background, they and their children would ignore Ctrl-C.
        plain = ["env", "--default-signal=INT"]
        command = str(Path(sys.executable).parent / "siglip-serve")
        program = [*plain, command, "bench", "-o", str(tmp_path / name)]
        environment = {**os.environ, API_KEY: key}
        pipe = subprocess.PIPE
        process = subprocess.Popen([*program, *words], stdout=pipe, stderr=pipe, text=True, env=environment)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def rows(folder: Path) -> list[dict[str, str]]:
    """The table; that the picture is there too."""
    with Image.open(folder / "bench.png") as image:
        assert image.size == (1200, 560)
    with (folder / "bench.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_loads_over_grpc_and_http(start: Start, server: TritonServer, tmp_path: Path) -> None:
    names = ("embed_image", "embed_text", "classify_image", "explain_image")
    weights = "embed_image:4,embed_text:2,classify_image:2,explain_image:2"
    models = ["--model", weights, "--mix", "64x128:3,320x240:1"]
    over_grpc = start("grpc", "--url", server.grpc_url, "--concurrency", "2", *models, *SHORT)
    web = ["--url", f"http://{server.http_url}", "--rate", "30", "--processes", "2"]
    over_http = start("http", *web, "--mix", "64x128", *SHORT)
    outputs = [process.communicate(timeout=90) for process in (over_grpc, over_http)]
    assert (over_grpc.returncode, over_http.returncode) == (0, 0), outputs
    (closed,), (opened,) = rows(tmp_path / "grpc"), rows(tmp_path / "http")
    assert (closed["concurrency"], closed["errors"], closed["late"]) == ("2", "0", "")
    assert (opened["rate"], opened["errors"], opened["processes"]) == ("30", "0", "2")
    for row in (closed, opened):
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])
        assert float(row["requests_per_second"]) > 0
        assert float(row["client_cores"]) > 0
    log = (tmp_path / "grpc" / "locust-2.log").read_text()
    assert all(f"grpc     {model}" in log for model in names)


def test_failures_are_counted(start: Start, server: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"no image")
    images = ["--images", str(TINY / "samples" / "dog.jpg"), str(tmp_path / "b.jpg")]
    words = ["--url", server.grpc_url, "--concurrency", "1", *SHORT]
    broken = start("broken", *words, *images)
    unknown = start("unknown", *words, "--model", "nothing")
    _, said = broken.communicate(timeout=60)
    assert broken.returncode == 1
    assert "x InvalidInputError: INPUT_IMAGE[0]: not a decodable image" in said
    (row,) = rows(tmp_path / "broken")
    assert int(row["errors"]) > 0
    assert float(row["requests_per_second"]) > 0
    _, said = unknown.communicate(timeout=60)
    assert unknown.returncode == 1
    assert "NOT_FOUND: Request for unknown model: 'nothing'" in said


def test_embeds_through_tls_with_a_key(start: Start, front: Front, tmp_path: Path) -> None:
    trust = ["--ca-file", str(front.certificate), "--concurrency", "1", *SHORT]
    good, bad = {}, {}
    for scheme in SECURE:
        url = ["--url", f"{scheme}://{front.address}"]
        good[scheme] = start(scheme, *url, *trust, key=front.key)
        bad[scheme] = start(f"bad-{scheme}", *url, *trust)
    distrustful = start("distrust", "--url", f"https://{front.address}", *SHORT, key=front.key)
    for scheme in SECURE:
        said = good[scheme].communicate(timeout=60)
        assert good[scheme].returncode == 0, said
        assert rows(tmp_path / scheme)[0]["errors"] == "0"
        assert front.key not in (tmp_path / scheme / "locust-1.log").read_text()
        assert "send a valid key" in bad[scheme].communicate(timeout=60)[1]
    assert f"{front.address}" in distrustful.communicate(timeout=60)[1]
    assert {process.returncode for process in (*bad.values(), distrustful)} == {1}


def test_ctrl_c_keeps_what_was_measured(start: Start, server: TritonServer, tmp_path: Path) -> None:
    process = start("two", "--url", server.grpc_url, "--rate", "20", "21", "--mix", "64x128", *SHORT)
    log = tmp_path / "two" / "locust-rate-21.log"
    wait_for(lambda: log.stat().st_size)  # locust has begun
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    with (tmp_path / "two" / "bench.csv").open(newline="") as file:
        assert [row["rate"] for row in csv.DictReader(file)] == ["20"]


def ask(url: str, form: dict[str, str] | None = None) -> Any:
    """Ask locust's web page for its text, or for the content of its JSON."""
    data = urllib.parse.urlencode(form).encode() if form else None
    with OPENER.open(url, data, timeout=10) as answer:
        text = answer.read().decode()
        return json.loads(text) if "json" in answer.headers["Content-Type"] else text


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of `what`; connections may fail until then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds} s")


def test_the_web_page_runs_a_test(server: TritonServer, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--url", server.grpc_url]
    command += ["--mix", "64x128", "--web-host", "127.0.0.1", "--web-port", str(port)]
    page = f"http://127.0.0.1:{port}"

    def finished() -> Any:
        entries = ask(f"{page}/stats/requests")["stats"]
        return [one for one in entries if one["name"] == "embed_image" and one["num_requests"] >= 5]

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, API_KEY: "hidden-key"})
        try:
            shown = wait_for(lambda: ask(page))
            assert "Locust" in shown
            assert "hidden-key" not in shown
            assert ask(f"{page}/swarm", {"user_count": "2", "spawn_rate": "2"})["success"]
            (entry,) = wait_for(finished)
            assert entry["num_failures"] == 0
            assert ask(f"{page}/stop", {"stop": "yes"})["success"]
        finally:
            process.terminate()
            process.wait(30)


def test_input_of_perf_analyzer_is_what_the_server_reads(server: TritonServer) -> None:
    images = [(TINY / "samples" / "dog.jpg").read_bytes(), photograph(64, 128)]
    data = json.loads(input_data(images))["data"]
    expected = GrpcCaller(server.grpc_url).embed(images)
    with grpc.insecure_channel(server.grpc_url) as channel:
        for row, embedding in zip(data, expected, strict=True):
            request = service_pb2.ModelInferRequest(model_name="embed_image")
            tensor = request.inputs.add(name="INPUT_IMAGE", datatype="BYTES")
            tensor.shape.extend([1, 1])
            request.raw_input_contents.append(base64.b64decode(row["INPUT_IMAGE"]["b64"]))
            answer = channel.unary_unary(METHOD)(request.SerializeToString(), timeout=60)
            raw = service_pb2.ModelInferResponse.FromString(answer).raw_output_contents[0]
            np.testing.assert_allclose(np.frombuffer(raw, np.float32), embedding, rtol=1e-3, atol=1e-4)

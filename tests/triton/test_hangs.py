"""A model process that lives but never answers, in a real server with a changed model."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from siglip_serve_client import Client
from tritonclient.utils import InferenceServerException
from wire import ROOT, TINY, GrpcCaller

from siglip_serve.launcher import ServeOptions, TritonServer

MODEL, MAGIC = "siglip_text_tokenize", "this text hangs the model"
HANGS = f'''

import threading

import triton_python_backend_utils as pb_utils

_execute = TritonPythonModel.execute


def _hang(self, requests):
    for request in requests:
        rows = pb_utils.get_input_tensor_by_name(request, "INPUT_TEXT").as_numpy()
        if b"{MAGIC}" in rows.reshape(-1).tolist():
            threading.Event().wait()
    return _execute(self, requests)


TritonPythonModel.execute = _hang
'''


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server whose tokenizer waits without end when it gets a certain text."""
    folder = tmp_path_factory.mktemp("hangs")
    repository = folder / "model_repository"
    shutil.copytree(ROOT / "model_repository", repository, ignore=shutil.ignore_patterns("__pycache__"))
    with (repository / MODEL / "1" / "model.py").open("a") as code:
        code.write(HANGS)
    options = ServeOptions(
        repository,
        str(TINY),
        log_file=folder / "log",
        models=("embed_text",),
        gateway_port=None,
        settings={"dtype": "float32"},
        hung_after=3.0,
    )
    with TritonServer(options) as running:
        yield running


def processes(hanging: TritonServer) -> list[psutil.Process]:
    family = psutil.Process(hanging.pid).children(recursive=True)
    alive = [process for process in family if process.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if any(f"/{MODEL}/" in word for word in process.cmdline())]


def said(log: Path) -> list[str]:
    lines = (line for line in log.read_text().splitlines() if line.startswith(f"siglip-serve: {MODEL}: "))
    return [line.removeprefix(f"siglip-serve: {MODEL}: ") for line in lines]


def hang(hanging: TritonServer) -> str:
    """Send the text that hangs the model once, and return how that ends."""
    caller = GrpcCaller(hanging.grpc_url)
    tensor = caller.module.InferInput("INPUT_TEXT", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[MAGIC.encode()]], dtype=np.object_))
    with pytest.raises(InferenceServerException) as caught:
        caller.client.infer("embed_text", [tensor])
    return str(caught.value)


@pytest.mark.parametrize("others", [8, 0])
def test_a_hung_process_costs_other_callers_time_and_no_answers(others: int, hanging: TritonServer) -> None:
    """Without other callers nothing waits in a queue, until the launcher asks the model itself."""
    before = len(said(hanging.log_file))
    (process,) = processes(hanging)
    with Client(f"grpc://{hanging.grpc_url}", timeout=120) as client, ThreadPoolExecutor(others + 1) as pool:
        right = client.embed_text("a dog")
        victim = pool.submit(hang, hanging)
        time.sleep(1)
        answers = pool.map(lambda _: client.embed_text("a dog"), range(2 * others))
        for answer in answers:
            np.testing.assert_allclose(answer, right, atol=1e-5)
        assert "is not healthy" in victim.result(120)
        np.testing.assert_allclose(client.embed_text("a dog"), right, atol=1e-5)
    hung, died, *rest = said(hanging.log_file)[before:]
    assert hung.startswith(f"process {process.pid} did nothing for 3 s while ")
    assert hung.endswith("waited for it; killing it")
    assert died == f"model process {process.pid} died; loading the model again"
    assert all(line.startswith("served again after ") for line in rest)
    assert process not in processes(hanging)


def test_leaves_an_idle_and_a_busy_server_alone(hanging: TritonServer) -> None:
    before, pids = said(hanging.log_file), [process.pid for process in processes(hanging)]
    end = threading.Event()

    def call() -> None:
        with Client(f"grpc://{hanging.grpc_url}", timeout=120) as client:
            while not end.is_set():
                client.embed_texts([f"text {time.monotonic_ns()} {row}" for row in range(64)])

    time.sleep(6)  # idle
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(call) for _ in range(8)]
        time.sleep(6)
        end.set()
        for one in calls:
            one.result()
    assert said(hanging.log_file) == before
    assert [process.pid for process in processes(hanging)] == pids

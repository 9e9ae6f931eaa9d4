"""Callers whose strings are not as long as they say, beside honest callers of the same batches."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import psutil
import pytest
from images import encode, photo
from siglip_serve_client import Client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from wire import ROOT, TINY, post

from siglip_serve.launcher import ServeOptions, TritonServer

PICTURE = encode(photo(60, 40), "JPEG")
HONEST, ROUNDS, LIES = 20, 5, 5
Tensors = dict[str, tuple[list[int], list[bytes]]]
ONE_PICTURE: Tensors = {"INPUT_IMAGE": ([1, 1], [PICTURE])}
ONE_TEXT: Tensors = {"INPUT_TEXT": ([1, 1], [b"a dog"])}
# Models whose inputs are strings, with the shape and the rows of each.
STRINGS: dict[str, Tensors] = {
    "embed_image": ONE_PICTURE,
    "embed_text": ONE_TEXT,
    "classify_image": {**ONE_PICTURE, "LABELS": ([2], [b"dog", b"cat"])},
    "siglip_vision": ONE_PICTURE,
    "siglip_text": ONE_TEXT,
    "siglip_vision_process": ONE_PICTURE,
    "siglip_text_tokenize": ONE_TEXT,
    "jersey_process": {"CROPS": ([1], [PICTURE])},
    "explain_image": {**ONE_PICTURE, "PROMPTS": ([1], [b"a dog"])},
}


def pack(rows: list[bytes], lie: int) -> bytes:
    lengths = [len(row) for row in rows]
    lengths[-1] += lie
    return b"".join(struct.pack("<I", length) + row for length, row in zip(lengths, rows, strict=True))


def over_grpc(server: TritonServer, model: str, tensors: Tensors, lie: int) -> str:
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, (shape, rows) in tensors.items():
        message.inputs.add(name=name, datatype="BYTES", shape=shape)
        message.raw_input_contents.append(pack(rows, lie))
    with grpc.insecure_channel(server.grpc_url) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=60)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return "OK"


def over_http(server: TritonServer, model: str, tensors: Tensors, lie: int) -> str:
    data = {name: pack(rows, lie) for name, (_, rows) in tensors.items()}
    inputs = [
        {
            "name": name,
            "shape": tensors[name][0],
            "datatype": "BYTES",
            "parameters": {"binary_data_size": len(packed)},
        }
        for name, packed in data.items()
    ]
    text = json.dumps({"inputs": inputs}).encode()
    url = f"http://{server.http_url}/v2/models/{model}/infer"
    status, answer = post(
        url, text + b"".join(data.values()), {"Inference-Header-Content-Length": str(len(text))}
    )
    return "OK" if status == 200 else f"{status}: {json.loads(answer)['error']}"


Send = Callable[[TritonServer, str, Tensors, int], str]


@pytest.mark.parametrize("send", [over_grpc, over_http])
@pytest.mark.parametrize("model", STRINGS)
def test_refuses_a_liar_and_serves_twenty_honest_callers(
    model: str, send: Send, server: TritonServer
) -> None:
    """Without a check a few of these requests share a batch with a lie."""
    tensors, refused = STRINGS[model], "INVALID_ARGUMENT: " if send is over_grpc else "400: "
    assert send(server, model, tensors, 0) == "OK"
    done = threading.Event()

    def lie() -> set[str]:
        told = {send(server, model, tensors, 1)}
        while not done.is_set():
            told.add(send(server, model, tensors, 1))
        return told

    with ThreadPoolExecutor(HONEST + 1) as pool:
        liar = pool.submit(lie)
        try:
            rounds = ROUNDS if model != "explain_image" else 1
            honest = list(pool.map(lambda _: send(server, model, tensors, 0), range(HONEST * rounds)))
        finally:
            done.set()
    assert set(honest) == {"OK"}
    name, (_, rows) = next(iter(tensors.items()))
    length = len(rows[-1])
    expected = f"{refused}{name}[{len(rows) - 1}]: its length says {length + 1} bytes, but {length} follow"
    assert liar.result() == {expected}


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [
        ("team_predict", "EMBEDDING", [2**33, 2**33]),
        ("explain_overlays", "HEAT", [2**21, 2**21, 2**22]),
        ("label_scores", "PROMPT_EMBEDDING", [2**32, 2**32]),
    ],
)
def test_a_shape_that_overflows_ends_no_process(
    model: str, name: str, shape: list[int], server: TritonServer
) -> None:
    """Triton counts its elements in 64 bits, so that no bytes at all are as many as it needs."""
    assert name in (ROOT / "model_repository" / model / "config.pbtxt").read_text()
    before = {process.pid for process in psutil.Process(server.pid).children(recursive=True)}
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name=name, datatype="FP32", shape=shape)
    message.raw_input_contents.append(b"")
    with grpc.insecure_channel(server.grpc_url) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=60)
    told = f"{name}: shape {shape}, expected at most {2**40} elements"
    assert (caught.value.code().name, caught.value.details()) == ("INVALID_ARGUMENT", told)
    text = json.dumps({"inputs": [{"name": name, "shape": shape, "datatype": "FP32", "data": []}]}).encode()
    status, answer = post(f"http://{server.http_url}/v2/models/{model}/infer", text, {})
    assert (status, f"shape {shape}, expected at most" in json.loads(answer)["error"]) == (400, True)
    assert {process.pid for process in psutil.Process(server.pid).children(recursive=True)} >= before


def test_clients_ask_again_where_callers_speak_with_triton_itself(tmp_path: Any) -> None:
    options = ServeOptions(
        ROOT / "model_repository",
        str(TINY),
        log_file=tmp_path / "log",
        models=("embed_text",),
        gateway_port=None,
        direct_grpc=True,
        settings={"dtype": "float32"},
    )
    with TritonServer(options) as server, Client(f"grpc://{server.grpc_url}") as client:
        right = client.embed_text("a dog")

        def lie() -> None:
            for _ in range(LIES):
                told = over_grpc(server, "embed_text", STRINGS["embed_text"], 1)
                assert "incomplete string data" in told
                time.sleep(0.1)  # a client asks five times

        with ThreadPoolExecutor(HONEST + 1) as pool:
            liar = pool.submit(lie)
            while not liar.done():  # as many honest calls as fit, however fast the machine is
                for answer in pool.map(lambda _: client.embed_text("a dog"), range(HONEST)):
                    np.testing.assert_allclose(answer, right, atol=1e-5)
            liar.result()
        server.stop(
            timeout=2
        )  # at its end Triton may wait for 30 s for requests of batches that a lie failed

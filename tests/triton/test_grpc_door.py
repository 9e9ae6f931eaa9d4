"""The gRPC door before a real Triton, which early deadlines and cancels would end."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from images import encode, photo
from siglip_serve_client import Client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor
from wire import GrpcCaller, decoded

from siglip_gateway.doors.grpc_door import open_door
from siglip_serve.launcher import TritonServer

SMALL, LARGE = encode(photo(80, 60), "JPEG"), encode(photo(2400, 1600), "JPEG")


def request(picture: bytes) -> Any:
    message = service_pb2.ModelInferRequest(model_name="embed_image")
    message.inputs.add(name="INPUT_IMAGE", datatype="BYTES", shape=[1, 1])
    message.raw_input_contents.append(serialize_byte_tensor(np.array([[picture]], dtype=np.object_)).item())
    return message


@pytest.fixture
def stub(server: TritonServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc_url) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def test_triton_outlives_early_deadlines_and_cancels(server: TritonServer, stub: Any) -> None:
    """Without the door this Triton lives for two seconds."""
    pid, end, message = server.pid, time.monotonic() + 5, request(SMALL)

    def give_up(seed: int) -> Counter[str]:
        rng, outcomes = random.Random(seed), Counter[str]()
        while time.monotonic() < end:
            call = stub.ModelInfer.future(message, timeout=rng.choice((0.0005, 0.001, 0.002, 0.004, 0.008)))
            if rng.random() < 0.25:
                time.sleep(0.001)
                call.cancel()
            try:
                call.result()
                outcomes["OK"] += 1
            except grpc.FutureCancelledError:
                outcomes["CANCELLED"] += 1
            except grpc.RpcError as error:
                outcomes[error.code().name] += 1
        return outcomes

    with ThreadPoolExecutor(16) as pool:
        outcomes = sum(pool.map(give_up, range(16)), Counter[str]())
    assert server.pid == pid
    assert outcomes["DEADLINE_EXCEEDED"] > 100
    assert outcomes.keys() <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}
    assert np.isfinite(GrpcCaller(server.grpc_url).embed([SMALL])).all()


def test_computes_little_for_callers_whose_deadline_passed(server: TritonServer, stub: Any) -> None:
    """Their requests have no timeout of their own."""
    metrics, message = f"{server.address}:{server.metrics_port}", request(LARGE)
    stub.ModelInfer(message, timeout=60)
    calls = [stub.ModelInfer.future(message, timeout=0.2) for _ in range(200)]
    late = sum(call.exception() is not None for call in calls)
    before = decoded(metrics)
    stub.ModelInfer(request(SMALL), timeout=60)
    time.sleep(1)
    assert late > 50  # or this test asks for too little
    assert decoded(metrics) - before - 1 <= late / 10  # some were being decoded


def test_refuses_an_overload_and_loses_no_request(server: TritonServer) -> None:
    """Through a door with few places: of many calls at once some are answered and the others refused."""

    async def burst() -> Counter[str]:
        async with (
            open_door("127.0.0.1:0", server.grpc_url, max_in_flight=2, max_waiting=6) as (_, _, port),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            message = request(LARGE)
            calls = [infer(message, timeout=60) for _ in range(40)]
            return Counter([(await call.code()).name for call in calls])

    outcomes = asyncio.run(burst())
    assert outcomes.keys() == {"OK", "UNAVAILABLE"}
    assert outcomes["OK"] >= 8


def test_streams_are_answered_and_may_be_given_up(server: TritonServer) -> None:
    """tritonclient cancels the stream when it closes it with requests in flight."""
    pid, expected = server.pid, GrpcCaller(server.grpc_url).embed([SMALL])
    tensor = triton.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
    for count, picture in ((3, SMALL), (20, LARGE)):
        tensor.set_data_from_numpy(np.array([[picture]], dtype=np.object_))
        answers: list[Any] = []
        arrived = threading.Semaphore(0)

        def receive(result: Any, error: Any, answers: list[Any] = answers, arrived: Any = arrived) -> None:
            answers.append((result, error))
            arrived.release()

        client = triton.InferenceServerClient(server.grpc_url)
        client.start_stream(receive)
        for _ in range(count):
            client.async_stream_infer("embed_image", [tensor])
        for _ in range(3):
            assert arrived.acquire(timeout=60)
        client.stop_stream(cancel_requests=count > 3)
        client.close()
        assert [error for _, error in answers[:3]] == [None] * 3
        if picture is SMALL:
            np.testing.assert_allclose(answers[0][0].as_numpy("EMBEDDING"), expected, rtol=1e-3, atol=1e-4)
    assert np.isfinite(GrpcCaller(server.grpc_url).embed([SMALL])).all()
    assert server.pid == pid


def test_a_killed_door_is_started_again(server: TritonServer) -> None:
    with Client(server.grpc_url) as client:
        client.embed_image(SMALL)
        for door in doors(server):
            door.kill()
        begin = time.monotonic()
        client.embed_image(SMALL)
        assert time.monotonic() - begin < 20
    assert "grpc door: process" in server.log_file.read_text()


def doors(server: TritonServer) -> list[psutil.Process]:
    """The processes of the gRPC door of one server."""
    listen = f"--listen {server.grpc_url}"
    return [
        child for child in psutil.Process().children(recursive=True) if listen in " ".join(child.cmdline())
    ]

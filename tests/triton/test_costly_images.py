"""Files that keep a decoder busy: they are refused, and other callers are answered meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from images import encode, photo
from tritonclient.utils import InferenceServerException
from wire import ROOT, TINY, GrpcCaller

from siglip_serve.launcher import ServeOptions, TritonServer

GOOD = encode(photo(80, 60), "JPEG")
GIF = encode(photo(80, 60), "GIF")
# An extension of 8,000,000 blocks, each of which is a step in Python.
FRAME = 13 + 3 * 2 ** (1 + (GIF[10] & 7))  # behind the header and its palette
COSTLY = GIF[:FRAME] + b"!\x01" + b"\1." * 8_000_000 + b"\0" + GIF[FRAME:]


@pytest.fixture
def two_decoders(log: Path) -> Iterator[TritonServer]:
    """A server with two decoders and little patience, so that it also runs out on a fast processor."""
    settings = {"dtype": "float32", "decoders": "2", "max_decode_seconds": "0.4"}
    options = ServeOptions(
        ROOT / "model_repository", str(TINY), models=("embed_image",), log_file=log, settings=settings
    )
    with TritonServer(options) as running:
        yield running


def refusal(server: TritonServer) -> tuple[str, str]:
    """Status and message of a request with a costly row behind a good one."""
    try:
        GrpcCaller(server.grpc_url).embed([GOOD, COSTLY, COSTLY])
    except InferenceServerException as error:
        return error.status().removeprefix("StatusCode."), error.message()
    return "OK", ""


def test_refuses_costly_rows_and_answers_other_callers_meanwhile(two_decoders: TritonServer) -> None:
    caller, answered = GrpcCaller(two_decoders.grpc_url), 0
    with ThreadPoolExecutor(2) as pool:
        refused = [pool.submit(refusal, two_decoders) for _ in range(2)]
        while not all(one.done() for one in refused):
            assert np.isfinite(caller.embed([GOOD])).all()
            answered += 1
    assert answered
    results = [one.result() for one in refused]
    messages = [message for status, message in results if status == "INVALID_ARGUMENT"]
    assert messages
    assert all("INPUT_IMAGE[1]: GIF takes more than 0.3 s of CPU time" in message for message in messages)
    assert {status for status, _ in results} <= {"INVALID_ARGUMENT", "UNAVAILABLE"}
    # The decoders are back.
    assert np.isfinite(caller.embed([GIF] * 8)).all()

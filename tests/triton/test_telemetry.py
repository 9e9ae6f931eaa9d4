"""The metrics endpoint: Triton's metrics and the project's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from images import encode, photo
from tritonclient.utils import InferenceServerException
from wire import OPENER, GrpcCaller

from siglip_serve.launcher import TritonServer

PICTURE = encode(photo(64, 48, 3), "JPEG")


def figures(server: TritonServer) -> dict[str, float]:
    """The project's own metrics by name and labels."""
    with OPENER.open(f"http://{server.address}:{server.metrics_port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        name: float(value) for name, value in re.findall(r"^(siglip_serve_\S+) (\S+)$", text, re.MULTILINE)
    }


def added(server: TritonServer, call: Callable[[], Any]) -> dict[str, float]:
    """Growth of each metric through a call, which may be refused."""
    before = figures(server)
    with suppress(InferenceServerException):
        call()
    after = figures(server)
    return {
        name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)
    }


def test_serves_tritons_metrics(server: TritonServer) -> None:
    GrpcCaller(server.grpc_url).embed([PICTURE])
    with OPENER.open(f"http://{server.address}:{server.metrics_port}/metrics", timeout=60) as answer:
        assert b'nv_inference_request_success{model="siglip_vision_model"' in answer.read()


def test_counts_and_times_images_and_rows(server: TritonServer) -> None:
    caller = GrpcCaller(server.grpc_url)
    grown = added(server, lambda: caller.embed([PICTURE] * 3))
    assert grown['siglip_serve_images_total{model="siglip_vision_process"}'] == 3
    assert grown['siglip_serve_tower_rows_total{model="siglip_vision_model"}'] == 3
    assert grown['siglip_serve_batch_rows_count{model="siglip_vision_model"}'] == 1
    assert grown['siglip_serve_batch_rows_sum{model="siglip_vision_model"}'] == 3
    assert grown['siglip_serve_batch_rows_bucket{model="siglip_vision_model",le="4"}'] == 1
    assert 'siglip_serve_batch_rows_bucket{model="siglip_vision_model",le="2"}' not in grown
    for name in ("decode_seconds", "compute_seconds"):
        model = "siglip_vision_process" if name == "decode_seconds" else "siglip_vision_model"
        assert grown[f'siglip_serve_{name}_count{{model="{model}"}}'] == 1
        assert 0 < grown[f'siglip_serve_{name}_sum{{model="{model}"}}'] < 10
    assert not any("rejected" in name for name in grown)


@pytest.mark.parametrize(
    ("row", "parameters", "reason"),
    [
        (b"no image", {}, "image"),
        (encode(photo(64, 48, 3), "JPEG")[:200], {}, "image"),
        (b"\xff" * (2**25 + 1), {}, "image_too_large"),
        (PICTURE, {"normalize": True}, "parameter"),
        (PICTURE, {"embed_model": "nosuch"}, "parameter"),
    ],
)
def test_counts_refused_images_by_reason(
    server: TritonServer, row: bytes, parameters: dict[str, Any], reason: str
) -> None:
    grown = added(server, lambda: GrpcCaller(server.grpc_url).embed([row], **parameters))
    refused = {name: value for name, value in grown.items() if "rejected" in name}
    assert refused == {f'siglip_serve_rejected_total{{model="siglip_vision_process",reason="{reason}"}}': 1}
    assert 'siglip_serve_tower_rows_total{model="siglip_vision_model"}' not in grown


def test_counts_a_refused_text(server: TritonServer) -> None:
    tensor = triton.InferInput("INPUT_TEXT", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"\xff\xfe"]], dtype=np.object_))
    client = triton.InferenceServerClient(server.grpc_url)
    grown = added(server, lambda: client.infer("embed_text", [tensor]))
    assert grown == {'siglip_serve_rejected_total{model="siglip_text_tokenize",reason="text"}': 1}

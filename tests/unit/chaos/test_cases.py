"""The cases of the fuzzer: every kind can be made, and a name makes the same bytes in any process."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
from images import encode, photo
from paths import ROOT

from siglip_serve.teams.state import TeamState
from tests.chaos.cases import SHARES, case, kind_of_number
from tests.chaos.cases.base import World
from tests.chaos.cases.files import operate, pieces_of
from tests.chaos.messages import Infer, grpc_bytes, http_bytes, http_outputs_of, of_array, of_rows, outputs_of

NUMBERS = 30


def state() -> bytes:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"origin": (128,), "nuisances": (2, 128), "components": (8, 128)}.items()
    }
    inner = {"centroids": (2, 8), "axes": (8, 8), "view": (2, 8)}
    arrays |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in inner.items()}
    return TeamState(
        {"encoder": "x"}, spreads=np.ones(9, np.float32), scales=np.ones(2, np.float32), **arrays
    ).to_bytes()


@functools.cache
def world() -> World:
    files = {"PNG": "png rgb", "JPEG": "jpeg", "WEBP": "webp", "TIFF": "tiff", "GIF": "gif", "BMP": "bmp"}
    pictures = {name: encode(photo(60, 40), kind) for kind, name in files.items()}
    crops = [encode(photo(24, 60, seed), "JPEG") for seed in range(8)]
    return World(pictures, {"text": b"hello", "empty": b""}, crops, state(), names=sorted(pictures))


def digest(names: Iterable[str]) -> str:
    """One hash of the bytes of cases."""
    found = hashlib.sha256()
    for name in names:
        kind, seed, number = name.split(":")
        made = case(kind, int(seed), int(number), world())
        found.update(json.dumps([made.name, made.about, made.sent.via, made.sent.method]).encode())
        found.update(made.sent.body)
    return found.hexdigest()


def names(seed: int) -> list[str]:
    # Costly files take long to make; their kind has a test of its own.
    kinds = [kind for kind in SHARES if kind != "costly"]
    return [f"{kind}:{seed}:{number}" for kind in kinds for number in range(NUMBERS)]


def test_a_name_makes_the_same_bytes_in_another_process() -> None:
    code = (
        "import sys; sys.path[:0] = ['tests/support']\n"
        "from tests.unit.chaos.test_cases import digest, names\n"
        "print(digest(names(1)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(names(1))


def test_another_seed_makes_other_bytes() -> None:
    assert digest(names(2)) != digest(names(1))


def test_the_numbers_of_a_run_cover_every_kind() -> None:
    kinds = [kind_of_number(1, number) for number in range(5000)]
    assert set(kinds) == set(SHARES)
    assert kinds == [kind_of_number(1, number) for number in range(5000)]
    assert {kind_of_number(1, number, ["text", "json"]) for number in range(99)} == {"text", "json"}


def test_cases_of_a_kind_differ() -> None:
    for kind in SHARES:
        if kind != "costly":
            bodies = {case(kind, 1, number, world()).sent.body for number in range(20)}
            assert len(bodies) > 10, kind


def test_costly_files_are_small() -> None:
    for number in range(12):
        made = case("costly", 1, number, world())
        assert 50 < len(made.sent.body) < 2**25


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("PNG", 4), ("JPEG", 8), ("WEBP", 2), ("TIFF", 8), ("AVIF", 8), ("GIF", 1), ("BMP", 1)],
)
def test_files_are_split_into_pieces_that_make_the_whole(kind: str, pieces: int) -> None:
    data = encode(photo(60, 40), kind)
    found, parts = pieces_of(data)
    assert found == kind.lower()
    assert len(parts) >= pieces
    assert b"".join(parts) == data


def test_operations_change_files_and_survive_what_they_made() -> None:
    import random

    for name in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "GIF", "BMP"):
        data = original = encode(photo(60, 40), name)
        changed = 0
        for number in range(200):
            data = operate(data, random.Random(number))[1] or original
            changed += data != original
        assert changed > 190


def test_a_request_is_the_same_over_both_protocols() -> None:
    from tritonclient.grpc import service_pb2

    tensors = [of_rows("A", [b"x", b""]), of_array("B", np.array([[1.5]], np.float32))]
    request = Infer("m", tensors, {"flag": True, "n": 3, "s": "x", "none": None}, ["O"])
    message = service_pb2.ModelInferRequest.FromString(grpc_bytes(request))
    assert [tensor.name for tensor in message.inputs] == ["A", "B"]
    assert list(message.raw_input_contents) == [tensor.data for tensor in tensors]
    assert (message.parameters["flag"].bool_param, message.parameters["n"].int64_param) == (True, 3)
    head, _, body = http_bytes(request).partition(b"\r\n\r\n")
    size = int(head.decode().partition("Inference-Header-Content-Length: ")[2])
    assert json.loads(body[:size])["parameters"] == {**request.parameters, "binary_data_output": True}
    assert body[size:] == tensors[0].data + tensors[1].data
    assert f"Content-Length: {len(body)}\r\n" in head.decode()


def test_outputs_are_read_by_their_types() -> None:
    from tritonclient.grpc import service_pb2

    answer = service_pb2.ModelInferResponse()
    for tensor in (of_array("F", np.array([[1.5, 2]], np.float32)), of_rows("S", [b"ab", b""], [2])):
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.append(tensor.data)
    found = outputs_of(answer.SerializeToString())
    assert found["F"].tolist() == [[1.5, 2]]
    assert found["S"].tolist() == [b"ab", b""]


def test_outputs_over_http_are_read_by_their_types() -> None:
    tensors = [of_array("F", np.array([[1.5, 2]], np.float32)), of_rows("S", [b"ab", b"\xff{"], [2])]
    outputs = [
        {
            "name": t.name,
            "datatype": t.datatype,
            "shape": t.shape,
            "parameters": {"binary_data_size": len(t.data)},
        }
        for t in tensors
    ]
    body = json.dumps({"outputs": outputs}).encode() + b"".join(tensor.data for tensor in tensors)
    found = http_outputs_of(body)
    assert found["F"].tolist() == [[1.5, 2]]
    assert found["S"].tolist() == [b"ab", b"\xff{"]

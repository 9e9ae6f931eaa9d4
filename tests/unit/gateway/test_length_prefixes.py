"""The strings of binary tensors, in requests as clients of both protocols and attackers write them."""

from __future__ import annotations

import asyncio
import json
import random
import re
import struct
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from tritonclient.grpc import service_pb2

from siglip_gateway.doors.grpc_tensors import check_request, model_of
from siglip_gateway.doors.http_tensors import check_binary_inputs
from siglip_gateway.doors.json_shapes import refuse_huge_shapes
from siglip_gateway.doors.length_prefixes import Pieces, TensorError, check_prefixes
from siglip_gateway.doors.refusal import RefusedError


def pack(*rows: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(row)) + row for row in rows)


def message(*inputs: tuple[str, str, list[int], bytes | None]) -> Any:
    """A gRPC request; an input without bytes is in shared memory."""
    built = service_pb2.ModelInferRequest(model_name="m", id="7")
    for name, datatype, shape, data in inputs:
        added = built.inputs.add(name=name, datatype=datatype, shape=shape)
        if data is None:
            added.parameters["shared_memory_byte_size"].int64_param = 9
            added.parameters["shared_memory_region"].string_param = "region"
        else:
            built.raw_input_contents.append(data)
    return built


LIE = b"\x05\0\0\0four"
REFUSED = [
    ([1], LIE, "X[0]: its length says 5 bytes, but 4 follow"),
    ([2, 1], pack(b"honest") + LIE, "X[1]: its length says 5 bytes, but 4 follow"),
    ([1], b"\xff\xff\xff\xff", "X[0]: its length says 4294967295 bytes, but 0 follow"),
    ([1], pack(b"a") + b"\0\0\0", "X[1]: 3 bytes are left, expected a length of 4 bytes"),
    ([1], b"", "X: 0 strings, expected 1 for the shape [1]"),
    ([2, 3], pack(*[b"a"] * 5), "X: 5 strings, expected 6 for the shape [2, 3]"),
    ([0], pack(b""), "X: 1 strings, expected 0 for the shape [0]"),
    ([2**16 + 1], pack(*[b""] * (2**16 + 1)), "X: more than 65536 strings"),
]
ACCEPTED = [
    ([1], pack(b"a")),
    ([2, 2], pack(b"", b"a", b"bc", b"d" * 300)),
    ([], pack(b"a")),
    ([0, 1], b""),
    ([-1], pack(b"a", b"b")),  # Triton refuses the shape
    ([2**16, 1], pack(*[b"ab"] * 2**16)),
]


@pytest.mark.parametrize(("shape", "data", "told"), REFUSED)
def test_refuses_over_grpc(shape: list[int], data: bytes, told: str) -> None:
    """The liar stands between an honest tensor, one in shared memory, and numbers."""
    inputs: list[tuple[str, str, list[int], bytes | None]] = [
        ("A", "BYTES", [2], pack(b"a", b"b")),
        ("S", "BYTES", [1], None),
        ("X", "BYTES", shape, data),
        ("N", "FP32", [2], LIE),
    ]
    with pytest.raises(TensorError) as caught:
        check_request(message(*inputs).SerializeToString())
    assert str(caught.value).startswith(told)
    honest = message(*inputs[:2], *inputs[3:])
    assert len(check_request(honest.SerializeToString())) == 7


@pytest.mark.parametrize(("shape", "data"), ACCEPTED)
def test_accepts_over_grpc(shape: list[int], data: bytes) -> None:
    check_request(message(("X", "BYTES", shape, data)).SerializeToString())


def test_follows_protobuf_where_a_message_says_things_twice() -> None:
    """Protobuf takes the last name and type, and joins shapes; a number may have more bytes than needed."""
    twice = message(("Y", "FP32", [2], b"")).inputs[0].SerializeToString() + b"\x12\x05BYTES\x0a\x01X\x18\x01"
    raw = bytes([7 << 3 | 2 | 0x80, 0x80, 0x00, len(LIE)]) + LIE
    sent = bytes([5 << 3 | 2, len(twice)]) + twice + raw
    told = service_pb2.ModelInferRequest.FromString(sent)
    assert (told.inputs[0].datatype, list(told.inputs[0].shape), told.raw_input_contents[0]) == (
        "BYTES",
        [2, 1],
        LIE,
    )
    beyond = bytes([7 << 3 | 2 | 0x80, 0x80, 0x80, 0x80, 0x10])  # a tag with a bit that some parsers drop
    for same in (sent, sent.replace(raw[:3], beyond)):
        with pytest.raises(TensorError, match=r"X\[0\]: its length says 5 bytes"):
            check_request(same)


def body(inputs: list[dict[str, Any]], *tensors: bytes) -> tuple[bytes, int]:
    text = json.dumps({"inputs": inputs}).encode()
    return text + b"".join(tensors), len(text)


def described(shape: Any, data: bytes, name: str = "X", datatype: str = "BYTES") -> dict[str, Any]:
    about = {"name": name, "shape": shape, "datatype": datatype}
    return about | {"parameters": {"binary_data_size": len(data)}}


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 3, 1000, 10**7])
@pytest.mark.parametrize(("shape", "data", "told"), REFUSED[:-1])
def test_refuses_over_http(shape: list[int], data: bytes, told: str, size: int) -> None:
    """The body comes in pieces of any size."""
    honest, numbers = pack(b"a", b"b" * 5000), b"\xff" * 8
    inputs = [described([2], honest, "A"), {"name": "J", "shape": [1], "datatype": "BYTES", "data": ["a"]}]
    inputs += [described([2], numbers, "N", "FP32"), described(shape, data)]
    sent, text = body(inputs, honest, numbers, data)
    if not data:
        sent += b"more"
    with pytest.raises(RefusedError) as caught:
        check_binary_inputs(pieces(sent, size), len(sent), text)
    assert (caught.value.status, str(caught.value).startswith(told)) == (400, True)


@pytest.mark.parametrize(("shape", "data"), [*ACCEPTED, (None, pack(b"a")), ([1.5], pack(b"a"))])
def test_accepts_over_http(shape: Any, data: bytes) -> None:
    sent, text = body([described(shape, data)], data)
    check_binary_inputs([sent], len(sent), text)


def test_reads_json_as_triton_does() -> None:
    """The first of two members of a name counts. Escapes, foreign bytes and control characters are read."""
    about = (
        b'{"x": "\xff\\ud800\t", "inputs": [{"name": "gr\xc3\xb6\xc3\x9fe", "datatype": "BY\\u0054ES", '
        b'"shape": [1], "parameters": {"binary_data_si\\u007ae": 8, "binary_data_size": 0}, '
        b'"parameters": {}}], '
        b'"inputs": []}'
    )
    with pytest.raises(RefusedError, match=r"größe\[0\]: its length says 5 bytes, but 4 follow"):
        check_binary_inputs([about + LIE], len(about + LIE), len(about))


@pytest.mark.parametrize(
    ("text", "told"),
    [(b"{", "failed to parse the request JSON"), (b" " * (2**22 + 1), "4194305 bytes of JSON before binary")],
)
def test_refuses_json_that_it_cannot_read(text: bytes, told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        check_binary_inputs([text + LIE], len(text + LIE), len(text))


@pytest.mark.parametrize(
    "about",
    [
        [],
        {"inputs": 1},
        {"inputs": [1, {"parameters": 2}, {"parameters": {"binary_data_size": "8"}}]},
        {"inputs": [{"parameters": {"binary_data_size": -8}}]},
        {"inputs": [described([1], bytes(99))]},
        {"inputs": [described([1], LIE, datatype="FP64")]},
    ],
)
def test_leaves_to_triton_what_is_wrong_in_other_ways(about: Any) -> None:
    text = json.dumps(about).encode()
    check_binary_inputs([text + LIE], len(text + LIE), len(text))


def test_there_is_nothing_to_check_without_json_or_without_binary_data() -> None:
    check_binary_inputs([LIE], len(LIE), 0)
    check_binary_inputs([b"{"], 1, 1)
    check_binary_inputs([b"{"], 1, 10**17)


HUGE = [[2**33, 2**33], [2**21, 2**21, 2**22], [2**40 + 1], [0, 2**63 - 1], [-(2**32), 2**32], [1, -(2**63)]]


@pytest.mark.parametrize("shape", HUGE)
def test_refuses_shapes_that_overflow(shape: list[int]) -> None:
    """A shape counts wherever it stands in the JSON, and however it is written."""
    with pytest.raises(TensorError) as caught:
        check_request(message(("N", "FP32", shape, b"four")).SerializeToString())
    told = f"shape {shape}, expected at most {2**40} elements"
    assert str(caught.value) == f"N: {told}"
    filler = {"data": ["[" * 9 + '"shape": [1]' * 9000], "shape": [1, 2]}
    for text in (
        json.dumps({"inputs": [filler, {"name": "N", "shape": shape}, filler]}),
        json.dumps({"inputs": [{"shape": shape, "name": "N"}]}, separators=(",", ":")),
        json.dumps({"inputs": [{"name": "N", "shape": shape}]}, indent=1000).replace("shape", "s\\u0068ape"),
    ):
        for size in (1, 7, 10**6) if len(text) < 9000 else (1000, 10**6):
            with pytest.raises(RefusedError, match=re.escape(told)):
                scan(text.encode(), size)


@pytest.mark.parametrize("shape", [[], [0], [2**40], [1, 1], [65_536, 1], [2**20, 2**20], [-1, 3], "x"])
def test_accepts_other_shapes(shape: Any) -> None:
    if shape != "x":
        check_request(message(("N", "FP32", shape, b"four")).SerializeToString())
    text = json.dumps({"inputs": [{"name": '"shape": [99999999999999]', "shape": shape}, {"shape": 9.5}]})
    scan(text.encode(), 10)


def scan(text: bytes, size: int) -> None:
    async def given() -> AsyncIterator[bytes]:
        for piece in pieces(text, size):
            yield piece

    asyncio.run(refuse_huge_shapes(given()))


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_a_walk_over_whole_bytes(seed: int) -> None:
    """The published client's own encoding, cut and changed at random."""
    rng = random.Random(seed)
    rows = [rng.randbytes(rng.choice((0, 1, 3, 70))) for _ in range(rng.randrange(1, 9))]
    tensor = tritonclient.http.InferInput("X", [len(rows)], "BYTES")
    tensor.set_data_from_numpy(np.array(rows, dtype=np.object_))
    good = bytes(tensor._get_binary_data())
    check_prefixes("X", [len(rows)], good, 0, len(good))
    for _ in range(50):
        changed = bytearray(good)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed) + 1)))])
        outcomes = {
            refused([len(rows)], data, data),
            refused([len(rows)], data, Pieces(pieces(data, rng.randrange(1, 9)))),
        }
        assert outcomes == {not fits(data, len(rows))}


def refused(shape: list[int], data: bytes, given: bytes | Pieces) -> bool:
    try:
        check_prefixes("X", shape, given, 0, len(data))
    except TensorError:
        return True
    return False


def fits(data: bytes, count: int) -> bool:
    for _ in range(count):
        if len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            return False
        data = data[4 + int.from_bytes(data[:4], "little") :]
    return not data


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (message(("X", "BYTES", [1], pack(b"a"))).SerializeToString(), b"m"),
        (service_pb2.ModelInferRequest(model_name="n" * 300).SerializeToString(), b"n" * 300),
        (service_pb2.ModelInferRequest(id="7").SerializeToString(), b""),
        (b"", b""),
        (b"\x0a\x01a\x1a\x01i\x0a\x01b", b"b"),  # the last one counts, as in protobuf
    ],
)
def test_reads_the_name_of_the_model(sent: bytes, name: bytes) -> None:
    assert model_of(sent, check_request(sent)) == name

"""Cases of the protocols: JSON, protobuf and HTTP/2 that are wrong, broken or cut."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

from images import mutations

from tests.chaos.cases.base import Sent, World, chance, edge
from tests.chaos.cases.parameters import good_requests
from tests.chaos.messages import INFER, Infer, grpc_bytes, http_parts, http_request

__all__ = ["broken_json", "broken_protobuf", "raw_bytes", "simple_request"]

_SERVICE = "/inference.GRPCInferenceService/"
_METHODS: tuple[str, ...] = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
)
_METHODS += ("ModelStatistics", "RepositoryIndex", "SystemSharedMemoryStatus", "SystemSharedMemoryRegister")
_METHODS += (
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "TraceSetting",
    "LogSettings",
    "NoSuch",
    "",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    3,
    -1,
    2**70,
    0.5,
    1e400,
    "",
    "x",
    [],
    {},
    [[]],
    [None],
    {"a": []},
    [1, "x"],
)


def simple_request(rng: random.Random, world: World) -> Infer:
    """Choose an answerable request of one row or a few labels."""
    names = ("embed_image", "embed_text", "classify_image", "siglip_vision_process", "siglip_text_tokenize")
    return good_requests(world)[rng.choice(names)]


def broken_json(rng: random.Random, world: World) -> tuple[str, Sent]:
    """Make a request over HTTP whose JSON has wrong types or is none, or whose size is a lie."""
    request = simple_request(rng, world)
    about, data = http_parts(request)
    headers = {}
    how = rng.choice(("types", "types", "types", "plain data", "bytes", "length", "nesting", "numbers"))
    if how == "types":
        for _ in range(rng.choice((1, 1, 2))):
            _replace(rng, about)
    if how == "plain data":
        about = {"inputs": [_with_plain_data(rng)]}
        data = b""
    text = json.dumps(about).encode()
    if how == "bytes":
        text = (
            mutations(text, rng)
            if chance(rng, 0.8)
            else rng.choice((b"", b"null", b"[]", b"{", b"\xff\xfe", b"\0" * 9))
        )
    elif how == "nesting":
        depth = rng.choice((100, 2000, 20000))
        text = text[:-1] + b', "x": ' + b"[" * depth + (b"]" * depth if chance(rng, 0.7) else b"") + b"}"
    elif how == "numbers":
        text = text.replace(
            b"[1, 1]", rng.choice((b"[1e1, 1]", b"[1.0, 1]", b"[01]", b"[1, 1" + b"0" * 400 + b"]", b"[NaN]"))
        )
    size = str(len(text))
    if how == "length":
        lies = (
            "0",
            "-1",
            "",
            "x",
            str(len(text) + 1),
            str(max(len(text) - 1, 0)),
            str(2**31),
            "9" * 30,
            " 5",
            "0x10",
        )
        size = rng.choice(lies)
    if how != "plain data" or chance(rng, 0.3):
        headers["Inference-Header-Content-Length"] = size
    sent = http_request(f"/v2/models/{request.model}/infer", text + data, headers)
    return f"{request.model}: JSON with other {how}", Sent("http", sent)


def _replace(rng: random.Random, about: dict[str, Any]) -> None:
    """Put a value of another type somewhere into the JSON."""
    place: Any = about
    for _ in range(rng.choice((1, 2, 3, 4))):
        keys = (
            list(place)
            if isinstance(place, dict)
            else list(range(len(place)))
            if isinstance(place, list)
            else []
        )
        if not keys:
            return
        key = rng.choice(keys)
        if chance(rng, 0.4) or not isinstance(place[key], dict | list):
            place[key] = copy.deepcopy(rng.choice(_VALUES))  # the next change may go into it
            return
        place = place[key]


def _with_plain_data(rng: random.Random) -> dict[str, Any]:
    data = rng.choice(
        (
            ["x"],
            "x",
            5,
            [[["x"]]],
            [1, 2],
            [],
            None,
            {"b64": "AA=="},
            ["\ud800"],
            [True],
            [[], "x"],
            ["x"] * 500,
        )
    )
    shape = rng.choice(
        ([1, 1], [1], [], [0, 1], [-1, 1], [2, 1], [500, 1], ["1", 1], None, [[1]], [2**62, 4])
    )
    return {
        "name": "INPUT_TEXT",
        "datatype": rng.choice(("BYTES", "FP32", "INT64", "X", None)),
        "shape": shape,
        "data": data,
    }


def broken_protobuf(rng: random.Random, world: World) -> tuple[str, Sent]:
    """Make a gRPC message of random or changed protobuf bytes, for any method of the service."""
    how = rng.choice(("changed", "changed", "random", "fields", "method", "stream"))
    message = grpc_bytes(simple_request(rng, world))
    if how in {"changed", "stream"} and chance(rng, 0.8):
        for _ in range(rng.choice((1, 1, 3))):
            message = mutations(message, rng) if message else message
    elif how == "random":
        message = rng.randbytes(rng.choice((0, 1, 5, 100, 5000)))
    elif how == "fields":
        message += b"".join(_field(rng) for _ in range(rng.choice((1, 5, 50))))
    elif how == "method":
        name = rng.choice(_METHODS)
        body = rng.choice((b"", rng.randbytes(20), message, _field(rng)))
        return f"{name} of {len(body)} bytes", Sent("grpc", body, _SERVICE + name)
    if how == "stream":
        return "ModelStreamInfer", Sent("grpc", message, _SERVICE + "ModelStreamInfer", stream=True)
    return f"message: {how}, {len(message)} bytes", Sent("grpc", message, INFER)


def _field(rng: random.Random) -> bytes:
    """Make a field of any number and wire type, whose length may lie."""
    number, kind = rng.choice((1, 2, 3, 4, 5, 6, 7, 99, 2**28)), rng.randrange(6)
    head = _varint(number << 3 | kind)
    if kind == 0:
        return head + _varint(edge(rng) % 2**64)
    if kind == 2:
        content = rng.randbytes(rng.choice((0, 3, 40)))
        size = len(content) if chance(rng, 0.8) else abs(edge(rng)) % 2**32
        return head + _varint(size) + content
    return head + rng.randbytes({1: 8, 5: 4}.get(kind, 0))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def raw_bytes(rng: random.Random, world: World) -> tuple[str, Sent]:
    """Make bytes for the port of gRPC: HTTP/2 with wrong frames, HTTP/1.1, or noise."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    match rng.randrange(4):
        case 0:
            return "noise", Sent("tcp", rng.randbytes(rng.choice((1, 24, 3000))), framed=False)
        case 1:
            about, data = http_parts(simple_request(rng, world))
            return "HTTP/1.1", Sent(
                "tcp", http_request("/v2/models/embed_image/infer", json.dumps(about).encode() + data)
            )
        case 2:
            return "a changed preface", Sent("tcp", mutations(preface, rng) + bytes(9), framed=False)
        case _:
            frames = b"".join(_frame(rng) for _ in range(rng.choice((1, 3, 30))))
            return "HTTP/2 frames", Sent("tcp", preface + frames, framed=False)


def _frame(rng: random.Random) -> bytes:
    payload = rng.randbytes(rng.choice((0, 1, 4, 5, 6, 8, 100)))
    size = len(payload) if chance(rng, 0.8) else rng.choice((0, 2**14 + 1, 2**24 - 1))
    kind, flags = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 200)), rng.choice((0, 1, 4, 5, 0x25, 255))
    stream = rng.choice((0, 1, 2, 3, 2**31 - 1))
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

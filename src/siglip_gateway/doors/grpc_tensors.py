"""The fields and the BYTES tensors of a gRPC request, checked without parsing all of it.

The fields of a `ModelInferRequest` of the KServe protocol that matter:

    string model_name = 1;
    repeated InferInputTensor inputs = 5;      // name = 1, datatype = 2, shape = 3, parameters = 4
    repeated bytes raw_input_contents = 7;     // one for each input that is not in shared memory
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from siglip_gateway.doors.length_prefixes import check_prefixes, check_shape
from siglip_gateway.doors.protobuf_fields import Field, read_varint, walk

__all__ = ["check_request", "model_of"]

_MODEL, _INPUT, _RAW = 1 << 3 | 2, 5 << 3 | 2, 7 << 3 | 2
_NAME, _DATATYPE, _SHAPE, _PACKED_SHAPE, _PARAMETER = 1 << 3 | 2, 2 << 3 | 2, 3 << 3, 3 << 3 | 2, 4 << 3 | 2
_KEY = 1 << 3 | 2  # in an entry of the map `parameters`
_SHARED = b"shared_memory_region"


class _Input(NamedTuple):
    name: str
    datatype: bytes
    shape: list[int]
    is_shared: bool


def check_request(message: bytes) -> list[Field]:
    """Check a serialized `ModelInferRequest`.

    Returns:
        Its fields.

    Raises:
        TensorError: an input is too large, or its strings are not as long as they say.
        IndexError, ValueError: it cannot be read.
    """
    fields = list(walk(message, 0, len(message)))
    _check_strings(message, fields)
    return fields


def model_of(message: bytes, fields: Iterable[Field]) -> bytes:
    """Read the name of the model, the last one if there are several."""
    name = b""
    for tag, start, end in fields:
        if tag == _MODEL:
            name = message[start:end]
    return name


def _check_strings(message: bytes, fields: Iterable[Field]) -> None:
    inputs, contents = [], []
    for tag, start, end in fields:
        if tag == _RAW:
            contents.append((start, end))
        elif tag == _INPUT:
            inputs.append(_read_input(message, start, end))
    if not contents:
        return
    with_content = (one for one in inputs if not one.is_shared)
    for one, (start, end) in zip(with_content, contents, strict=False):  # Triton refuses other numbers
        if one.datatype == b"BYTES":
            check_prefixes(one.name, one.shape, message, start, end)


def _read_input(message: bytes, at: int, end: int) -> _Input:
    name = datatype = b""
    shape: list[int] = []
    is_shared = False
    for tag, start, stop in walk(message, at, end):
        if tag == _NAME:
            name = message[start:stop]
        elif tag == _DATATYPE:
            datatype = message[start:stop]
        elif tag in {_SHAPE, _PACKED_SHAPE}:
            while start < stop:
                number, start = read_varint(message, start)  # noqa: PLW2901 - it moves on
                shape.append(number if number < 1 << 63 else number - (1 << 64))
        elif tag == _PARAMETER:
            is_shared |= _key(message, start, stop) == _SHARED
    told = name.decode("utf-8", "replace")
    check_shape(told, shape)
    return _Input(told, datatype, shape, is_shared)


def _key(message: bytes, at: int, end: int) -> bytes:
    key = b""
    for tag, start, stop in walk(message, at, end):
        if tag == _KEY:
            key = message[start:stop]
    return key

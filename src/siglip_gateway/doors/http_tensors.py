"""The binary BYTES tensors of an HTTP request, which lie behind its JSON in the order of its inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from siglip_gateway.doors.length_prefixes import Pieces, TensorError, check_prefixes
from siglip_gateway.doors.refusal import RefusedError

__all__ = ["check_binary_inputs"]

_MOST_JSON = 2**22  # bytes, 40 ms to parse; it describes tensors and has none
_PARSER = json.JSONDecoder(object_pairs_hook=lambda pairs: dict(reversed(pairs)), strict=False)


def check_binary_inputs(parts: Sequence[bytes], size: int, json_size: int) -> None:
    """Check the tensors of a body.

    Args:
        parts: the body.
        size: bytes of the body.
        json_size: bytes of the JSON at its beginning. Without any, or without bytes behind it, there is
            nothing to check.

    Raises:
        RefusedError: 400, the strings of an input are not as long as they say, or the JSON is larger than
            4 MiB or cannot be read.
    """
    if not 0 < json_size < size:
        return
    if json_size > _MOST_JSON:
        raise RefusedError(
            400, f"{json_size} bytes of JSON before binary data, at most {_MOST_JSON} are allowed"
        )
    try:
        # Latin-1 reads any bytes, as Triton does.
        described = _PARSER.decode(_first(parts, json_size).decode("latin-1"))
    except ValueError as error:
        raise RefusedError(400, f"failed to parse the request JSON: {error}") from error
    data = parts[0] if len(parts) == 1 else Pieces(parts)
    end = json_size
    for name, datatype, shape, length in _binary(described):
        start, end = end, end + length
        if end > size:
            return  # Triton refuses it
        if datatype != "BYTES":
            continue
        try:
            check_prefixes(name, shape, data, start, end)
        except TensorError as error:
            raise RefusedError(400, str(error)) from error


def _first(parts: Sequence[bytes], count: int) -> bytes:
    found = bytearray()
    for part in parts:
        found += part[: count - len(found)]
        if len(found) == count:
            break
    return bytes(found)


def _binary(described: Any) -> Iterator[tuple[str, Any, list[int], int]]:
    """Yield name, datatype, shape and length of each binary input; Triton refuses what is none."""
    inputs = described.get("inputs") if isinstance(described, Mapping) else None
    for one in inputs if isinstance(inputs, list) else ():
        parameters = one.get("parameters") if isinstance(one, Mapping) else None
        length = parameters.get("binary_data_size") if isinstance(parameters, Mapping) else None
        if not isinstance(length, int) or length < 0:
            continue
        shape = one.get("shape")
        readable = isinstance(shape, list) and all(type(number) is int for number in shape)
        name = str(one.get("name"))[:100].encode("latin-1", "replace").decode("utf-8", "replace")
        yield name, one.get("datatype"), shape if readable else [-1], length

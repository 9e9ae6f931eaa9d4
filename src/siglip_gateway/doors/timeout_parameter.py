"""Triton's request parameter `timeout`, written into the bytes of a request without parsing the rest.

A `ModelInferRequest` of the KServe protocol carries it as an entry of its map `parameters`:

    map<string, InferParameter> parameters = 4;    // an InferParameter is a oneof with int64_param = 2

The last entry of a name wins, so an entry at the end of the message replaces one of the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable

from siglip_gateway.doors.protobuf_fields import Field, read_varint

__all__ = ["with_timeout"]

_PARAMETERS = 4 << 3 | 2  # tag of an entry: field 4, a length follows
_NAME = b"\x0a\x07timeout\x12"  # in the entry: field 1, 7 bytes; then the tag of field 2, the value
_INT64 = 2 << 3  # tag in the value: field 2, a varint follows
_RESERVE = 0.25  # seconds to compute and to answer, or a quarter of a shorter time
_LONGEST = 10**15  # microseconds; Triton counts in nanoseconds of 64 bits


def with_timeout(message: bytes, fields: Iterable[Field], seconds: float) -> bytes:
    """Bound the time that a request may wait in each of Triton's queues.

    The bound is a little below the time that the caller waits, because a request that leaves the queue at the
    last moment would be computed in vain.

    Args:
        message: a serialized `ModelInferRequest`.
        fields: of the message (`protobuf_fields.walk`).
        seconds: time that its caller still waits, above 0.

    Returns:
        The message with the parameter `timeout` in microseconds at its end. Unchanged is a message that has
        a shorter timeout of its own, or one of a wrong type, which Triton refuses.
    """
    try:
        own = _own_timeout(message, fields)
    except (IndexError, ValueError):
        return message
    if own is not None and 0 < own <= seconds * 1e6:  # 0 is no limit, and so is a negative number
        return message
    waiting = max(seconds - _RESERVE, seconds * 0.75)
    microseconds = max(1, min(round(waiting * 1e6), _LONGEST))
    value = bytes([_INT64]) + _write_varint(microseconds)
    entry = _NAME + bytes([len(value)]) + value
    return message + bytes([_PARAMETERS, len(entry)]) + entry


def _own_timeout(message: bytes, fields: Iterable[Field]) -> int | None:
    """Find the caller's own timeout.

    Raises:
        IndexError, ValueError: it is no int64.
    """
    found = None
    for tag, start, end in fields:
        if tag == _PARAMETERS and message.startswith(_NAME, start, end):
            found = _int64(message[start + len(_NAME) : end])
    return found


def _int64(value: bytes) -> int:
    """Read the length and the only field of an `InferParameter`; a negative number becomes one above 2^63."""
    size, start = read_varint(value, 0)
    if value[start] != _INT64 or start + size != len(value):
        raise ValueError("expected int64_param")
    number, _ = read_varint(value, start + 1)
    return number if number < 1 << 63 else -1


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)

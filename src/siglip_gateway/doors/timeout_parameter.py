"""Triton's request parameter `timeout`, written into the bytes of a request without parsing the rest.

A `ModelInferRequest` of the KServe protocol carries it as an entry of its map `parameters`:

    map<string, InferParameter> parameters = 4;    // an InferParameter is a oneof with int64_param = 2

The last entry of a name wins, so an entry at the end of the message replaces one of the caller's.
"""

from __future__ import annotations

__all__ = ["model_of", "with_timeout"]

_MODEL = b"\x0a"  # tag of the model's name: field 1, a length follows
_PARAMETERS = 4 << 3 | 2  # tag of an entry: field 4, a length follows
_NAME = b"\x0a\x07timeout\x12"  # in the entry: field 1, 7 bytes; then the tag of field 2, the value
_INT64 = 2 << 3  # tag in the value: field 2, a varint follows
_MOST_FIELDS = 1000  # 0.3 ms to walk over; no request of a real client has as many
_RESERVE = 0.25  # seconds to compute and to answer, or a quarter of a shorter time
_LONGEST = 10**15  # microseconds; Triton counts in nanoseconds of 64 bits


def with_timeout(message: bytes, seconds: float) -> bytes:
    """Bound the time that a request may wait in each of Triton's queues.

    The bound is a little below the time that the caller waits, because a request that leaves the queue at the
    last moment would be computed in vain.

    Args:
        message: a serialized `ModelInferRequest`.
        seconds: time that its caller still waits, above 0.

    Returns:
        The message with the parameter `timeout` in microseconds at its end. Unchanged is a message that has
        a shorter timeout of its own, or one of a wrong type, or that is malformed: Triton refuses the latter.
    """
    try:
        own = _own_timeout(message)
    except (IndexError, ValueError):
        return message
    if own is not None and 0 < own <= seconds * 1e6:  # 0 is no limit, and so is a negative number
        return message
    waiting = max(seconds - _RESERVE, seconds * 0.75)
    microseconds = max(1, min(round(waiting * 1e6), _LONGEST))
    value = bytes([_INT64]) + _write_varint(microseconds)
    entry = _NAME + bytes([len(value)]) + value
    return message + bytes([_PARAMETERS, len(entry)]) + entry


def model_of(message: bytes) -> bytes:
    """Read the model's name, if it is the first field and has 1 to 127 bytes, as every client writes it."""
    if message[:1] != _MODEL:
        return b""
    size = message[1:2]
    return message[2 : 2 + size[0]] if size and size[0] < 0x80 else b""


def _own_timeout(message: bytes) -> int | None:
    """Find the caller's own timeout.

    Raises:
        IndexError, ValueError: the message is malformed, its timeout is no int64, or it has too many fields.
    """
    found, at, end = None, 0, len(message)
    for _ in range(_MOST_FIELDS):
        if at >= end:
            break
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == 2:
            size, start = _read_varint(message, at)
            at = start + size
            if tag == _PARAMETERS and message.startswith(_NAME, start, at):
                found = _int64(message[start + len(_NAME) : at])
        elif kind == 0:
            _, at = _read_varint(message, at)
        else:
            at += {1: 8, 5: 4}[kind] if kind in {1, 5} else end + 1
    if at != end:
        raise ValueError("the last field ends behind the message, or there are too many")
    return found


def _int64(value: bytes) -> int:
    """Read the length and the only field of an `InferParameter`; a negative number becomes one above 2^63."""
    size, start = _read_varint(value, 0)
    if value[start] != _INT64 or start + size != len(value):
        raise ValueError("expected int64_param")
    number, _ = _read_varint(value, start + 1)
    return number if number < 1 << 63 else -1


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a varint at an offset; return it and the offset behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint has 10 bytes at most")


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)

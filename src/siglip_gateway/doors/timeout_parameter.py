"""The time that a request may wait, written into its bytes without parsing the rest.

Triton knows the parameter `timeout` and would drop a request that has waited for so long. But a model whose
queue has such a policy may overlook waiting requests for half a second, so the models drop it themselves. A
request does not tell them when it came. This is what the door adds as the parameter `arrived`.

A `ModelInferRequest` of the KServe protocol carries parameters as entries of a map:

    map<string, InferParameter> parameters = 4;    // an InferParameter is a oneof with int64_param = 2

The last entry of a name wins, so an entry at the end of the message replaces one of the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from siglip_gateway.doors.protobuf_fields import Field, read_varint

__all__ = ["ARRIVED", "now", "with_timeout"]

ARRIVED = "arrived"  # a parameter of our models, and a header that Triton's HTTP server makes one of

_PARAMETERS = 4 << 3 | 2  # tag of an entry: field 4, a length follows
_KEY, _VALUE = 1 << 3 | 2, 2 << 3 | 2  # tags in the entry: fields 1 and 2, a length follows each
_TIMEOUT = b"timeout"
_OWN = bytes([_KEY, len(_TIMEOUT)]) + _TIMEOUT + bytes([_VALUE])  # how an entry of that name begins
_INT64 = 2 << 3  # tag in the value: field 2, a varint follows
_RESERVE = 0.25  # seconds to compute and to answer, or a quarter of a shorter time
_LONGEST = 10**15  # microseconds; Triton counts in nanoseconds of 64 bits


def with_timeout(
    message: bytes, fields: Iterable[Field], seconds: float | None, arrived: int
) -> tuple[bytes, bool]:
    """Bound the time until a model takes up a request.

    The bound is a little below the time that the caller waits, because a request that is taken up at the last
    moment would be computed in vain.

    Args:
        message: a serialized `ModelInferRequest`.
        fields: of the message (`protobuf_fields.walk`).
        seconds: time that its caller still waits, above 0; None without an end.
        arrived: when the door took the request (`now`).

    Returns:
        The message, and if `timeout` was added. At its end are the parameter `timeout` in microseconds,
        unless it has a shorter one of its own, and `arrived`, from which that time counts. It is unchanged
        without a bound, or with a timeout of a wrong type, which Triton refuses.
    """
    try:
        own = _own_timeout(message, fields)
    except (IndexError, ValueError):
        return message, False
    bound = own if own is not None and own > 0 else None  # 0 is no limit, and so is a negative number
    added = b""
    if seconds is not None and (bound is None or bound > seconds * 1e6):
        waiting = max(seconds - _RESERVE, seconds * 0.75)
        bound = max(1, min(round(waiting * 1e6), _LONGEST))
        added = _entry(_TIMEOUT, bound)
    if bound is None:
        return message, False
    # Joined first: the message may have hundreds of megabytes, and is copied once.
    return message + (added + _entry(ARRIVED.encode(), arrived)), bool(added)


def now() -> int:
    """Read the clock that all processes of this machine share: microseconds since some moment."""
    return time.monotonic_ns() // 1000


def _own_timeout(message: bytes, fields: Iterable[Field]) -> int | None:
    """Find the caller's own timeout.

    Raises:
        IndexError, ValueError: it is no int64.
    """
    found = None
    for tag, start, end in fields:
        if tag == _PARAMETERS and message.startswith(_OWN, start, end):
            found = _int64(message[start + len(_OWN) : end])
    return found


def _int64(value: bytes) -> int:
    """Read the length and the only field of an `InferParameter`; a negative number becomes one above 2^63."""
    size, start = read_varint(value, 0)
    if value[start] != _INT64 or start + size != len(value):
        raise ValueError("expected int64_param")
    number, _ = read_varint(value, start + 1)
    return number if number < 1 << 63 else -1


def _entry(name: bytes, number: int) -> bytes:
    """Write a parameter that is an int64."""
    value = bytes([_INT64]) + _write_varint(number)
    entry = bytes([_KEY, len(name)]) + name + bytes([_VALUE, len(value)]) + value
    return bytes([_PARAMETERS, len(entry)]) + entry


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)

"""The parameter `timeout` in the bytes of a request, read back by protobuf's own parser."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from siglip_gateway.doors import timeout_parameter
from siglip_gateway.doors.protobuf_fields import walk

SECOND = 1_000_000
WAIT = 750_000  # in a queue, of a caller who waits for a second


ARRIVED = 2**40 + 7


def with_timeout(message: bytes, seconds: float | None) -> bytes:
    changed, added = timeout_parameter.with_timeout(
        message, list(walk(message, 0, len(message))), seconds, ARRIVED
    )
    if added:
        assert b"\x07timeout" in changed[len(message) :]
    return changed


def request(**parameters: Any) -> Any:
    """A request with tensors before and after the parameters, as all clients order them."""
    message = service_pb2.ModelInferRequest(model_name="embed_image", model_version="1", id="7")
    for name, (kind, value) in parameters.items():
        setattr(message.parameters[name], kind, value)
    message.inputs.add(name="INPUT_IMAGE", datatype="BYTES", shape=[2, 1])
    message.inputs[0].parameters["timeout"].int64_param = 3
    message.outputs.add(name="EMBEDDING")
    message.raw_input_contents.append(random.Random(0).randbytes(70_000))
    return message


def timeout_of(message: bytes) -> Any:
    return service_pb2.ModelInferRequest.FromString(message).parameters["timeout"]


@pytest.mark.parametrize(
    ("seconds", "microseconds"),
    [(1e-6, 1), (4e-4, 300), (0.004, 3000), (0.2, 150_000), (1.0, WAIT), (60.0, 59_750_000), (1e8, 10**14)],
)
def test_adds_a_little_less_than_the_time_that_is_left(seconds: float, microseconds: int) -> None:
    given = request(normalized=("bool_param", True), timeouts=("int64_param", 5))
    changed = service_pb2.ModelInferRequest.FromString(with_timeout(given.SerializeToString(), seconds))
    assert changed.parameters["timeout"].int64_param == pytest.approx(microseconds, rel=1e-8)
    assert changed.parameters["arrived"].int64_param == ARRIVED
    del changed.parameters["timeout"], changed.parameters["arrived"]
    assert changed == given


@pytest.mark.parametrize("own", [None, 0, -1])
def test_without_a_bound_nothing_is_added(own: int | None) -> None:
    given = {} if own is None else {"timeout": ("int64_param", own)}
    message = request(**given).SerializeToString()
    assert with_timeout(message, None) == message


def test_a_timeout_of_the_caller_counts_from_the_arrival() -> None:
    """Whatever the caller says about it."""
    given = request(timeout=("int64_param", 5), arrived=("string_param", "1"))
    changed = service_pb2.ModelInferRequest.FromString(with_timeout(given.SerializeToString(), None))
    assert changed.parameters["arrived"].int64_param == ARRIVED
    assert changed.parameters["timeout"].int64_param == 5


def test_the_shortest_timeout_is_a_microsecond_and_the_longest_fits_triton() -> None:
    message = request().SerializeToString()
    assert timeout_of(with_timeout(message, 0)).int64_param == 1  # 0 would be no limit
    assert timeout_of(with_timeout(message, 1e30)).int64_param * 1000 < 2**63


@pytest.mark.parametrize(
    ("own", "expected"),
    [(1, 1), (SECOND, SECOND), (SECOND + 1, WAIT), (2**63 - 1, WAIT), (0, WAIT), (-1, WAIT)],
)
def test_the_shorter_timeout_wins(own: int, expected: int) -> None:
    message = request(timeout=("int64_param", own), priority=("int64_param", 1)).SerializeToString()
    assert timeout_of(with_timeout(message, 1.0)).int64_param == expected


def test_the_last_of_two_own_timeouts_counts_as_in_protobuf() -> None:
    message = request(timeout=("int64_param", 5)).SerializeToString()
    twice = with_timeout(request(timeout=("int64_param", 9)).SerializeToString(), 5e-6)
    assert timeout_of(twice).int64_param == 4
    assert timeout_of(with_timeout(twice, 1.0)).int64_param == 4
    longer = message + message.replace(b"\x10\x05", b"\x10\x09")
    assert timeout_of(with_timeout(longer, 8e-6)).int64_param == 6


@pytest.mark.parametrize(
    "own", [("string_param", "1"), ("string_param", "1" * 300), ("bool_param", True), ("double_param", 0.5)]
)
def test_leaves_a_timeout_of_a_wrong_type_for_triton_to_refuse(own: tuple[str, Any]) -> None:
    message = request(timeout=own).SerializeToString()
    assert with_timeout(message, 1.0) == message


def test_finds_no_fields_in_malformed_messages() -> None:
    """The added bytes must not complete a message that was cut off."""
    message = request().SerializeToString()
    for end in (*range(1, 60), len(message) - 70_000, len(message) - 15, len(message) - 1):
        cut = message[:end]
        try:
            service_pb2.ModelInferRequest.FromString(cut)
        except Exception:  # noqa: BLE001 - of protobuf, which has one class for each implementation
            with pytest.raises((IndexError, ValueError)):
                with_timeout(cut, 1.0)
        else:
            assert timeout_of(with_timeout(cut, 1.0)).int64_param == WAIT
    for garbage in (b"\xff" * 40, b"\x0b", b"\x0c", b"\x07", b"\x22", b"\x21abc", b"\x80" * 11 + b"\x00"):
        with pytest.raises((IndexError, ValueError)):
            with_timeout(garbage, 1.0)


def test_reads_fields_of_every_wire_type_that_it_does_not_know() -> None:
    unknown = b"\xf8\x07\x96\x01" + b"\xf9\x07" + b"8" * 8 + b"\xfd\x07" + b"4" * 4 + b"\xfa\x07\x03abc"
    message = unknown + request().SerializeToString()
    assert timeout_of(with_timeout(message, 1.0)).int64_param == WAIT


def test_gives_up_on_a_message_of_a_million_fields() -> None:
    with pytest.raises(ValueError, match="more than 1000 fields"):
        with_timeout(b"\x3a\x00" * 1_000_000, 1.0)

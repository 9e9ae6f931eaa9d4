"""Rows pass by pass, on runners of which each test decides how much memory they have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from siglip_serve.engine.passes import (
    Arrays,
    Batch,
    Finish,
    in_passes,
    is_out_of_memory,
    out_of_memory_refused,
)
from siglip_serve.errors import DeviceMemoryError

Rows = NDArray[np.int64]


def doubled(part: Rows) -> Arrays:
    return {"EMBEDDING": part.astype(np.float32)[:, None] * 2}


class Device:
    """Doubles rows; `memory` holds the largest pass that fits, for the n-th start.

    Attributes:
        passes: sizes of the passes that were asked for.
    """

    def __init__(self, memory: Callable[[int], int]) -> None:
        self._memory, self.passes = memory, list[int]()

    def __call__(self, part: Rows) -> Finish:
        self.passes.append(len(part))
        if len(part) > self._memory(len(self.passes)):
            raise torch.OutOfMemoryError("out of memory")
        return lambda: doubled(part)


def test_starts_a_pass_before_waiting_for_the_previous_one() -> None:
    events: list[str] = []

    def start(part: Rows) -> Finish:
        events.append(f"start {part[0]}")

        def finish() -> Arrays:
            events.append(f"finish {part[0]}")
            return doubled(part)

        return finish

    batch = in_passes(np.arange(5), 2, start)
    assert events == ["start 0", "start 2", "finish 0", "start 4", "finish 2", "finish 4"]
    assert batch.outputs["EMBEDDING"].ravel().tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("fits", "passes"), [(16, [16, 16, 8]), (9, [16, 8, 8, 8, 8, 8]), (1, [16, 8, 4, 2, *[1] * 40])]
)
def test_halves_a_pass_that_does_not_fit(fits: int, passes: list[int]) -> None:
    device = Device(lambda _: fits)
    batch = in_passes(np.arange(40), 16, device)
    assert device.passes == passes
    assert not batch.any_failed
    np.testing.assert_array_equal(batch.rows(0, 40)["EMBEDDING"][:, 0], 2 * np.arange(40))


def test_half_of_an_odd_pass_is_its_larger_half() -> None:
    device = Device(lambda _: 3)
    assert not in_passes(np.arange(5), 5, device).any_failed
    assert device.passes == [5, 3, 2]


def test_refuses_rows_that_never_fit() -> None:
    batch = in_passes(np.arange(3), 8, Device(lambda _: 0))
    assert batch.failed.tolist() == [True, True, True]
    with pytest.raises(DeviceMemoryError, match="not enough free memory for even one row; try again later"):
        batch.rows(0, 1)


def test_refuses_only_the_row_that_failed() -> None:
    """Memory returns after the first row: the others are computed, and keep their places."""
    batch = in_passes(np.arange(4), 1, Device(lambda start: int(start > 1)))
    assert batch.failed.tolist() == [True, False, False, False]
    assert batch.rows(1, 4)["EMBEDDING"].ravel().tolist() == [2, 4, 6]
    for start, end in ((0, 1), (0, 2), (0, 4)):
        with pytest.raises(DeviceMemoryError, match="not enough free memory for even one row"):
            batch.rows(start, end)


def test_returns_rows_before_one_that_failed() -> None:
    batch = in_passes(np.arange(4), 1, Device(lambda start: int(start < 4)))
    assert batch.failed.tolist() == [False, False, False, True]
    assert batch.rows(0, 3)["EMBEDDING"].ravel().tolist() == [0, 2, 4]
    assert batch.rows(2, 3)["EMBEDDING"].ravel().tolist() == [4]


def test_waits_for_the_pass_under_way_before_it_halves_one() -> None:
    """There is room for one row at a time, and a started pass holds its room until it is waited for."""
    held: list[int] = []

    def start(part: Rows) -> Finish:
        if len(held) + len(part) > 1:
            raise torch.OutOfMemoryError("out of memory")
        held.append(1)

        def finish() -> Arrays:
            held.pop()
            return doubled(part)

        return finish

    batch = in_passes(np.arange(5), 2, start)
    assert not batch.any_failed
    assert batch.outputs["EMBEDDING"].ravel().tolist() == [0, 2, 4, 6, 8]


def test_raises_other_errors_of_the_device() -> None:
    def start(_: Rows) -> Finish:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="an illegal memory access"):
        in_passes(np.arange(3), 2, start)


def test_rows_are_views_without_the_end() -> None:
    outputs = {"EMBEDDING": np.arange(8, dtype=np.float32).reshape(4, 2)}
    batch = Batch(outputs, np.zeros(4, dtype=np.bool_))
    found = batch.rows(1, 3)["EMBEDDING"]
    assert found.tolist() == [[2, 3], [4, 5]]
    assert np.shares_memory(found, outputs["EMBEDDING"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_knows_errors_of_memory(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_names_the_cause_of_a_lack_of_memory() -> None:
    refused = "not enough free memory for 7 prompts; try again later, or with less"
    with pytest.raises(DeviceMemoryError, match=refused), out_of_memory_refused("7 prompts"):
        raise torch.OutOfMemoryError("CUDA")
    with pytest.raises(RuntimeError, match="another fault"), out_of_memory_refused("7 prompts"):
        raise RuntimeError("another fault")

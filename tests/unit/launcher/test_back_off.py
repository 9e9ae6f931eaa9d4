"""Delays between the starts of a server that dies again and again."""

from __future__ import annotations

import time

import pytest

from siglip_serve.launcher.back_off import BackOff


def test_delays_grow_to_half_a_minute_and_begin_anew_after_ten_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    back_off = BackOff()
    assert [back_off.next() for _ in range(8)] == [0, 1, 2, 5, 10, 30, 30, 30]
    back_off.served()
    now += 599
    assert back_off.next() == 30
    back_off.served()
    now += 600
    assert back_off.next() == 0
    now += 6000  # it was not served in this time
    assert back_off.next() == 1

"""Batch sizes of a GPU, at the exact boundaries."""

from __future__ import annotations

import pytest

from siglip_serve.engine.buckets import BUCKETS, rows_of_a_pass


def test_little_of_a_pass_is_padding() -> None:
    """A quarter at most, and three rows at most in the passes that towers with large images take."""
    recorded = [min(size for size in BUCKETS if size >= rows) for rows in range(1, BUCKETS[-1] + 1)]
    padding = [size - rows for rows, size in enumerate(recorded, 1)]
    assert max(empty / size for empty, size in zip(padding, recorded, strict=True)) <= 1 / 4
    assert max(padding[:48]) == 3


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (1, 256),
        (160, 256),  # 41,000 / 160 = 256.25
        (161, 192),  # one row less than the largest batch
        (196, 192),
        (213, 192),  # 192.49
        (214, 160),  # 191.59
        (729, 56),
        (13_667, 2),  # three rows would have 41,001 tokens
        (20_500, 2),
        (20_501, 1),
        (41_000, 1),
        (41_001, 1),  # a row is computed even if it alone has too many tokens
    ],
)
def test_a_pass_is_the_largest_recorded_batch_whose_tokens_fit(tokens: int, rows: int) -> None:
    assert rows_of_a_pass(tokens) == rows


@pytest.mark.parametrize(
    ("tokens", "max_rows", "rows"),
    [
        (196, 1, 1),
        (196, 100, 100),  # an operator's limit need not be a recorded batch
        (196, 209, 209),  # 41,000 / 196 = 209.2
        (196, 210, 209),
        (1, 255, 255),
        (1, 256, 256),
        (1, 257, 256),
        (41_001, 5, 1),
    ],
)
def test_a_limit_on_rows_is_kept(tokens: int, max_rows: int, rows: int) -> None:
    assert rows_of_a_pass(tokens, max_rows) == rows

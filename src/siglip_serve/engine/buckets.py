"""Batch sizes of a GPU: the engine records these, and the server prefers batches that fill one."""

from __future__ import annotations

__all__ = ["BUCKETS", "rows_of_a_pass"]

# The recorded batch sizes. At most a quarter of a pass is padding, and less where large towers run.
BUCKETS = (1, 2, 3, 4, 6, 8, 12, *range(16, 49, 4), 56, 64, 80, 96, 112, 128, 160, 192, 256)
_TOKENS = 41_000  # fewer fill a GPU; with more, its caches hold less of a layer


def rows_of_a_pass(tokens: int, max_rows: int = 0) -> int:
    """Return the number of rows in the largest batch that is worth recording.

    Args:
        tokens: tokens of one row, at least 1.
        max_rows: an upper limit. 0 is none, and the result is one of `BUCKETS`.

    Returns:
        1 to 256 rows.
    """
    most = max(1, _TOKENS // tokens)
    fitting = max(size for size in BUCKETS if size <= most)
    return min(max_rows, most, BUCKETS[-1]) if max_rows else fitting

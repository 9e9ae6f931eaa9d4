"""How many rows a GPU computes at once: the engine records such batches, the server prefers them."""

from __future__ import annotations

__all__ = ["BUCKETS", "rows_of_a_pass"]

# The batch sizes that are recorded. At most a quarter of a pass is padding, and less where large towers run.
BUCKETS = (1, 2, 3, 4, 6, 8, 12, *range(16, 49, 4), 56, 64, 80, 96, 112, 128, 160, 192, 256)
_TOKENS = 41_000  # a GPU is full with fewer; beyond, the caches hold less of a layer


def rows_of_a_pass(tokens: int, max_rows: int = 0) -> int:
    """Rows of so many tokens in the largest batch that is worth recording, at most `max_rows` if given."""
    most = max(1, _TOKENS // tokens)
    fitting = max(size for size in BUCKETS if size <= most)
    return min(max_rows, most, BUCKETS[-1]) if max_rows else fitting

"""`siglip-serve bench`: load tests with locust, and input data for perf_analyzer.

Only `locustfile.py` imports locust, whose import changes the sockets and threads of the whole process.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["LOCUSTFILE", "BenchError"]

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class BenchError(Exception):
    """A load test that cannot be run. The message says why."""

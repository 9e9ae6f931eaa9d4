"""Attacks on a real server: hostile requests, killed processes, busy machines, overload, hours of traffic.

`python -m tests.chaos --help` describes the parts. The programs need only the server's environment. They
share helpers with the tests, which pytest finds by its setting `pythonpath`.
"""

from __future__ import annotations

import sys
from pathlib import Path

_SUPPORT = str(Path(__file__).parents[1] / "support")
if _SUPPORT not in sys.path:
    sys.path.insert(0, _SUPPORT)

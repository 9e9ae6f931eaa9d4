"""How long to wait before a server that died is started again."""

from __future__ import annotations

import time

__all__ = ["BackOff"]

_DELAYS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds
_FORGOTTEN = 600.0  # seconds of service after which the next death counts as the first


class BackOff:
    """Delays that grow from death to death, and begin anew after ten minutes of service."""

    def __init__(self) -> None:
        self._step = 0
        self._served: float | None = None

    def served(self) -> None:
        """Take note that the server answers from now on."""
        self._served = time.monotonic()

    def next(self) -> float:
        """Give the seconds to wait before the next attempt."""
        if self._served is not None and time.monotonic() - self._served >= _FORGOTTEN:
            self._step = 0
        self._served = None
        delay = _DELAYS[min(self._step, len(_DELAYS) - 1)]
        self._step += 1
        return delay

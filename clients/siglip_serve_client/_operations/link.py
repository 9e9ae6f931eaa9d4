"""The connection that the operations of one client share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client._operations.requests import Transport
from siglip_serve_client._operations.shared_memory import Regions
from siglip_serve_client.errors import ClientError

__all__ = ["Link", "Outcome", "Progress"]

Outcome: TypeAlias = NDArray[np.float32] | ClientError | OSError
Progress: TypeAlias = Callable[[int], object]


@dataclass(frozen=True, eq=False)
class Link:
    """The state that all requests of a client share.

    Attributes:
        timeout: of one request, in seconds.
        regions: for frames in shared memory, or None if they travel with the requests.
    """

    transport: Transport
    timeout: float
    regions: Regions | None = None

    async def disconnect(self) -> None:
        """Remove what lies in shared memory, and close the connections. The next request opens new ones."""
        if self.regions is not None:
            await self.regions.clear()
        await self.transport.close()

    async def close(self) -> None:
        """Disconnect. Regions that a request still holds are removed when it is answered."""
        if self.regions is not None:
            await self.regions.close()
        await self.transport.close()

"""Frames for a server on this machine, handed over through shared memory instead of the connection."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import shared_memory

from siglip_serve_client._operations.requests import Answer, Call, Tensor, Transport
from siglip_serve_client.errors import (
    AccessError,
    ClientError,
    InvalidInputError,
    ServerError,
    SharedMemoryError,
)

__all__ = ["Regions"]

# What Triton answers with where it knows no region of the name.
_UNKNOWN = "Unable to find shared memory region"
_RESTARTS = 3  # of the server, that one request survives


@dataclass(eq=False)
class _Region:
    name: str
    size: int
    handle: Any


class Regions:
    """Regions that one client has registered.

    A request holds a region of its own until it is answered. Regions are reused for frames that are not
    larger, so there are never more of them than requests at once.

    Raises:
        SharedMemoryError: this is not Linux.
    """

    def __init__(self, transport: Transport) -> None:
        if sys.platform != "linux":
            raise SharedMemoryError(f"shared_memory=True works on Linux, not on {sys.platform}")
        self._transport = transport
        self._free: list[_Region] = []
        self._stale: list[str] = []  # removed here, not yet withdrawn from the server
        self._closed = False

    async def ask(
        self, call: Call, name: str, datatype: str, shape: Sequence[int], parts: Sequence[NDArray[np.uint8]]
    ) -> Answer:
        """The answer to `call` with one more input, whose bytes are `parts`, one after the other.

        Raises:
            SharedMemoryError: there is no room for a region, or the server cannot or may not read it.
        """
        for _ in range(_RESTARTS):
            try:
                return await self._ask(call, name, datatype, tuple(shape), parts)
            except ClientError as error:
                if _UNKNOWN not in str(error):
                    raise
            # The server was started again, and knows none of the earlier regions.
            await self.clear()
        return await self._ask(call, name, datatype, tuple(shape), parts)

    async def clear(self) -> None:
        """Withdraw and remove the regions that no request holds."""
        free, self._free = self._free, []
        for region in free:
            await self._destroy(region)
        await self._withdraw_stale()

    async def close(self) -> None:
        """Remove all regions. Those that a request still holds are removed when it is answered."""
        self._closed = True
        await self.clear()

    async def _ask(
        self, call: Call, name: str, datatype: str, shape: tuple[int, ...], parts: Sequence[NDArray[np.uint8]]
    ) -> Answer:
        size = sum(part.nbytes for part in parts)
        region = await self._take(size)
        answered = False
        try:
            shared_memory.set_shared_memory_region(region.handle, list(parts))
            tensor = Tensor(name, datatype, shape, region=region.name, size=size)
            inputs = [tensor, *call.inputs]
            answer = await self._transport.infer(replace(call, inputs=inputs))
            answered = True
        except InvalidInputError as error:
            answered = _UNKNOWN not in str(error)  # or the region is of no use to other requests
            raise
        finally:
            # The server is not asked here: the operation may have been cancelled.
            self._give(region, answered)
        return answer

    async def _take(self, size: int) -> _Region:
        await self._withdraw_stale()
        fitting = [region for region in self._free if region.size >= size]
        # One that is too small makes room for its successor.
        chosen = min(fitting or self._free[:1], key=lambda region: region.size, default=None)
        if chosen is not None:
            self._free.remove(chosen)
        if chosen is not None and not fitting:
            await self._destroy(chosen)
            chosen = None
        return chosen or await self._make(size)

    def _give(self, region: _Region, answered: bool) -> None:
        if answered and not self._closed:
            self._free.append(region)
            return
        self._stale.append(region.name)
        # The server may still read it, so it is not used for another frame.
        shared_memory.destroy_shared_memory_region(region.handle)

    async def _withdraw_stale(self) -> None:
        stale, self._stale = self._stale, []
        for name in stale:
            await self._withdraw(name)

    async def _make(self, size: int) -> _Region:
        key = f"siglip-serve-client-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            handle = shared_memory.create_shared_memory_region(key, key, size, create_only=True)
        except shared_memory.SharedMemoryException as error:
            raise SharedMemoryError(f"no region of {size} bytes could be made: {error.__cause__}") from error
        try:
            _reserve(key, size)
            await self._transport.register(key, size)
        except BaseException as error:
            shared_memory.destroy_shared_memory_region(handle)
            if isinstance(error, OSError):
                raise SharedMemoryError(f"/dev/shm has no room for {size} bytes: {error}") from error
            if isinstance(error, ClientError):
                raise _refusal(error) from error
            raise
        return _Region(key, size, handle)

    async def _destroy(self, region: _Region) -> None:
        shared_memory.destroy_shared_memory_region(region.handle)
        await self._withdraw(region.name)

    async def _withdraw(self, name: str) -> None:
        with suppress(ClientError):  # the server may be gone, or not know it
            await self._transport.withdraw(name)


def _reserve(key: str, size: int) -> None:
    # A new region has no memory yet. Without any left, writing to it would end the process with SIGBUS.
    with Path("/dev/shm", key).open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _refusal(error: ClientError) -> ClientError:
    if isinstance(error, AccessError):
        return SharedMemoryError(
            "the server lets no client register shared memory: start it with "
            "`siglip-serve serve --shared-memory`, or leave shared_memory=True out"
        )
    if isinstance(error, ServerError) or "shared memory" in str(error):
        return SharedMemoryError(
            "the server cannot read this process's shared memory; is it on this machine, with the "
            f"same /dev/shm and user? ({error})"
        )
    return error

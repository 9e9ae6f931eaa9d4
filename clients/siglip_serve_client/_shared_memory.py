"""Frames handed to a server of this machine through shared memory instead of the connection."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, shared_memory

from siglip_serve_client._wire import Wire, translate
from siglip_serve_client.errors import ClientError, ServerError, SharedMemoryError

__all__ = ["Regions"]

# What Triton answers with where the interface is closed, and where it knows no region of the name.
_CLOSED = "protocol is restricted"
_UNKNOWN = "Unable to find shared memory region"


@dataclass(eq=False)
class _Region:
    name: str
    size: int
    handle: Any
    lost: bool = False


class Regions:
    """Regions that one connection has registered; safe with several threads.

    A request holds a region of its own until it is answered. Regions are reused for frames that are not
    larger, so there are never more of them than requests at once.
    """

    def __init__(self, wire: Wire) -> None:
        if sys.platform != "linux":
            raise SharedMemoryError(f"shared_memory=True works on Linux, not on {sys.platform}")
        self._wire = wire
        self._lock = threading.Lock()
        self._free: list[_Region] = []
        self._closed = False

    @contextmanager
    def holding(self, name: str, array: NDArray[np.uint8]) -> Iterator[triton.InferInput]:
        """The input `name` with the contents of `array`, which lie in a region while the block runs.

        Raises:
            SharedMemoryError: there is no room for a region, or the server cannot or may not read it.
        """
        region = self._take(array.nbytes)
        try:
            shared_memory.set_shared_memory_region(region.handle, [array])
            tensor = triton.InferInput(name, list(array.shape), "UINT8")
            tensor.set_shared_memory(region.name, array.nbytes)
            yield tensor
        except ServerError as error:
            region.lost = self.lost(error)
            raise
        finally:
            self._give(region)

    @staticmethod
    def lost(error: ClientError) -> bool:
        """Whether the server does not know the region: it was started anew since."""
        return _UNKNOWN in str(error)

    def clear(self) -> None:
        """Withdraw and remove the regions that no request holds."""
        with self._lock:
            free, self._free = self._free, []
        for region in free:
            self._destroy(region)

    def close(self) -> None:
        """Remove all regions; those that a request still holds, when it is answered."""
        with self._lock:
            self._closed = True
        self.clear()

    def _take(self, size: int) -> _Region:
        with self._lock:
            fitting = [region for region in self._free if region.size >= size]
            # Of those that are too small, one makes room for its successor.
            chosen = min(fitting or self._free[:1], key=lambda region: region.size, default=None)
            if chosen is not None:
                self._free.remove(chosen)
        if chosen is not None and not fitting:
            self._destroy(chosen)
            chosen = None
        return chosen or self._make(size)

    def _give(self, region: _Region) -> None:
        with self._lock:
            if not self._closed and not region.lost:
                self._free.append(region)
                return
        self._destroy(region)

    def _make(self, size: int) -> _Region:
        key = f"siglip-serve-client-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            handle = shared_memory.create_shared_memory_region(key, key, size, create_only=True)
        except shared_memory.SharedMemoryException as error:
            raise SharedMemoryError(f"no region of {size} bytes could be made: {error.__cause__}") from error
        region = _Region(key, size, handle)
        try:
            _reserve(key, size)
            self._wire.triton.register_system_shared_memory(key, key, size, client_timeout=self._wire.timeout)
        except OSError as error:
            self._destroy(region)
            raise SharedMemoryError(f"/dev/shm has no room for {size} bytes: {error}") from error
        except InferenceServerException as error:
            self._destroy(region)
            raise _refusal(error, self._wire.url) from error
        return region

    def _destroy(self, region: _Region) -> None:
        with suppress(InferenceServerException):  # the server may be gone, or not know it
            self._wire.triton.unregister_system_shared_memory(region.name, client_timeout=self._wire.timeout)
        shared_memory.destroy_shared_memory_region(region.handle)


def _reserve(key: str, size: int) -> None:
    # A new region has no memory yet. Without any left, writing to it would end the process with SIGBUS.
    with Path("/dev/shm", key).open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _refusal(error: InferenceServerException, url: str) -> ClientError:
    message = str(error.message() or error)
    if _CLOSED in message:
        return SharedMemoryError(
            f"the server at {url} lets nobody register shared memory: start it with "
            "`siglip-serve serve --shared-memory`, or leave shared_memory=True out"
        )
    translated = translate(error, url)
    if isinstance(translated, ServerError) or "shared memory" in message:
        return SharedMemoryError(
            f"the server at {url} cannot read this process's shared memory; is it on this machine, with the "
            f"same /dev/shm and user? ({message})"
        )
    return translated

"""A wire to a server that a test cuts in the middle of a request, and mends."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from programs import free_port

__all__ = ["Wire", "wire_to"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Wire:
    """Forwards the connections to one port to another. While it is cut, connections are refused.

    Attributes:
        port: where it listens, on 127.0.0.1, also after it was mended.
        connections: number of connections that were made.
    """

    def __init__(self, target: int) -> None:
        self.port, self._target = free_port(), target
        self.connections = 0
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._flows = threading.Event()
        self.mend()

    def hold(self) -> None:
        """Let nothing through to the server any more, so that requests stay unanswered."""
        self._flows.clear()

    def cut(self) -> None:
        """Reset all connections and refuse new ones."""
        with self._lock:
            self._listener.close()
            for end in self._ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RD)
                end.close()
            self._ends.clear()
        self._flows.set()

    def mend(self) -> None:
        """Accept connections again."""
        self._flows.set()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        listener.settimeout(0.05)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while listener.fileno() != -1:
            try:
                near, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            near.setblocking(True)
            far = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self.connections += 1
                self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def wire_to(target: int) -> Iterator[Wire]:
    """A wire to this port of the loopback interface."""
    wire = Wire(target)
    try:
        yield wire
    finally:
        wire.cut()

"""Find the address and the ports to bind."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress

from siglip_serve.errors import ServerStartError

__all__ = ["bind", "free_ports", "numeric_address"]

# Above the well-known ports, and below those that Linux gives to connections and where any port will do.
_QUIET = range(10_000, 32_768)
_TRIES = 64


def numeric_address(host: str) -> str:
    """Look up the IPv4 address of `host`; Triton binds addresses, not names.

    Raises:
        ServerStartError: `host` has no IPv4 address.
    """
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        raise ServerStartError(f"host {host!r}: expected an IPv4 address, or a name that has one") from error


def free_ports(address: str, wanted: Mapping[str, int]) -> list[int]:
    """Check that the wanted ports can be bound, and replace each 0 by a free port.

    Args:
        address: IPv4 address to bind.
        wanted: port by its use, such as `HTTP`, which names it in messages.

    Raises:
        ServerStartError: a port is out of range, is wanted twice or cannot be bound.
    """
    with ExitStack() as held:  # all ports stay bound until the last is found, so that no two are equal
        found: list[int] = []
        for use, port in wanted.items():
            if not 0 <= port < 2**16:
                raise ServerStartError(f"{use} port {port}: expected 0 to {2**16 - 1}")
            if port in found:  # two sockets that do not listen yet may be bound to one port
                other = list(wanted)[found.index(port)]
                raise ServerStartError(f"{use} port {port}: already taken by {other}")
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                bind(probe, address, port)
            except OSError as error:
                reason = f"cannot be bound: {error.strerror}; choose another one with --{use.lower()}-port"
                raise ServerStartError(f"{use} port {port} on {address} {reason}") from error
            found.append(int(probe.getsockname()[1]))
        return found


def bind(socket_: socket.socket, address: str, port: int) -> None:
    """Bind to a port, or for 0 to one that nothing else is likely to take before its owner listens.

    The system's own choice may be given away again at once: to an outgoing connection, or to another server
    that starts at the same time, since a port that is held with SO_REUSEADDR counts as free.

    Raises:
        OSError: the port cannot be bound.
    """
    for _ in range(_TRIES if port == 0 else 0):
        with suppress(OSError):
            socket_.bind((address, secrets.choice(_QUIET)))
            return
    socket_.bind((address, port))

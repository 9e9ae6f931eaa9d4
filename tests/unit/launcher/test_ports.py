"""Addresses and ports to bind."""

from __future__ import annotations

import socket

import pytest

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.ports import free_ports, numeric_address


def test_looks_up_the_address_of_a_name() -> None:
    assert numeric_address("localhost") == "127.0.0.1"
    assert numeric_address("0.0.0.0") == "0.0.0.0"
    with pytest.raises(
        ServerStartError, match=r"^host '::1': expected an IPv4 address, or a name that has one$"
    ):
        numeric_address("::1")


def test_replaces_zero_by_free_ports() -> None:
    wanted = {"HTTP": 0, "gRPC": 0, "metrics": 0}
    found = free_ports("127.0.0.1", wanted)
    assert len(set(found)) == 3
    assert free_ports("127.0.0.1", dict(zip(wanted, found, strict=True))) == found


def test_refuses_a_taken_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ServerStartError, match=f"^gRPC port {port} on 127.0.0.1 cannot be bound: Address"
        ):
            free_ports("127.0.0.1", {"HTTP": 0, "gRPC": port})


def test_refuses_one_port_for_two_uses() -> None:
    (port,) = free_ports("127.0.0.1", {"HTTP": 0})
    with pytest.raises(ServerStartError, match=f"^metrics port {port}: already taken by gRPC$"):
        free_ports("127.0.0.1", {"HTTP": 0, "gRPC": port, "metrics": port})


@pytest.mark.parametrize("port", [-1, 2**16])
def test_refuses_a_port_out_of_range(port: int) -> None:
    with pytest.raises(ServerStartError, match=f"^HTTP port {port}: expected 0 to 65535$"):
        free_ports("127.0.0.1", {"HTTP": port})


def test_a_free_port_is_none_that_the_system_gives_to_connections() -> None:
    (port,) = free_ports("127.0.0.1", {"HTTP": 0})
    assert 10_000 <= port < 32_768

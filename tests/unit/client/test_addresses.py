"""Addresses that a client accepts, and the ports that they stand for."""

from __future__ import annotations

import pytest
from siglip_serve_client import Client, UnreachableError


@pytest.mark.parametrize(
    "url", ["ftp://host:1", "host", "grpc://host", "http://host/path", "host:port", "http://", "host:99999"]
)
def test_refuses_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="expected host:port, or grpc://, grpcs://, http:// or https://"):
        Client(url)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_asks_at_the_port_of_the_scheme_unless_another_is_named(scheme: str, port: int) -> None:
    # An address of the loopback on which nothing is expected to listen.
    for url, expected in ((f"{scheme}://127.7.7.7", port), (f"{scheme}://127.7.7.7:1", 1)):
        message = f"no server answers at 127.7.7.7:{expected}$"
        with Client(url, timeout=10) as client, pytest.raises(UnreachableError, match=message):
            client.embed_text("a dog")

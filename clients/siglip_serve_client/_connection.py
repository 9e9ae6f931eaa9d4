"""The options of commands that say where the server is."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from siglip_serve_client._client import Client
from siglip_serve_client._transports import Endpoint

__all__ = ["API_KEY", "add_connection", "connected", "endpoint"]

API_KEY = "SIGLIP_API_KEY"


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add `--url` and `--ca-file`; the key comes from the environment, which others cannot list."""
    parser.add_argument(
        "--url",
        default="127.0.0.1:8001",
        help="host:port of the server's gRPC endpoint, or a URL of the scheme grpc, grpcs, http or https "
        f"(default: %(default)s); the key of a proxy before it is read from the variable {API_KEY}",
    )
    parser.add_argument(
        "--ca-file", type=Path, help="PEM file of the certificates to trust, instead of the system's"
    )


def endpoint(url: str, ca_file: Path | str | None) -> Endpoint:
    """The server that these options name, with the key of the environment.

    Raises:
        SystemExit: the URL is not one, or the file is not there; with a message.
    """
    if ca_file and not Path(ca_file).is_file():
        raise SystemExit(f"siglip-serve: {ca_file}: no such file")
    try:
        return Endpoint.parse(url, os.environ.get(API_KEY), ca_file or None)
    except ValueError as error:
        raise SystemExit(f"siglip-serve: {error}") from error


def connected(options: argparse.Namespace, concurrency: int = 16, timeout: float = 120.0) -> Client:
    """A client as these options say.

    Raises:
        SystemExit: the URL is not one, or the file is not there; with a message.
    """
    where = endpoint(options.url, options.ca_file)
    return Client(options.url, concurrency, timeout, api_key=where.api_key, ca_file=where.ca_file)

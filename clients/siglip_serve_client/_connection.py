"""The options of commands that say where the server is."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from siglip_serve_client._client import Client

__all__ = ["add_connection", "connected"]

_KEY = "SIGLIP_API_KEY"


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add `--url` and `--ca-file`; the key comes from the environment, which others cannot list."""
    parser.add_argument(
        "--url",
        default="127.0.0.1:8001",
        help="host:port of the server's gRPC endpoint, or a URL of the scheme grpc, grpcs, http or https "
        f"(default: %(default)s); the key of a proxy before it is read from the variable {_KEY}",
    )
    parser.add_argument(
        "--ca-file", type=Path, help="PEM file of the certificates to trust, instead of the system's"
    )


def connected(options: argparse.Namespace, concurrency: int = 16, timeout: float = 120.0) -> Client:
    """A client as these options say.

    Raises:
        SystemExit: the URL is not one; with a message.
    """
    try:
        return Client(
            options.url, concurrency, timeout, api_key=os.environ.get(_KEY), ca_file=options.ca_file
        )
    except ValueError as error:
        raise SystemExit(f"siglip-serve: {error}") from error

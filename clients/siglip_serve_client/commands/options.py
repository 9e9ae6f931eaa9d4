"""Options that several commands share: numbers, and where the server is."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from siglip_serve_client._client import Client
from siglip_serve_client._operations.retries import RESTART_WAIT
from siglip_serve_client._transports.endpoint import Endpoint

__all__ = ["API_KEY", "above_zero", "add_connection", "connected", "endpoint", "positive"]

API_KEY = "SIGLIP_API_KEY"


def add_connection(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    flag: str = "--url",
    default: str = "127.0.0.1:8001",
) -> None:
    """Add `--url` and `--ca-file`. The key comes from the environment, which other users cannot read.

    Args:
        flag: in place of `--url`. Its value is the option `url` all the same.
        default: an empty text means no server.
    """
    parser.add_argument(
        flag,
        dest="url",
        metavar="URL",
        default=default,
        help="host:port of the server's gRPC endpoint, or a URL of the scheme grpc, grpcs, http or https "
        f"(default: {default or 'no server'}); the key for a proxy is read from the environment variable "
        f"{API_KEY}",
    )
    parser.add_argument(
        "--ca-file", type=Path, help="PEM file of the certificates to trust, instead of the system's"
    )


def endpoint(url: str, ca_file: Path | str | None) -> Endpoint:
    """The server that these options name, with the key of the environment.

    Raises:
        SystemExit: the URL is malformed, or the file does not exist, with a message.
    """
    if ca_file and not Path(ca_file).is_file():
        raise SystemExit(f"siglip-serve: {ca_file}: no such file")
    try:
        return Endpoint.parse(url, os.environ.get(API_KEY), ca_file or None)
    except ValueError as error:
        raise SystemExit(f"siglip-serve: {error}") from error


def connected(
    options: argparse.Namespace,
    concurrency: int = 16,
    timeout: float = 120.0,
    restart_wait: float = RESTART_WAIT,
) -> Client:
    """A client for the server of these options.

    Raises:
        SystemExit: the URL is malformed, or the file does not exist, with a message.
    """
    where = endpoint(options.url, options.ca_file)
    return Client(
        options.url,
        concurrency,
        timeout,
        api_key=where.api_key,
        ca_file=where.ca_file,
        restart_wait=restart_wait,
    )


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0.

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number

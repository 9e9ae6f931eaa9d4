"""`siglip-serve gateway`: run the gateway in front of a running Triton."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from typing import Any, NoReturn

import uvicorn
from siglip_serve_client import AsyncClient, ClientError
from siglip_serve_client.commands.search.collection import CollectionError
from siglip_serve_client.projection import Projection, read_projection

from siglip_gateway.app import create_app
from siglip_gateway.backend import Backend, Checkpoint
from siglip_gateway.dimensions import mismatch
from siglip_gateway.options import ENVIRONMENT, GatewayOptions, read_keys
from siglip_gateway.search import Search, open_search

__all__ = ["main"]

_DEFAULTS = GatewayOptions()
_PATIENCE = 10.0  # seconds for Triton's answer before the start


def main(
    arguments: Sequence[str] | None = None,
    refuse: Callable[[argparse.ArgumentParser, Sequence[str]], NoReturn] | None = None,
) -> int:
    """Run the gateway until Ctrl-C or SIGTERM, and return the exit status.

    Args:
        arguments: the words after the command's name, or those of this process if None.
        refuse: ends the process because of options that the parser does not know, or None for argparse's way.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown and refuse is not None:
        refuse(parser, unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    known = {field.name for field in fields(GatewayOptions)} & vars(given).keys()
    values = {name: getattr(given, name) for name in known}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    options = GatewayOptions(**{**values, **lists})
    if problem := _problem(options, given):
        print(f"siglip-serve gateway: {problem}", file=sys.stderr)
        return 1
    if given.check_width is not None:
        return 0
    if not options.api_key_file and given.host not in {"127.0.0.1", "::1", "localhost"}:
        print(
            f"siglip-serve gateway: {given.host} is open to the network and no --api-key-file is set",
            file=sys.stderr,
        )
    # The server ends on this signal in its own time, and then raises it again for this handler.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="siglip-gateway-") as folder:
        return _run(given, options if given.workers == 1 else replace(options, metrics_folder=folder))


def _problem(options: GatewayOptions, given: argparse.Namespace) -> str | None:
    """A sentence about files that cannot be used, or that are of another checkpoint, or None."""
    try:
        read_keys(options.api_key_file)
    except (OSError, ValueError) as error:
        return f"--api-key-file: {error}"
    try:
        projection = read_projection(options.projection) if options.projection else None
    except (OSError, ValueError) as error:
        return f"--projection: {error}"
    try:
        search = open_search(options)
    except CollectionError as error:
        return str(error)
    if search is not None and given.check_width not in {None, search.index.width}:
        width = search.index.width
        return f"{options.search}: vectors of {width} numbers, and the checkpoint's have {given.check_width}"
    # A gateway of the launcher starts before Triton, so its first request checks.
    if given.check_width is not None or given.share_port or (search is None and projection is None):
        return None
    # A process of its own asks: gRPC wants one event loop per process, and this one's belongs to uvicorn.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        served = pool.submit(_served, options.triton).result()
    return None if served is None else _mismatch(options, served, projection, search)


def _mismatch(
    options: GatewayOptions, served: Checkpoint, projection: Projection | None, search: Search | None
) -> str | None:
    if projection is not None and (problem := mismatch(projection, served)):
        return f"--projection {options.projection}: {problem}"
    different = None if search is None else search.mismatch(served)
    return different and f"{options.search}: {different}"


def _served(triton: str) -> Checkpoint | None:
    """The checkpoint of Triton, or None if it does not answer now. The first request then asks again."""

    async def ask() -> Checkpoint | None:
        backend = Backend(AsyncClient(triton, timeout=_PATIENCE, restart_wait=0))
        try:
            return await backend.checkpoint()
        except ClientError:
            return None
        finally:
            await backend.close()

    return asyncio.run(ask())


def _run(given: argparse.Namespace, options: GatewayOptions) -> int:
    address = f"http://{f'[{given.host}]' if ':' in given.host else given.host}:{given.port}"
    settings: dict[str, Any] = {
        "host": given.host,
        "port": given.port,
        "access_log": False,
        "log_level": "warning",
        "timeout_graceful_shutdown": 30,
        "server_header": False,
    }
    try:
        bound = _bound(given.host, given.port, given.share_port)
        print(f"siglip-serve gateway: {address} (Triton at {options.triton})", flush=True)
        if given.workers == 1:
            uvicorn.Server(uvicorn.Config(create_app(options), **settings)).run([bound])
        else:
            bound.close()
            os.environ[ENVIRONMENT] = options.to_json()
            uvicorn.run(
                "siglip_gateway.app:from_environment", factory=True, workers=given.workers, **settings
            )
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    except OSError as error:
        print(f"siglip-serve gateway: {given.host}:{given.port}: {error.strerror}", file=sys.stderr)
        return 1
    except SystemExit as error:  # uvicorn has said why, for example a taken port
        return int(error.code or 0)
    return 0


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(address)
    return bound


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siglip-serve gateway",
        description="Serve the APIs of OpenAI, Cohere, Weaviate and Immich in front of a running Triton "
        "(`siglip-serve serve`).",
    )
    _add_addresses(parser.add_argument_group("addresses"))
    _add_access(parser.add_argument_group("access"))
    _add_search(parser.add_argument_group("search"))
    _add_limits(parser.add_argument_group("limits"))
    return parser


def _add_addresses(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--triton",
        default=_DEFAULTS.triton,
        metavar="HOST:PORT",
        help="Triton's gRPC endpoint (default: %(default)s)",
    )
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=8080, help="port to listen on (default: %(default)s)")
    group.add_argument(
        "--workers", type=_positive, default=1, help="processes that share the port (default: %(default)s)"
    )
    group.add_argument(
        "--immich-upstream",
        metavar="URL",
        help="Immich's own machine learning service, for faces and text recognition",
    )
    # For the launcher, which starts several processes on one port.
    group.add_argument("--share-port", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--metrics-folder", default=None, help=argparse.SUPPRESS)
    group.add_argument(
        "--no-access-log",
        dest="access_log",
        action="store_false",
        help="write no line per request to stderr",
    )
    group.add_argument(
        "--no-normalize",
        dest="normalized",
        action="store_false",
        help="answer vectors as the towers compute them, instead of vectors of length 1",
    )
    group.add_argument(
        "--projection",
        metavar="FILE",
        help="file of `siglip-serve fit-projection`, for requests with fewer dimensions",
    )


def _add_access(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys that callers must send, one per line; without it every caller is let in",
    )
    group.add_argument(
        "--url-host",
        dest="url_hosts",
        action="append",
        default=[],
        metavar="HOST",
        help="host from which pictures may be fetched: HOST, HOST:PORT or *.DOMAIN; may be repeated "
        "(default: no URL is fetched)",
    )
    group.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of web pages that may call the gateway; may be repeated (default: none)",
    )


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--search", metavar="PATH", help="output of `siglip-serve embed` or `bulk` that is searched"
    )
    group.add_argument(
        "--search-images", metavar="FOLDER", help="folder with its images, which may then be shown"
    )
    # For the launcher, whose processes work in a folder of their own, and which knows the checkpoint.
    group.add_argument("--search-base", help=argparse.SUPPRESS)
    group.add_argument("--check-width", type=_positive, help=argparse.SUPPRESS)


def _add_limits(group: argparse._ArgumentGroup) -> None:
    numbers = {
        "max-body": "bytes of a request",
        "max-inputs": "texts and pictures of a request",
        "max-pictures": "pictures of a request",
        "max-crops": "crops or boxes of a request to /teams",
        "max-text": "characters of a text",
        "max-running": "requests that are worked on at a time, per worker",
        "max-waiting": "requests that wait, per worker; more are refused with 429",
        "max-download": "bytes of a picture from a URL",
    }
    for name, text in numbers.items():
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        group.add_argument(
            f"--{name}", type=_positive, default=default, help=f"{text} (default: %(default)s)"
        )
    seconds = {
        "timeout": "seconds that a request may wait, and that Triton may take",
        "upload-timeout": "seconds that a body may take to arrive",
        "download-timeout": "seconds that fetching a picture may take",
    }
    for name, text in seconds.items():
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        group.add_argument(f"--{name}", type=_seconds, default=default, help=f"{text} (default: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return number

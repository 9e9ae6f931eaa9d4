"""Run one process of a door: `python -m siglip_gateway.doors http --listen HOST:PORT --triton HOST:PORT`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["main"]

_MAX_IN_FLIGHT = {"grpc": 2048, "http": 256}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM and return the exit status: 1 if the address cannot be bound."""
    options = _parser().parse_args(arguments)
    try:
        with asyncio.Runner(loop_factory=_loop_factory(options.door)) as runner:
            runner.run(_serve(options))
    except OSError as error:
        print(f"{options.door} door: {error}", file=sys.stderr)
        return 1
    return 0


def _loop_factory(door: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Choose the event loop: uvloop for gRPC, where the extra `gateway` has installed it."""
    if door == "grpc":
        with suppress(ImportError):
            import uvloop

            return uvloop.new_event_loop
    return None


def _serve(options: argparse.Namespace) -> Coroutine[Any, Any, None]:
    """Import only the chosen door: each needs tens of MB that the other does not."""
    if options.door == "http":
        from siglip_gateway.doors import http_door

        limits = options.max_in_flight, options.max_of_one_model, options.max_body
        return http_door.serve(options.listen, options.triton, options.launcher, *limits)
    # gRPC would write its own lines to standard error, about callers too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Its own threads for sockets would hand each message over to another thread, for a sixth of the CPU time.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
    from siglip_gateway.doors import grpc_door

    return grpc_door.serve(options.listen, options.triton, options.max_in_flight)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m siglip_gateway.doors", description=__doc__)
    doors = parser.add_subparsers(dest="door", required=True)
    for name, most in _MAX_IN_FLIGHT.items():
        add = doors.add_parser(name).add_argument
        counted = "requests" if name == "http" else "inferences of one model"
        add("--listen", required=True, metavar="HOST:PORT", help="address that callers use")
        add("--triton", required=True, metavar="HOST:PORT", help=f"Triton's own {name} address")
        add(
            "--max-in-flight",
            type=int,
            default=most,
            metavar="N",
            help=f"{counted} that Triton has at once (default: %(default)s)",
        )
        if name == "http":
            add("--launcher", metavar="HOST:PORT", help="where GET /health is answered")
            add(
                "--max-of-one-model",
                type=int,
                default=most,
                metavar="N",
                help="inferences of one model among these (default and most: seven eighths of them)",
            )
            add(
                "--max-body",
                type=int,
                default=512 * 2**20,
                metavar="BYTES",
                help="largest body of a request, inflated (default: %(default)s)",
            )
    return parser


if __name__ == "__main__":
    sys.exit(main())

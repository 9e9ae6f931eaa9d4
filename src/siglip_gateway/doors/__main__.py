"""Run one process of a door: `python -m siglip_gateway.doors grpc --listen HOST:PORT --triton HOST:PORT`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM and return the exit status: 1 if the address cannot be bound."""
    options = _parser().parse_args(arguments)
    # gRPC would write its own lines to standard error, about callers too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from siglip_gateway.doors import grpc_door

    try:
        asyncio.run(grpc_door.serve(options.listen, options.triton, options.max_in_flight))
    except OSError as error:
        print(f"{options.door} door: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m siglip_gateway.doors", description=__doc__)
    doors = parser.add_subparsers(dest="door", required=True)
    for name in ("grpc",):
        add = doors.add_parser(name).add_argument
        add("--listen", required=True, metavar="HOST:PORT", help="address that callers use")
        add("--triton", required=True, metavar="HOST:PORT", help=f"Triton's own {name} address")
        add(
            "--max-in-flight",
            type=int,
            default=2048,
            metavar="N",
            help="calls at once (default: %(default)s)",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`siglip-serve health`: a real inference, as a check of the server."""

from __future__ import annotations

import argparse

from siglip_serve_client.commands.checkpoint_note import print_note
from siglip_serve_client.commands.options import add_connection, connected

__all__ = ["add_health"]


def add_health(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "health",
        help="make a real inference; exit with 0 or 1",
        description="Embed a small picture with a running server: exit status 0 if it answers, 1 if not.",
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait (default: %(default)s)")
    add_connection(parser)
    parser.set_defaults(run=_health)


def _health(options: argparse.Namespace) -> int:
    with connected(options, timeout=options.timeout) as client:
        width = client.check_health()
        print_note(client)
    print(f"healthy: {options.url} embeds images (width {width})")
    return 0

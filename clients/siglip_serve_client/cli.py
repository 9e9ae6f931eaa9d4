"""The command `siglip-serve`: serve, embed, classify, explain, teams, bench, health."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from siglip_serve_client._bench_command import add_bench
from siglip_serve_client._classify_command import add_classify
from siglip_serve_client._connection import add_connection, connected
from siglip_serve_client._embed_command import add_embed
from siglip_serve_client._explain_command import add_explain
from siglip_serve_client._teams_command import add_teams
from siglip_serve_client.errors import ClientError, UnreachableError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="siglip-serve", description="SigLIP embeddings from a Triton Inference Server."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the server")  # its options are the server's own, see below
    add_embed(commands)
    add_classify(commands)
    add_explain(commands)
    add_connection(add_teams(commands))
    add_bench(commands)
    _add_health(commands)
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    options = parser.parse_args(words)
    try:
        return int(options.run(options))
    except ClientError as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        if isinstance(error, UnreachableError):
            hint = "start a server with `siglip-serve serve`, or name its gRPC port with --url"
            print(f"siglip-serve: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_health(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "health",
        help="make a real inference; exit with 0 or 1",
        description="Embed a small picture with a running server: exit status 0 if it answers, 1 if not.",
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait (default: %(default)s)")
    add_connection(parser)
    parser.set_defaults(run=_health)


def _serve(arguments: Sequence[str]) -> int:
    try:
        from siglip_serve.launcher import command as serve_command
    except ModuleNotFoundError as error:
        print(f"siglip-serve: {error}; `pip install 'siglip-serve[server]'` adds it", file=sys.stderr)
        return 1
    return serve_command.main(arguments)


def _health(options: argparse.Namespace) -> int:
    with connected(options, timeout=options.timeout) as client:
        width = client.check_health()
    print(f"healthy: {options.url} embeds images (width {width})")
    return 0

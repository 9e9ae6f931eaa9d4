"""The command `siglip-serve`: serve, gateway, embed, search, classify, explain, teams and others."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NoReturn, TypeAlias

from siglip_serve_client.commands.bench.command import add_bench
from siglip_serve_client.commands.classify import add_classify
from siglip_serve_client.commands.embed.command import add_embed
from siglip_serve_client.commands.explain.command import add_explain
from siglip_serve_client.commands.fit_projection import add_fit_projection
from siglip_serve_client.commands.health import add_health
from siglip_serve_client.commands.install_hint import install_hint
from siglip_serve_client.commands.options import add_connection
from siglip_serve_client.commands.search.command import add_search
from siglip_serve_client.commands.teams.command import add_teams
from siglip_serve_client.errors import ClientError, UnreachableError

__all__ = ["main"]

_Refuse: TypeAlias = Callable[[argparse.ArgumentParser, Sequence[str]], NoReturn]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. Without arguments print the help.

    Args:
        arguments: the words after the program's name, or those of this process if None.
    """
    parser, commands = _parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        parser.print_help()
        return 0
    if words[0] in _ELSEWHERE:
        imported, extra, _ = _ELSEWHERE[words[0]]
        try:
            run = imported()
        except ModuleNotFoundError as error:
            print(f"siglip-serve: {error}; `{install_hint(extra)}` adds it", file=sys.stderr)
            return 1
        return run(words[1:], _refuse)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(commands.choices[options.command], unknown)
    try:
        return int(options.run(options))
    except ClientError as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        if isinstance(error, UnreachableError):
            hint = "start a server with `make serve`, or give the address of its gRPC port: --url HOST:PORT"
            print(f"siglip-serve: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="siglip-serve",
        description="Embed, classify and explain images with SigLIP or CLIP on a Triton Inference Server.",
    )
    parser.add_argument("--version", action="version", version=f"siglip-serve {version('siglip-serve')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, _, text) in _ELSEWHERE.items():
        commands.add_parser(name, help=text)
    add_embed(commands)
    add_fit_projection(commands)
    add_search(commands)
    add_classify(commands)
    add_explain(commands)
    add_connection(add_teams(commands))
    add_bench(commands)
    add_health(commands)
    return parser, commands


def _refuse(command: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """End with the command's own usage, and name the nearest option to a misspelt one."""
    options = re.findall(r"--[a-z][a-z-]*", command.format_help())
    near = difflib.get_close_matches(unknown[0].partition("=")[0], options, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _serve() -> Callable[[Sequence[str], _Refuse], int]:
    from siglip_serve.launcher import command

    return command.main


def _gateway() -> Callable[[Sequence[str], _Refuse], int]:
    from siglip_gateway import command

    return command.main


def _bulk() -> Callable[[Sequence[str], _Refuse], int]:
    from siglip_serve.bulk import command

    return command.main


# Commands of packages that may not be installed: how to import each, the extra that brings it, and its help.
# Their options belong to those packages.
_ELSEWHERE = {
    "serve": (_serve, "server", "run the server"),
    "bulk": (_bulk, "bulk", "embed pictures of any number without a server"),
    "gateway": (_gateway, "gateway", "serve the APIs of OpenAI, Cohere, Weaviate and Immich"),
}

"""The command `siglip-serve`: serve, embed, teams, health."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from siglip_serve_client import Client, ClientError, UnavailableError, UnreachableError
from siglip_serve_client._teams_command import add_teams

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="siglip-serve", description="SigLIP embeddings from a Triton Inference Server."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the server")  # its options are the server's own, see below
    _add_embed(commands)
    _add_url(add_teams(commands))
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


def _add_embed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "embed",
        help="embed image files",
        description="Embed image files with a running server; write paths and embeddings to an .npz file.",
        epilog="The file holds `paths` [N] and `embeddings` [N, D] float32. Files that cannot be embedded "
        "are named on standard error and left out; the exit status is then 1.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--normalized", action="store_true", help="scale every embedding to unit length")
    parser.add_argument(
        "--concurrency", type=_positive, default=16, help="requests in flight (default: %(default)s)"
    )
    _add_url(parser)
    parser.set_defaults(run=_embed)


def _add_health(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "health",
        help="make a real inference; exit with 0 or 1",
        description="Embed a small picture with a running server: exit status 0 if it answers, 1 if not.",
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait (default: %(default)s)")
    _add_url(parser)
    parser.set_defaults(run=_health)


def _add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default="127.0.0.1:8001",
        help="host:port of the server's gRPC endpoint (default: %(default)s)",
    )


def _serve(arguments: Sequence[str]) -> int:
    try:
        from siglip_serve import serve_command
    except ModuleNotFoundError as error:
        print(f"siglip-serve: {error}; `pip install 'siglip-serve[server]'` adds it", file=sys.stderr)
        return 1
    return serve_command.main(arguments)


def _embed(options: argparse.Namespace) -> int:
    if options.output.suffix != ".npz" or not options.output.parent.is_dir():
        print(
            f"siglip-serve: {options.output}: expected a .npz file in a folder that exists", file=sys.stderr
        )
        return 2
    paths: list[str] = []
    embeddings: list[NDArray[np.float32]] = []
    failed = 0
    try:
        with Client(options.url, options.concurrency) as client:
            results = client.embed_images(options.images, options.normalized)
            pairs = zip(options.images, results, strict=True)
            for path, result in (bar := tqdm(pairs, total=len(options.images), unit="image", disable=None)):
                if isinstance(result, UnavailableError):
                    raise result
                if isinstance(result, Exception):
                    failed += 1
                    bar.write(f"{path}: {result}", file=sys.stderr)
                else:
                    paths.append(str(path))
                    embeddings.append(result)
    finally:  # what was embedded before the server went away or Ctrl-C is kept
        if embeddings:
            np.savez(options.output, paths=np.array(paths), embeddings=np.stack(embeddings))
            print(f"{options.output}: {len(paths)} embeddings of width {embeddings[0].size}")
    if failed:
        print(f"siglip-serve: {failed} of {len(options.images)} files were not embedded", file=sys.stderr)
    return 1 if failed else 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _health(options: argparse.Namespace) -> int:
    with Client(options.url, timeout=options.timeout) as client:
        width = client.check_health()
    print(f"healthy: {options.url} embeds images (width {width})")
    return 0

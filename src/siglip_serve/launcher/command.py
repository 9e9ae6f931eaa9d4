"""`siglip-serve serve`: options from `ServeOptions` and `Settings`, a running server, one line to try."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from siglip_serve.config import PREFIX, Settings
from siglip_serve.errors import SettingsError, SiglipServeError
from siglip_serve.launcher import ServeOptions, TritonServer

__all__ = ["main"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Chosen by the launcher itself.
_NOT_OPTIONS = {"tower", "checkpoint_name", "checkpoint_revision"}
# Options of the command that go to the launcher as they are.
_OWN = {
    "model_repository",
    "device",
    "models",
    "shared_memory",
    "host",
    "http_port",
    "grpc_port",
    "metrics_port",
    "log_file",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C, SIGTERM or the server's own end; the exit status."""
    options = _parser().parse_args(arguments)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        server = TritonServer(_serve_options(options))
        print(f"siglip-serve: starting {server.options.checkpoint} ...", flush=True)
        begin = time.monotonic()
        with server:
            _announce(server, time.monotonic() - begin, options.sample_image)
            status = server.wait()
            print(
                f"siglip-serve: tritonserver ended with status {status}; log: {server.log_file}",
                file=sys.stderr,
            )
            return 1
    except SiglipServeError as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsiglip-serve: stopped", flush=True)
        return 0


def _interrupt(_signal: int, _frame: object) -> None:
    for number in _SIGNALS:  # a second one must not stop the stopping
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siglip-serve serve",
        description="Run the real tritonserver on a model repository until Ctrl-C.",
        epilog=f"Every setting is also an environment variable, {PREFIX}<NAME>.",
    )
    add = parser.add_argument
    add(
        "--model-repository",
        type=Path,
        default=Path("model_repository"),
        help="directory of the models (default: %(default)s)",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto, the default: CUDA GPUs if there are any",
    )
    add("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    add("--http-port", type=int, default=8000, help="default: %(default)s; 0: any free one")
    add("--grpc-port", type=int, default=8001, help="default: %(default)s; 0: any free one")
    add("--metrics-port", type=int, default=8002, help="default: %(default)s; 0: any free one")
    add("--log-file", type=Path, default=None, help="default: ~/.local/state/siglip-serve/<HTTP port>.log")
    add("--sample-image", type=Path, default=Path("photo.jpg"), help="picture named in the printed example")
    add(
        "--models",
        type=lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
        default=(),
        metavar="NAME,...",
        help="serve only these, with the steps of each; default: all of the repository",
    )
    add(
        "--shared-memory",
        action="store_true",
        help="let clients on this machine pass tensors through system shared memory",
    )
    settings = parser.add_argument_group("settings")
    for setting in fields(Settings):
        if setting.name not in _NOT_OPTIONS:
            _add_setting(settings, setting)
    return parser


def _add_setting(group: argparse._ArgumentGroup, setting: Any) -> None:
    kind = get_type_hints(Settings)[setting.name]
    default = "" if setting.default is MISSING else f" (default: {setting.default})"
    group.add_argument(
        f"--{setting.name.replace('_', '-')}",
        choices=get_args(kind) if get_origin(kind) is Literal else None,
        metavar=None if get_origin(kind) is Literal else "N" if kind is int else "NAME",
        default=argparse.SUPPRESS,  # the environment may hold it
        help=setting.metadata["help"] + default,
    )


def _serve_options(options: argparse.Namespace) -> ServeOptions:
    given = vars(options)
    checkpoint = given.get("checkpoint") or os.environ.get(f"{PREFIX}CHECKPOINT")
    if not checkpoint:
        raise SettingsError(f"name a checkpoint with --checkpoint or the variable {PREFIX}CHECKPOINT")
    settings = {setting.name for setting in fields(Settings)} - {"checkpoint"}
    return ServeOptions(
        checkpoint=checkpoint,
        settings={name: given[name] for name in sorted(settings & given.keys())},
        **{option.name: given[option.name] for option in fields(ServeOptions) if option.name in _OWN},
    )


def _announce(server: TritonServer, seconds: float, sample: Path) -> None:
    print(
        f"""siglip-serve: ready after {seconds:.1f} s on {server.device}
  HTTP     http://{server.http_url}
  gRPC     {server.grpc_url}
  metrics  http://{server.address}:{server.metrics_port}/metrics
  log      {server.log_file}
  models   {", ".join(server.models)}
{_example(server, sample)}Ctrl-C stops it.""",
        flush=True,
    )


def _example(server: TritonServer, sample: Path) -> str:
    if "embed_image" not in server.models:
        return ""
    return f"""Try it:
  curl -s --data-binary @{sample} -H 'Content-Type: application/octet-stream' \\
    -H 'Inference-Header-Content-Length: 0' http://{server.http_url}/v2/models/embed_image/infer \\
    | tail -c {4 * server.width} | od -v -A n -t f4
"""

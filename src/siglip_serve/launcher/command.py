"""`siglip-serve serve`: run a server until Ctrl-C, and print where it serves and a command to try."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from siglip_serve.config import PREFIX, Settings
from siglip_serve.errors import ServerStartError, SettingsError, SiglipServeError
from siglip_serve.launcher.doors import GATEWAY
from siglip_serve.launcher.options import ServeOptions
from siglip_serve.launcher.ports import free_ports, numeric_address
from siglip_serve.launcher.server import TritonServer

__all__ = ["main"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GATEWAY_PORT = 8080
_GATEWAY_PORTS = 100  # that are tried where the first is taken
_GATEWAY_PACKAGES = ("fastapi", "uvicorn", "orjson", "python_multipart", "siglip_serve_client")
_SAMPLES = "samples"  # folder of images in a checkpoint, each named after what it shows
_IMAGE_TYPES = {".jpg", ".jpeg", ".png"}


def main(
    arguments: Sequence[str] | None = None,
    refuse: Callable[[argparse.ArgumentParser, Sequence[str]], NoReturn] | None = None,
) -> int:
    """Serve until Ctrl-C, SIGTERM or the end of the server, and return the exit status.

    Args:
        arguments: the words after `serve`, or those of this process if None.
        refuse: ends the process because of options that the parser does not know, or None for argparse's way.
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown and refuse is not None:
        refuse(parser, unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
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
    for number in _SIGNALS:  # a second signal must not interrupt the cleanup
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siglip-serve serve",
        usage="%(prog)s --checkpoint CHECKPOINT [options]",
        description="Run a Triton Inference Server on a model repository until Ctrl-C.",
        epilog="The options of checkpoints, towers, images, texts, heatmaps, teams and requests are also "
        f"environment variables, such as {PREFIX}DTYPE for --dtype. The option wins over the variable.",
    )
    settings = [setting for setting in fields(Settings) if setting.metadata]
    groups = {"checkpoints": parser.add_argument_group("checkpoints")}
    _add_models(parser.add_argument_group("models"))
    _add_addresses(parser.add_argument_group("addresses and files"))
    _add_gateway(parser.add_argument_group("gateway"))
    for setting in settings:
        title = setting.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_setting(groups[title], setting)
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model-repository",
        type=Path,
        default=Path("model_repository"),
        metavar="FOLDER",
        help="directory of the models (default: %(default)s)",
    )
    add(
        "--models",
        type=lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
        default=(),
        metavar="NAME,...",
        help="serve these and the models that they are made of (default: all of the repository)",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA GPUs if there are any, else the CPU (default: %(default)s)",
    )
    add(
        "--hung-after",
        type=float,
        default=ServeOptions.hung_after,
        metavar="SECONDS",
        help="kill a model process that does nothing for so long while requests wait for it; 0: never "
        "(default: %(default)g)",
    )


def _add_addresses(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        add(
            f"--{name}-port",
            type=int,
            default=port,
            metavar="PORT",
            help="0: a free one (default: %(default)s)",
        )
    for name, protocol in (("grpc", "gRPC"), ("http", "HTTP")):
        add(
            f"--direct-{name}",
            action="store_true",
            help=f"callers speak {protocol} with Triton itself instead of with a door in front of it, which "
            "bounds what waits and drops what its caller has given up",
        )
    add(
        "--shared-memory",
        action="store_true",
        help="let clients on this machine pass tensors through system shared memory",
    )
    add(
        "--log-file",
        type=Path,
        default=None,
        metavar="FILE",
        help="the server's log (default: ~/.local/state/siglip-serve/<HTTP port>.log)",
    )
    add(
        "--sample-image",
        default="",
        metavar="FILE",
        help=f"image of the printed command to try (default: the first in {_SAMPLES}/ of the checkpoint)",
    )


def _add_gateway(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--gateway-port",
        type=int,
        default=None,
        metavar="PORT",
        help="port on 127.0.0.1 of the gateway, for the APIs of OpenAI, Cohere, Weaviate and Immich; "
        f"0: a free one (default: {_GATEWAY_PORT}, or the next one that is free)",
    )
    add("--no-gateway", action="store_true", help="run no gateway")
    add(
        "--gateway-projection",
        type=Path,
        default=None,
        metavar="FILE",
        help="file of `siglip-serve fit-projection`, for requests to the gateway with fewer dimensions",
    )
    add(
        "--search",
        type=Path,
        default=None,
        metavar="FILE",
        help="output of `siglip-serve embed` or `siglip-serve bulk` that the gateway searches",
    )
    add(
        "--search-images",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="folder with its images, which the gateway may then show",
    )


def _add_setting(group: argparse._ArgumentGroup, setting: Field[Any]) -> None:
    kind = get_type_hints(Settings)[setting.name]
    choices = get_args(kind) if get_origin(kind) is Literal else None
    default = "" if setting.default in (MISSING, "") else f" (default: {setting.default})"
    group.add_argument(
        f"--{setting.name.replace('_', '-')}",
        choices=choices,
        metavar=None if choices else setting.metadata["metavar"] or "N",
        default=argparse.SUPPRESS,  # an option that is not given leaves the setting to the environment
        help=setting.metadata["help"] + default,
    )


def _serve_options(options: argparse.Namespace) -> ServeOptions:
    given = vars(options)
    checkpoint = given.get("checkpoint") or os.environ.get(f"{PREFIX}CHECKPOINT")
    if not checkpoint:
        raise SettingsError(f"name a checkpoint with --checkpoint or the variable {PREFIX}CHECKPOINT")
    settings = {setting.name for setting in fields(Settings)} - {"checkpoint"}
    own = {option.name for option in fields(ServeOptions)} - {"checkpoint", "gateway_port"}
    return ServeOptions(
        gateway_port=_gateway_port(options),
        checkpoint=checkpoint,
        settings={name: given[name] for name in sorted(settings & given.keys())},
        **{name: given[name] for name in own & given.keys()},
    )


def _gateway_port(options: argparse.Namespace) -> int | None:
    """The gateway's port, or None without a gateway. A default port that is taken is replaced."""
    if options.no_gateway:
        if options.search or options.search_images:
            raise SettingsError("--search, --search-images: belong to the gateway, leave out --no-gateway")
        return None
    if missing := [name for name in _GATEWAY_PACKAGES if find_spec(name) is None]:
        print(f"siglip-serve: note: no gateway, because {missing[0]} is not installed (extra gateway)")
        return None
    if options.gateway_port is not None:
        return int(options.gateway_port)
    others = {options.http_port, options.grpc_port, options.metrics_port}
    for port in range(_GATEWAY_PORT, _GATEWAY_PORT + _GATEWAY_PORTS):
        try:
            free_ports("127.0.0.1", {GATEWAY: port})
        except ServerStartError:
            continue
        if port in others:
            continue
        if port != _GATEWAY_PORT:
            print(f"siglip-serve: note: port {_GATEWAY_PORT} is taken, so the gateway has port {port}")
        return port
    return 0


def _announce(server: TritonServer, seconds: float, sample: str) -> None:
    for note in (*server.notes, *_unprotected(server.options)):
        print(f"siglip-serve: note: {note}")
    print(
        f"""siglip-serve: ready after {seconds:.1f} s on {server.device}
  HTTP     http://{server.http_url}
  gRPC     {server.grpc_url}
{_gateway_line(server)}  metrics  http://{server.address}:{server.metrics_port}/metrics
  log      {server.log_file}
  models   {", ".join(server.models)}
{_example(server, sample)}Ctrl-C stops it.""",
        flush=True,
    )


def _gateway_line(server: TritonServer) -> str:
    if server.gateway_port is None:
        return ""
    address = f"http://127.0.0.1:{server.gateway_port}"
    return f"  gateway  {address} (APIs of OpenAI, Cohere and others)\n  page     {address}/\n"


def _unprotected(options: ServeOptions) -> tuple[str, ...]:
    """Say what other hosts can do to a Triton that they reach without a door in front of it."""
    reached = not ip_address(numeric_address(options.host)).is_loopback
    if not (options.direct_http and reached):
        return ()
    return (
        f"--direct-http with --host {options.host} lets other hosts reach Triton itself over HTTP. Nothing "
        "limits their bodies or what gzip inflates to, deeply nested JSON may end the server, and under "
        "overload requests stay without an answer.",
    )


def _example(server: TritonServer, sample: str) -> str:
    """Write a command whose output a person can judge, as far as the served models allow."""
    command, where = shlex.quote(_command_name()), f"--url {server.grpc_url}"
    if "classify_image" in server.models:
        image = Path(sample) if sample else _first_sample(server.options.checkpoint)
        labels = " ".join(f"--label {shlex.quote(label)}" for label in _labels(image))
        intro = "Try it in another terminal"
        if image is None:
            intro += ", with an image of your own in place of IMAGE.jpg"
        path = "IMAGE.jpg" if image is None else shlex.quote(_short(image))
        return f"{intro}:\n  {command} classify {path} {where} \\\n    {labels}\n"
    if "embed_image" in server.models:
        return f"Try it in another terminal:\n  {command} health {where}\n"
    return ""


def _first_sample(checkpoint: str) -> Path | None:
    return next(iter(_images_in(Path(checkpoint).expanduser() / _SAMPLES)), None)


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in _IMAGE_TYPES)


def _labels(image: Path | None) -> list[str]:
    """Choose three labels to tell apart; the names of samples say what the samples show."""
    if image is None or image.parent.name != _SAMPLES:
        return ["dog", "cat", "car"]
    others = [file.stem for file in _images_in(image.parent) if file.stem != image.stem]
    return [image.stem, *others[:2]]


def _command_name() -> str:
    """Name `siglip-serve` as the shell finds it from the current directory."""
    script = Path(sys.executable).parent / "siglip-serve"
    found = shutil.which("siglip-serve")
    if not script.is_file() or (found and Path(found).samefile(script)):
        return "siglip-serve"
    return _short(script)


def _short(path: Path) -> str:
    """Write a path relative to the current directory if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

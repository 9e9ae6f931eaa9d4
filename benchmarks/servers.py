"""The servers that are measured: each is started, names itself, and is stopped."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.load_clients import Kind, Target

__all__ = ["Running", "run_ours", "run_peer"]

_ROOT = Path(__file__).parents[1]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for this machine


@dataclass(frozen=True)
class Running:
    """A server under test.

    Attributes:
        http_url: host:port of HTTP.
        pid: the process above all others of the server.
        columns: dtype, backend and preprocess, as the server tells them.
    """

    target: Target
    http_url: str
    pid: int
    columns: dict[str, str] = field(default_factory=dict)

    def aimed_at(self, client: Kind) -> Target:
        """The target for a client of another kind."""
        return replace(self.target, kind=client, url=self.http_url if "http" in client else self.target.url)


@contextmanager
def run_ours(
    checkpoint: Path, device: str, settings: Mapping[str, str], timeout: float, model: str = "embed_image"
) -> Iterator[Running]:
    """This repository's server with one model and its steps. `device` is auto, cpu or cuda."""
    from siglip_serve.launcher import ServeOptions, TritonServer

    with tempfile.TemporaryDirectory() as folder:
        options = ServeOptions(
            _ROOT / "model_repository",
            str(checkpoint),
            device=cast(Literal["auto", "cpu", "cuda"], device),
            settings=settings,
            log_file=Path(folder) / "server.log",
            start_timeout=timeout,
            models=(model,),
        )
        with TritonServer(options) as server:
            tower = "siglip_text_model" if model == "embed_text" else "siglip_vision_model"
            config = _get(f"http://{server.http_url}/v2/models/{tower}/config")
            parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
            columns = {
                "dtype": parameters.get("dtype", ""),
                "backend": " ".join(["triton", *(f"{name}={value}" for name, value in settings.items())]),
                "preprocess": parameters.get("preprocess", ""),
            }
            yield Running(Target("grpc", server.grpc_url, model), server.http_url, server.pid, columns)


@contextmanager
def run_peer(checkpoint: Path, device: str, arguments: Sequence[str], timeout: float) -> Iterator[Running]:
    """`peer_fastapi.py` with further arguments. `device` is cpu or cuda."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "benchmarks.peer_fastapi", "--checkpoint", str(checkpoint.resolve())]
    command += ["--device", device, "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL)
    try:
        about = _wait_until_ready(process, f"http://{url}/about", timeout)
        columns = {name: about[name] for name in ("dtype", "backend", "preprocess")}
        yield Running(Target("http", url, "/embed"), url, process.pid, columns)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the peer ended during its start, status {process.returncode}")
        try:
            return _get(url)
        except urllib.error.URLError:
            time.sleep(0.2)
    raise RuntimeError(f"the peer was not ready after {timeout:.0f} s")


def _get(url: str) -> dict[str, Any]:
    with _OPENER.open(url, timeout=10) as response:
        return dict(json.load(response))

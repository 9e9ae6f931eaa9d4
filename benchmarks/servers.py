"""This server as it is measured: it is started, names itself, and is stopped."""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.load_clients import Kind, Target

__all__ = ["Running", "run_ours"]

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


def _get(url: str) -> dict[str, Any]:
    with _OPENER.open(url, timeout=10) as response:
        return dict(json.load(response))

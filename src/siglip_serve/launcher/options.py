"""Options of a server: which models, on which device, at which address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["ServeOptions"]


@dataclass(frozen=True)
class ServeOptions:
    """Options of one server.

    Attributes:
        model_repository: directory of the models.
        checkpoint: Hugging Face directory or hub id (`owner/name@revision`).
        device: `cpu` or `cuda`; `auto` takes CUDA GPUs if there are any.
        host: IPv4 address to bind, or a name that has one.
        http_port, grpc_port, metrics_port: 0 chooses a free one.
        models: models to serve, together with the steps of each; empty: all of the repository.
        settings: further settings by name (`siglip_serve.config.Settings`), as strings.
        shared_memory: let clients on this machine pass tensors through system shared memory.
        log_file: file of the server's log; default: `~/.local/state/siglip-serve/<HTTP port>.log`.
        direct_grpc, direct_http: give callers Triton's own port instead of that of a door in front of it.
        gateway_port: port of the gateway on 127.0.0.1; None runs none, 0 chooses a free one.
        gateway_projection: file of `siglip-serve fit-projection` for the gateway.
        search: output of `siglip-serve embed` that the gateway searches, or None.
        search_images: folder with its images, which the gateway may then show, or None.
        start_timeout: seconds until an attempt to start counts as failed.
        stalled_after: seconds without progress until an attempt to start or to load a model counts as failed.
            CPU time, reading from a disk and lines of the log are progress.
        hung_after: seconds until a model process counts as hung that does nothing while requests wait for it
            (`hangs`); 0 kills none.
    """

    model_repository: Path
    checkpoint: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    models: tuple[str, ...] = ()
    shared_memory: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    log_file: Path | None = None
    direct_grpc: bool = False
    direct_http: bool = False
    gateway_port: int | None = None
    gateway_projection: Path | None = None
    search: Path | None = None
    search_images: Path | None = None
    start_timeout: float = 600.0
    stalled_after: float = 15.0
    hung_after: float = 120.0

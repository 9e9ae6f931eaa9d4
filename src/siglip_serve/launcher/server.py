"""A running `tritonserver`: start it, watch it, stop it.

The binary is that of the `nvidia-pytriton` wheel, else the one on the PATH (Triton's container). It serves a
staged copy of the repository (`stage`), whose configurations are fitted to the checkpoints and the machine.

Triton never restarts a model process that died. The launcher watches the processes and loads their model
again. A killed model process sometimes takes the server down with it, by an exception of the Python backend
that nothing catches. The launcher then starts the server again, on the same ports.

The ports that callers use may be those of doors in front of Triton, which keep from it what ends it.

Loading a model again needs Triton's explicit model control, whose endpoints are closed to callers without a
key that is made at startup. The key is in the server's command line, so other users of the machine can read
it from the process list unless /proc is mounted with hidepid.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

from siglip_serve.checkpoint.files import resolve
from siglip_serve.config import PREFIX, load_settings
from siglip_serve.errors import ServerStartError, SettingsError
from siglip_serve.launcher.checkpoints import check_options, describe_checkpoints
from siglip_serve.launcher.doors import GATEWAY, Doors
from siglip_serve.launcher.endpoint import Endpoint
from siglip_serve.launcher.log import Journal, cause, open_log, tail
from siglip_serve.launcher.options import ServeOptions
from siglip_serve.launcher.ports import free_ports, numeric_address
from siglip_serve.launcher.processes import end, spawn
from siglip_serve.launcher.stage import Stage
from siglip_serve.launcher.tritonserver import is_embedded, library_path, server_command
from siglip_serve.launcher.watcher import Watcher
from siglip_serve.machine import gpu_capabilities

__all__ = ["TritonServer"]

_DOORS_OPEN = 60.0  # seconds for the doors to open once Triton serves; they were started together
_LAST_SECONDS = 2.0  # that Triton has to end at least, when the doors took the time of a stop
_CLOSED_APIS = ("model-repository", "shared-memory", "logging", "trace")
# Each request allocates tensors of some 100 kB. By default glibc returns such memory to the kernel at once,
# which then has to clear it again page by page.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "MALLOC_TOP_PAD_": str(4 * 2**20),
}
_CHECKPOINTS = (f"{PREFIX}CHECKPOINT", f"{PREFIX}TEAMS_CHECKPOINT")
_FOLDERS = (f"{PREFIX}CACHE", f"{PREFIX}CALIBRATION")
_FORWARDED_HEADERS = "(?i)^(normalized|base64_encoded|color_order|embed_model|truncation)$"


class TritonServer:
    """A running server; use it as a context manager.

    Attributes:
        options: as given.
        http_port, grpc_port, metrics_port: the ports that callers use.
        gateway_port: the gateway's port on 127.0.0.1, or None without a gateway.
        device: `cpu` or `cuda`.
        models: names of the served models, set by `start`.
        notes: sentences for the operator about the served checkpoints, set by `start`.
        log_file: the server's log, set by `start`.

    Raises:
        ServerStartError: a port, the host or the device cannot be used.
    """

    log_file: Path

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self._host = numeric_address(options.host)
        wanted = {"HTTP": options.http_port, "gRPC": options.grpc_port, "metrics": options.metrics_port}
        self.http_port, self.grpc_port, self.metrics_port = free_ports(self._host, wanted)
        public = {"http": self.http_port, "grpc": self.grpc_port}
        doors = {kind: public[kind] for kind in _doors_of(options)}
        self.gateway_port: int | None = None
        if options.gateway_port is not None:
            (self.gateway_port,) = free_ports("127.0.0.1", {GATEWAY: options.gateway_port})
            doors[GATEWAY] = self.gateway_port
        self._doors = Doors(self._host, doors, self.grpc_url)
        # Triton's own addresses, which are those of callers where there is no door.
        self._triton = {kind: (self._host, port) for kind, port in public.items()}
        self.models: list[str] = []
        self.notes: tuple[str, ...] = ()
        self.device, self._weakest_gpu = _device(options.device)
        self._stage: Stage | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()  # held while the process is started again or stopped
        # The kernel stops the server when the thread that started it ends, not when the launcher ends. This
        # thread starts all processes and lives as long as the server.
        self._spawner = ThreadPoolExecutor(1, "siglip-serve-spawner")
        self._watcher: Watcher | None = None

    @property
    def address(self) -> str:
        """Host to connect to from this machine."""
        return "127.0.0.1" if self._host == "0.0.0.0" else self._host

    @property
    def http_url(self) -> str:
        """Address of the HTTP endpoint, `host:port`."""
        return f"{self.address}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Address of the gRPC endpoint, `host:port`."""
        return f"{self.address}:{self.grpc_port}"

    @property
    def pid(self) -> int:
        """Process id of `tritonserver`; it changes when a server that died is started again.

        Raises:
            ServerStartError: the server is not running.
        """
        if self._process is None:
            raise ServerStartError("the server is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it has answered a real inference.

        Raises:
            CheckpointError, SettingsError: a checkpoint or a setting is refused before the server starts.
            ServerStartError: the server did not start; the message says why, or ends with the last lines of
                the log.
        """
        if self._process is not None:
            raise ServerStartError("the server is already running")
        given = self._given()
        settings = load_settings(given)
        if settings.preprocess == "gpu" and self.device != "cuda":
            raise SettingsError("preprocess gpu: needs a GPU; fast and pil do not")
        check_options(settings, self._weakest_gpu or "cpu")
        named = [name for name in (settings.checkpoint, settings.teams_checkpoint) if name]
        directories = {name: resolve(name) for name in dict.fromkeys(named)}
        checkpoints = describe_checkpoints(settings, directories, self._weakest_gpu or "cpu")
        variants = ["decode_on_gpu"] if settings.preprocess == "gpu" else []
        self._stage = stage = Stage(self.options.model_repository, self.device, *variants)
        try:
            self._triton |= self._doors.take_ports()
            address, port = self._triton["http"]
            self._endpoint = Endpoint(f"{'127.0.0.1' if address == '0.0.0.0' else address}:{port}")
            self.models = stage.fill(checkpoints, settings.decoders, self.options.models)
            self.notes = stage.notes
            self.log_file = open_log(self.options.log_file, self.http_port)
            environment = _environment(given, directories)
            start = partial(spawn, self._command(stage), environment, stage.empty, self.log_file)
            self._process = self._spawner.submit(start).result()
            self._doors.start(
                lambda command: self._spawner.submit(
                    spawn, command, {**os.environ, **_KEEP_MEMORY}, stage.empty, self.log_file
                ).result(),
                Journal(self.log_file).say,
            )
            self._wait_until_served()
            self._doors.wait_until_open(_DOORS_OPEN)
            self._watcher = Watcher(
                self._process,
                self.models,
                self._load,
                lambda: self._restart(stage, start),
                self.log_file,
                self._doors.watch,
            )
            self._watcher.start()
        except BaseException:
            self.stop(timeout=2)  # no client is connected yet
            raise

    def stop(self, timeout: float = 35.0) -> None:
        """Let running requests complete, then end every process and remove every file of the run.

        Args:
            timeout: seconds until requests that are still running are abandoned.
        """
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.stop()
        with self._changing:
            process, self._process = self._process, None
        stage, self._stage = self._stage, None
        deadline = time.monotonic() + timeout
        try:
            self._doors.stop(timeout)
            if process is not None:
                replaced = watcher is not None and watcher.replaced
                left = max(deadline - time.monotonic(), _LAST_SECONDS)
                end(process, left, self.log_file if replaced else None)
        finally:
            self._spawner.shutdown()
            if stage is not None:
                stage.remove()

    def wait(self) -> int:
        """Block until the server has ended on request or has died too often, and return its exit status.

        Raises:
            ServerStartError: the server is not running.
        """
        if self._process is None or self._watcher is None:
            raise ServerStartError("the server is not running")
        self._watcher.join()
        return self._process.wait()

    def _restart(self, stage: Stage, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Replace a server that died, and return the new process."""
        with self._changing:
            if self._process is None:
                raise ServerStartError("the server was stopped")
            end(self._process, 0, None)  # its model processes may still run
            stage.remove_shared_memory()
            self._process = process = self._spawner.submit(start).result()
        self._wait_until_served()
        return process

    def _wait_until_served(self) -> None:
        deadline = time.monotonic() + self.options.start_timeout
        while not self._endpoint.is_ready():
            if self._process is None or self._process.poll() is not None:
                raise ServerStartError(cause(self.log_file))
            if time.monotonic() > deadline:
                seconds = f"{self.options.start_timeout:.0f} s"
                raise ServerStartError(f"not ready after {seconds}\n{tail(self.log_file)}")
            time.sleep(0.05)
        if "embed_image" in self.models:
            try:
                self._endpoint.embed_image()
            except ServerStartError as error:
                raise ServerStartError(f"{error}\n{tail(self.log_file)}") from error

    def _command(self, stage: Stage) -> list[str]:
        apis = [api for api in _CLOSED_APIS if api != "shared-memory" or not self.options.shared_memory]
        closed = self._endpoint.closed(apis)
        return [
            *server_command(stage.backends),
            f"--model-repository={stage.models}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",  # the staged ones are complete; it starts each model twice
            *(f"--{kind}-address={address}" for kind, (address, _) in self._triton.items()),
            *(f"--{kind}-port={port}" for kind, (_, port) in self._triton.items()),
            f"--metrics-address={self._host}",
            f"--metrics-port={self.metrics_port}",
            f"--allow-gpu-metrics={'true' if self.device == 'cuda' else 'false'}",
            f"--http-restricted-api={closed}",
            f"--grpc-restricted-protocol={closed}",
            f"--http-header-forward-pattern={_FORWARDED_HEADERS}",
            f"--backend-config=python,shm-region-prefix-name={stage.shm_prefix}",
            "--exit-timeout-secs=30",
        ]

    def _given(self) -> dict[str, str]:
        """Merge the environment with the settings of this server, which win."""
        given = {f"{PREFIX}{name.upper()}": value for name, value in self.options.settings.items()}
        return {**os.environ, **given, _CHECKPOINTS[0]: self.options.checkpoint}

    def _load(self, model: str) -> None:
        if self._stage is not None:
            self._stage.change(model)
        self._endpoint.load(model)


def _doors_of(options: ServeOptions) -> list[str]:
    """Choose the protocols that callers speak with a door."""
    given = {"http": options.direct_http, "grpc": options.direct_grpc}
    return [
        kind for kind, direct in given.items() if not (direct if direct is not None else not is_embedded())
    ]


def _environment(given: Mapping[str, str], directories: Mapping[str, Path]) -> dict[str, str]:
    """Make the server's environment, with absolute paths because the models run in another directory."""
    environment = {**_KEEP_MEMORY, **given}
    for name in _CHECKPOINTS:
        if environment.get(name):
            environment[name] = str(directories[environment[name]])
    for name in _FOLDERS:
        if environment.get(name):
            environment[name] = str(Path(environment[name]).absolute())
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment | library_path(environment)


def _device(device: str) -> tuple[str, str | None]:
    """Choose `cpu` or `cuda`, and for `cuda` find the GPU of the lowest compute capability."""
    capabilities = () if device == "cpu" else gpu_capabilities()
    if device == "cuda" and not capabilities:
        raise ServerStartError("device cuda: the NVIDIA driver on this machine shows no GPU")
    if not capabilities:
        return "cpu", None
    return "cuda", f"cuda:{capabilities.index(min(capabilities))}"

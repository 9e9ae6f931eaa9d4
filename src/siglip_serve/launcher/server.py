"""A running `tritonserver`: start it, watch it, stop it.

The binary is that of the `nvidia-pytriton` wheel, else the one on the PATH (Triton's container). It serves a
staged copy of the repository (`stage`), whose configurations are fitted to the checkpoints and the machine.

Triton never restarts a model process that died. The launcher watches the processes and loads their model
again. A killed model process sometimes takes the server down with it, by an exception of the Python backend
that nothing catches. The launcher then starts the server again, on the same ports.

On a busy machine Triton may give a model process up while it starts, and then wait for its end without end.
The launcher notices that nothing is done any more, and starts the server again.

The ports that callers use may be those of doors in front of Triton, which keep from it what ends it.

Loading a model again needs Triton's explicit model control, whose endpoints are closed to callers without a
key that is made at startup. The key is in the server's command line, so other users of the machine can read
it from the process list unless /proc is mounted with hidepid.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

from siglip_serve.checkpoint.files import resolve
from siglip_serve.config import PREFIX, load_settings
from siglip_serve.errors import ServerStartError, SettingsError
from siglip_serve.images.scaled import check_numba
from siglip_serve.launcher.checkpoints import check_options, describe_checkpoints
from siglip_serve.launcher.doors import GATEWAY, Doors
from siglip_serve.launcher.endpoint import Endpoint
from siglip_serve.launcher.environment import CHECKPOINT, KEEP_MEMORY, choose_device, server_environment
from siglip_serve.launcher.family import ModelProcesses, family
from siglip_serve.launcher.gateway import check_search, gateway_options
from siglip_serve.launcher.hangs import Hangs, Probes, read_work
from siglip_serve.launcher.log import Journal, asked_to_end, open_log, size
from siglip_serve.launcher.options import ServeOptions
from siglip_serve.launcher.ports import free_ports, numeric_address
from siglip_serve.launcher.processes import end, spawn
from siglip_serve.launcher.stage import Stage
from siglip_serve.launcher.start import Start, UnluckyStartError
from siglip_serve.launcher.status import Status, StatusServer
from siglip_serve.launcher.tritonserver import server_command, server_options
from siglip_serve.launcher.watcher import Actions, Repeated, Watcher

__all__ = ["TritonServer"]

_DOORS_OPEN = 60.0  # seconds for the doors to open once Triton serves; they were started together
_LAST_SECONDS = 2.0  # that Triton has to end at least, when the doors took the time of a stop
_CLOSED_APIS = ("model-repository", "shared-memory", "logging", "trace")
Spawn = Callable[[], subprocess.Popen[bytes]]

_ATTEMPTS = 3  # of the first start


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
        self._status = Status()
        self._status_server: StatusServer | None = None
        doors = {kind: public[kind] for kind in _doors_of(options)}
        self.gateway_port: int | None = None
        if options.gateway_port is not None:
            (self.gateway_port,) = free_ports("127.0.0.1", {GATEWAY: options.gateway_port})
            doors[GATEWAY] = self.gateway_port
        self.device, self._weakest_gpu = choose_device(options.device)
        self._doors = Doors(self._host, doors, self.grpc_url, gateway_options(options), self.device)
        # Triton's own addresses, which are those of callers where there is no door.
        self._triton = {kind: (self._host, port) for kind, port in public.items()}
        self.models: list[str] = []
        self.notes: tuple[str, ...] = ()
        self._stage: Stage | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()  # held while the process is started again or stopped
        # The kernel stops the server when the thread that started it ends, not when the launcher ends. This
        # thread starts all processes and lives as long as the server.
        self._spawner = ThreadPoolExecutor(1, "siglip-serve-spawner")
        self._watcher: Watcher | None = None
        self._hangs: Repeated | None = None
        self._log_start = 0

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
    def triton_urls(self) -> dict[str, str]:
        """Triton's own `host:port` of `http` and `grpc`, which are others than the above behind a door."""
        own = self._triton.items()
        return {kind: f"{self.address if host == self._host else host}:{port}" for kind, (host, port) in own}

    @property
    def status_url(self) -> str:
        """Address of the launcher's own `GET /health`, `host:port` on this machine (`launcher.status`).

        Raises:
            ServerStartError: the server is not running.
        """
        if self._status_server is None:
            raise ServerStartError("the server is not running")
        return self._status_server.url

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
            raise SettingsError("preprocess gpu: needs a GPU; fast, scaled and pil do not")
        if settings.preprocess == "scaled":
            check_numba()
        check_options(settings, self._weakest_gpu or "cpu")
        named = [name for name in (settings.checkpoint, settings.teams_checkpoint) if name]
        directories = {name: resolve(name) for name in dict.fromkeys(named)}
        checkpoints = describe_checkpoints(settings, directories, self._weakest_gpu or "cpu")
        if self.gateway_port is not None:
            check_search(self.options, checkpoints["main"].dims["EMBEDDING"][0])
        variants = ["decode_on_gpu"] if settings.preprocess == "gpu" else []
        self._stage = stage = Stage(self.options.model_repository, self.device, *variants)
        try:
            self._status_server = StatusServer(self._status)
            self._status_server.start()
            self._triton |= self._doors.take_ports()
            address, port = self._triton["http"]
            self._endpoint = Endpoint(f"{'127.0.0.1' if address == '0.0.0.0' else address}:{port}")
            self.models = stage.fill(checkpoints, settings.decoders, self.options.models)
            self.notes = stage.notes
            self.log_file = open_log(self.options.log_file, self.http_port)
            environment = server_environment(given, directories)
            spawn_it = partial(spawn, self._command(stage), environment, stage.empty, self.log_file)
            self._start_doors(stage)
            process = self._start_first(stage, spawn_it)
            self._doors.wait_until_open(_DOORS_OPEN)
            self._watch(process, stage, spawn_it)
        except BaseException:
            self.stop(timeout=2)  # no client is connected yet
            raise

    def stop(self, timeout: float = 35.0) -> None:
        """Let running requests complete, then end every process and remove every file of the run.

        Args:
            timeout: seconds until requests that are still running are abandoned.
        """
        self._status.stopping()
        watcher, self._watcher = self._watcher, None
        for thread in (watcher, self._hangs):
            if thread is not None:
                thread.stop()
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
            if self._status_server is not None:
                self._status_server.close()
            if stage is not None:
                stage.remove()

    def wait(self) -> int:
        """Block until the server has ended on request, and return its exit status.

        A server that dies is started again. One that was asked to end, but had to be killed, gives 0.

        Raises:
            ServerStartError: the server is not running.
        """
        if self._process is None or self._watcher is None:
            raise ServerStartError("the server is not running")
        watcher = self._watcher
        watcher.join()
        return 0 if watcher.hung_at_end else self._process.wait()

    def _start_first(self, stage: Stage, spawn_it: Spawn) -> subprocess.Popen[bytes]:
        """Start the server, in several attempts if it hangs, and return its process."""
        journal = Journal(self.log_file)
        attempt = 0
        while True:
            attempt += 1
            self._status.attempt("starting")
            try:
                process = self._start_once(stage, spawn_it)
            except UnluckyStartError as error:
                reason = str(error).partition("\n")[0]
                self._status.failed(reason)
                if attempt == _ATTEMPTS:
                    raise ServerStartError(f"gave up after {_ATTEMPTS} attempts: {error}") from error
                again = f"starting tritonserver again (attempt {attempt + 1} of {_ATTEMPTS})"
                journal.say(f"{reason}; {again}")
            else:
                self._status.served()
                return process

    def _start_once(self, stage: Stage, spawn_it: Spawn) -> subprocess.Popen[bytes]:
        """Start the server in place of one that died, and return its process."""
        with self._changing:
            if self._stage is None:
                raise ServerStartError("the server was stopped")
            if self._process is not None:
                end(self._process, 0, None)  # its model processes may still run
                stage.remove_shared_memory()
            self._log_start = size(self.log_file)
            self._process = process = self._spawner.submit(spawn_it).result()
        start = Start(
            process,
            self._endpoint,
            self.models,
            self.log_file,
            self._log_start,
            self.options.start_timeout,
            self.options.stalled_after,
        )
        try:
            start.wait_until_served(lambda: self._process is process)
        except ServerStartError:
            process.kill()
            raise
        return process

    def _start_doors(self, stage: Stage) -> None:
        def run(command: Sequence[str]) -> subprocess.Popen[bytes]:
            environment = {**os.environ, **KEEP_MEMORY}
            return self._spawner.submit(spawn, command, environment, stage.empty, self.log_file).result()

        self._doors.start(run, Journal(self.log_file).say, self.status_url, stage.root)

    def _watch(self, process: subprocess.Popen[bytes], stage: Stage, spawn_it: Spawn) -> None:
        actions = Actions(
            load=self._load,
            restart=lambda: self._start_once(stage, spawn_it),
            refuses=self._endpoint.refuses,
            asked_to_end=lambda: asked_to_end(self.log_file, self._log_start),
            tidy=lambda: stage.remove_unused_memory(self.pid),
            also=self._doors.watch,
        )
        journal = Journal(self.log_file)
        self._watcher = Watcher(
            process, self.models, actions, journal, self._status, self.options.stalled_after
        )
        self._watcher.start()
        if self.options.hung_after:
            self._hangs = self._watch_for_hangs(journal)
            self._hangs.start()

    def _watch_for_hangs(self, journal: Journal) -> Repeated:
        after, find_models = self.options.hung_after, ModelProcesses(self.models)
        questions = {"embed_image": self._endpoint.embed_image, "embed_text": self._endpoint.embed_text}
        asked = {model: question for model, question in questions.items() if model in self.models}
        hangs = Hangs(
            after,
            lambda: self.pid,
            lambda: find_models(family(self.pid)),
            lambda: read_work(f"{self.address}:{self.metrics_port}"),
            Probes(after, asked),
            journal.say,
        )

        def look() -> bool:
            served, _ = self._status.describe()
            if served:
                hangs.look()
            return True

        return Repeated("siglip-serve-hangs", journal, look)

    def _command(self, stage: Stage) -> list[str]:
        apis = [api for api in _CLOSED_APIS if api != "shared-memory" or not self.options.shared_memory]
        addresses = {**self._triton, "metrics": (self._host, self.metrics_port)}
        options = server_options(stage.models, addresses, self._endpoint.closed(apis), stage.shm_prefix)
        gpu_metrics = f"--allow-gpu-metrics={'true' if self.device == 'cuda' else 'false'}"
        return [*server_command(stage.backends), *options, gpu_metrics]

    def _given(self) -> dict[str, str]:
        """Merge the environment with the settings of this server, which win."""
        given = {f"{PREFIX}{name.upper()}": value for name, value in self.options.settings.items()}
        return {**os.environ, **given, CHECKPOINT: self.options.checkpoint}

    def _load(self, model: str) -> None:
        if self._stage is not None:
            self._stage.change(model)
        self._endpoint.load(model)


def _doors_of(options: ServeOptions) -> list[str]:
    """Choose the protocols that callers speak with a door."""
    direct = {"http": options.direct_http, "grpc": options.direct_grpc}
    return [kind for kind, wanted in direct.items() if not wanted]

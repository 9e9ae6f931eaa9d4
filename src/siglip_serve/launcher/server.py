"""Runs the real `tritonserver` on a model repository: `with TritonServer(ServeOptions(...)) as server`.

The binary is the one of the `nvidia-pytriton` wheel, or, where that is not installed (the official
container), the `tritonserver` on the PATH. The repository is served from a staged copy of links in a
temporary directory, in which the launcher fits instance counts to the machine and writes the
checkpoint into the model parameters, where clients can read it.

Triton never restarts a model process that died: the launcher watches them and loads the model again.
Now and then a model process that is killed takes the server along (an exception of the backend that
nothing catches): the launcher then starts the server again, on the same ports.
Loading needs explicit model control, whose endpoints are closed to all but the holder of a key made
at start. It is on the server's command line, so other users of the machine can read it from the
process list unless /proc is mounted with hidepid.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Self
from urllib.error import HTTPError

import psutil
from PIL import Image

from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.checkpoint.files import resolve
from siglip_serve.config import PREFIX, Settings, load_settings
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import START_REFUSED, ServerStartError, SettingsError
from siglip_serve.launcher.stage import Stage, Tower
from siglip_serve.launcher.watcher import Watcher
from siglip_serve.machine import gpu_capabilities

__all__ = ["ServeOptions", "TritonServer"]

_KEY_HEADER = "siglip-serve-key"
_FRONT = "embed_image"  # tells whether a start was one
_CLOSED_APIS = ("model-repository", "shared-memory", "logging", "trace")
# A proxy that the environment names is not for addresses of this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Tensors of some 100 kB come and go with every request. Unless told otherwise, glibc gives such memory back
# to the kernel at once, which then has to clear it again, page by page.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "MALLOC_TOP_PAD_": str(4 * 2**20),
}
_MAIN, _TEAMS = f"{PREFIX}CHECKPOINT", f"{PREFIX}TEAMS_CHECKPOINT"
_FOLDERS = (f"{PREFIX}CACHE", f"{PREFIX}CALIBRATION")
_FORWARDED_HEADERS = "(?i)^(normalized|base64_encoded|color_order|embed_model|truncation)$"


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, and where.

    Attributes:
        model_repository: the directory of the models.
        checkpoint: Hugging Face directory or hub id (`owner/name@revision`).
        device: `auto` takes CUDA GPUs if there are any.
        host: IPv4 address to bind, or a name that has one.
        http_port, grpc_port, metrics_port: 0 chooses a free one.
        models: what to serve, with the steps of each; all of the repository, if none is named.
        settings: further settings by name (`siglip_serve.config.Settings`), as strings.
        shared_memory: let clients on this machine pass tensors through system shared memory.
        log_file: where the server's log goes; default: `~/.local/state/siglip-serve/<HTTP port>.log`.
        start_timeout: seconds until a start counts as failed.
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
    start_timeout: float = 600.0


class TritonServer:
    """A running server; use it as a context manager.

    Attributes:
        http_port, grpc_port, metrics_port: the ports that are served.
        device: `cpu` or `cuda`.
        models: names of the loaded models.
        width: of the image embeddings.
        log_file: the server's log.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self._host = _numeric(options.host)
        wanted = {"HTTP": options.http_port, "gRPC": options.grpc_port, "metrics": options.metrics_port}
        self.http_port, self.grpc_port, self.metrics_port = _ports(self._host, wanted)
        self._key = secrets.token_urlsafe(24)
        self.models: list[str] = []
        self.device, self._weakest_gpu = _device(options.device)
        self._stage: Stage | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()  # held to start the process again, and to stop it
        # The kernel's signal at the launcher's death concerns the thread that made the server, not the
        # process: one thread that lives as long as the server.
        self._spawner = ThreadPoolExecutor(1, "siglip-serve-spawner")
        self._watcher: Watcher | None = None

    @property
    def address(self) -> str:
        """The host to connect to from this machine."""
        return "127.0.0.1" if self._host == "0.0.0.0" else self._host

    @property
    def http_url(self) -> str:
        """`host:port` of the HTTP endpoint."""
        return f"{self.address}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """`host:port` of the gRPC endpoint."""
        return f"{self.address}:{self.grpc_port}"

    @property
    def pid(self) -> int:
        """Process id of `tritonserver`; another one after it died and was started again."""
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
            CheckpointError, SettingsError: as found before the server runs.
            ServerStartError: the server did not start; the message tells the cause, or ends with
                the log's last lines.
        """
        if self._process is not None:
            raise ServerStartError("the server runs already")
        options = self.options
        given = self._given()
        settings = load_settings(given)  # a typo ends the start here, before anything runs
        if settings.preprocess == "gpu" and self.device != "cuda":
            raise SettingsError("preprocess gpu: needs a GPU; fast and pil do without")
        resolved = _resolved(given)
        towers = {"main": self._tower(settings, given[_MAIN], resolved[_MAIN])}
        towers["teams"] = towers["main"]
        if settings.teams_checkpoint:
            towers["teams"] = self._tower(settings, given[_TEAMS], resolved[_TEAMS])
        self.width = towers["main"].dims["EMBEDDING"][0]
        variants = ["decode_on_gpu"] if settings.preprocess == "gpu" else []
        self._stage = stage = Stage(options.model_repository, self.device, *variants)
        try:
            self.models = stage.fill(towers, settings.decoders, options.models)
            self.log_file = _open_log(options.log_file, self.http_port)
            spawn = partial(
                self._spawn, self._command(stage), self._environment(stage, resolved), stage.empty
            )
            self._process = self._spawner.submit(spawn).result()
            self._wait_until_served()
            self._watcher = Watcher(
                self._process, self.models, self._load, lambda: self._restart(stage, spawn), self.log_file
            )
            self._watcher.start()
        except BaseException:
            self.stop(timeout=2)  # nobody is served yet
            raise

    def stop(self, timeout: float = 35.0) -> None:
        """Let running requests complete, then end every process and remove every file of the start."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.stop()
        with self._changing:
            process, self._process = self._process, None
        stage, self._stage = self._stage, None
        try:
            if process is not None:
                replaced = watcher is not None and watcher.replaced
                _end(process, timeout, self.log_file if replaced else None)
        finally:
            self._spawner.shutdown()
            if stage is not None:
                stage.remove()

    def wait(self) -> int:
        """Block until the server ends for good, asked to or because it died too often; its exit status."""
        if self._process is None or self._watcher is None:
            raise ServerStartError("the server is not running")
        self._watcher.join()
        return self._process.wait()

    def _restart(self, stage: Stage, spawn: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Another server in place of one that died; its process."""
        with self._changing:
            if self._process is None:
                raise ServerStartError("the server was stopped")
            _end(self._process, 0, None)  # the model processes that it has left
            stage.remove_shared_memory()
            self._process = process = self._spawner.submit(spawn).result()
        self._wait_until_served()
        return process

    def _wait_until_served(self) -> None:
        self._wait_until_ready()
        if _FRONT in self.models:
            self._infer()

    def _spawn(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> subprocess.Popen[bytes]:
        with self.log_file.open("ab") as log:  # to append: the watcher writes there too
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the launcher, which then stops it
            )
        threading.Thread(target=_end_orphans, args=(process,), daemon=True).start()
        return process

    def _command(self, stage: Stage) -> list[str]:
        apis = [api for api in _CLOSED_APIS if api != "shared-memory" or not self.options.shared_memory]
        closed = f"{','.join(apis)}:{_KEY_HEADER}={self._key}"
        command = [
            *stage.server_command(),
            f"--model-repository={stage.models}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",  # the stage has done it, without starting each model twice
            f"--http-address={self._host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={self._host}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self._host}",
            f"--metrics-port={self.metrics_port}",
            f"--allow-gpu-metrics={'true' if self.device == 'cuda' else 'false'}",
            f"--http-restricted-api={closed}",
            f"--grpc-restricted-protocol={closed}",
            f"--http-header-forward-pattern={_FORWARDED_HEADERS}",
            f"--backend-config=python,shm-region-prefix-name={stage.shm_prefix}",
            "--exit-timeout-secs=30",
        ]
        setpriv = shutil.which("setpriv")
        # If the launcher is killed outright, the kernel asks the server to stop.
        return [setpriv, "--pdeathsig", "TERM", "--", *command] if setpriv else command

    def _environment(self, stage: Stage, settings: Mapping[str, str]) -> dict[str, str]:
        environment = {**_KEEP_MEMORY, **settings}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        environment["PYTHONUNBUFFERED"] = "1"
        return environment | stage.library_path(environment)

    def _tower(self, settings: Settings, named: str, directory: str) -> Tower:
        """A checkpoint, as named by the operator, as clients can read it in the model configurations."""
        path = Path(directory)
        hub = path.parent.name == "snapshots"
        config = load_config(path)
        plan = Plan(self._weakest_gpu or "cpu", settings.dtype, settings.backend)
        dtype = plan.for_vision(config.family, config.vision.hidden_size).dtype
        if settings.dtype not in ("auto", dtype):
            print(f"siglip-serve: {path.name}: {dtype}, too narrow to gain in {settings.dtype}", flush=True)
        identity = {
            "checkpoint_name": named.partition("@")[0] if hub else path.name,
            "checkpoint_revision": path.name if hub else "local",
            "dtype": dtype,
            "preprocess": settings.preprocess,
        }
        return Tower(identity, tensor_dims(config))

    def _given(self) -> dict[str, str]:
        """The environment, and over it the settings of this start."""
        given = {f"{PREFIX}{name.upper()}": value for name, value in self.options.settings.items()}
        return {**os.environ, **given, _MAIN: self.options.checkpoint}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.options.start_timeout
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ServerStartError(_cause(self.log_file))
            try:
                self._call("/v2/health/ready", timeout=5)
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
            else:
                return
        raise ServerStartError(f"not ready after {self.options.start_timeout:.0f} s\n{_tail(self.log_file)}")

    def _infer(self) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), (90, 120, 60)).save(picture, "PNG")
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
        try:
            self._call(f"/v2/models/{_FRONT}/infer", picture.getvalue(), headers, timeout=300)
        except (OSError, http.client.HTTPException) as error:
            reason = error.read().decode(errors="replace") if isinstance(error, HTTPError) else str(error)
            raise ServerStartError(f"the first inference failed: {reason}\n{_tail(self.log_file)}") from error

    def _load(self, model: str) -> None:
        if self._stage is not None:
            self._stage.change(model)
        self._call(f"/v2/repository/models/{model}/load", b"{}", {_KEY_HEADER: self._key}, timeout=300)

    def _call(
        self,
        path: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5,
    ) -> bytes:
        request = urllib.request.Request(f"http://{self.http_url}{path}", data, dict(headers or {}))
        with _OPENER.open(request, timeout=timeout) as response:
            return bytes(response.read())


def _resolved(settings: Mapping[str, str]) -> dict[str, str]:
    """The same with directories for checkpoints, and whole paths: the models run in a folder of their own."""
    resolved = dict(settings)
    for name in (_MAIN, _TEAMS):
        if resolved.get(name):
            resolved[name] = str(resolve(resolved[name]))
    for name in _FOLDERS:
        if resolved.get(name):
            resolved[name] = str(Path(resolved[name]).absolute())
    return resolved


def _numeric(host: str) -> str:
    """The IPv4 address of `host`; Triton binds addresses, not names."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        raise ServerStartError(f"host {host!r}: expected an IPv4 address, or a name that has one") from error


def _ports(host: str, wanted: Mapping[str, int]) -> list[int]:
    """The wanted ports, each 0 replaced by a free one; all are held at once, so that no two are the same."""
    with ExitStack() as held:
        found = []
        for what, port in wanted.items():
            if not 0 <= port < 2**16:
                raise ServerStartError(f"{what} port {port}: expected 0 to {2**16 - 1}")
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                reason = f"cannot be bound: {error.strerror}"
                raise ServerStartError(f"{what} port {port} on {host} {reason}") from error
            found.append(int(probe.getsockname()[1]))
        return found


def _device(device: str) -> tuple[str, str | None]:
    """`cpu` or `cuda`, and for that the GPU of the lowest compute capability."""
    capabilities = () if device == "cpu" else gpu_capabilities()
    if device == "cuda" and not capabilities:
        raise ServerStartError("device cuda: the NVIDIA driver on this machine shows no GPU")
    if not capabilities:
        return "cpu", None
    return "cuda", f"cuda:{capabilities.index(min(capabilities))}"


def _open_log(chosen: Path | None, http_port: int) -> Path:
    """An empty log file: the chosen one, or one a port in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111
    file = chosen or Path(state) / "siglip-serve" / f"{http_port}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    except OSError as error:
        raise ServerStartError(f"log file {file}: {error.strerror}; name one with --log-file") from error
    return file


def _end_orphans(server: subprocess.Popen[bytes]) -> None:
    """Model processes inherit the server's sockets: while they live, a dead server's callers wait on."""
    server.wait()
    with suppress(ProcessLookupError):  # the server's session is its own, orphans stay in its group
        os.killpg(server.pid, signal.SIGKILL)


def _end(server: subprocess.Popen[bytes], timeout: float, log_file: Path | None) -> None:
    """SIGTERM lets running requests complete; whoever is left after `timeout` is killed.

    A model whose process died is never unloaded: Triton would wait out its time for it. With a
    `log_file`, the server is killed as soon as that tells that the last request has completed.
    """
    try:
        family = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    server.terminate()
    deadline = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if log_file and "All models are stopped" in log_file.read_text(encoding="utf-8", errors="replace"):
            psutil.wait_procs(family, timeout=5)
            break
    if server.poll() is None:
        server.kill()
        server.wait()
    psutil.wait_procs(family, timeout=3)
    _end_orphans(server)
    psutil.wait_procs(family, timeout=3)


def _cause(log_file: Path) -> str:
    """Why a start failed: the models' own words if there are any, else the log's errors, else its end."""
    text = log_file.read_text(encoding="utf-8", errors="replace")
    found = re.findall(rf'{START_REFUSED}(.*?)(?:\\n\\nAt:|"?$)', text, re.MULTILINE)
    if found:  # the log writes a message on one line, and once for every model that depends on it
        return "\n".join(dict.fromkeys(found)).replace("\\n", "\n")
    errors = [line for line in text.splitlines() if re.match(r"E\d{4} .*failed|error:", line)]
    if errors:
        return "\n".join(["tritonserver ended during its start:", *errors[:8], f"the whole log: {log_file}"])
    return f"tritonserver ended during its start\n{_tail(log_file)}"


def _tail(log_file: Path, lines: int = 25) -> str:
    text = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the last lines of {log_file}:", *text[-lines:]])

"""The temporary directory from which a server runs: links to models and backend, nothing copied."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from siglip_serve.engine.buckets import rows_of_a_pass
from siglip_serve.engine.turns import remove_unused
from siglip_serve.errors import ServerStartError
from siglip_serve.machine import available_cores

__all__ = ["Stage", "Tower"]

_NAME = "siglip-serve-"
_SHM = Path("/dev/shm")
_MOST_PROCESSES = 32
_FILES = "INPUT_IMAGE"
_PIXELS = "PIXEL_VALUES"

Config = Any  # model_config_pb2.ModelConfig, whose module has no types


@dataclass(frozen=True)
class Tower:
    """A checkpoint as the configurations of its models show it.

    Attributes:
        identity: parameters that a Python model gets, unless its configuration has them.
        dims: dimensions by tensor name, where a configuration leaves them to the checkpoint.
    """

    identity: Mapping[str, str]
    dims: Mapping[str, Sequence[int]]


class Stage:
    """What one server run needs on disk.

    Attributes:
        root: the directory, named after this process; `remove` deletes it.
        device: `cpu` or `cuda`.
        variants: of a model's `configs/<variant>.pbtxt` the first that there is takes the place of its
            `config.pbtxt`; the device is the last one.
        models: the staged model repository.
        empty: an empty working directory, since the model processes import from theirs.
        shm_prefix: of the shared-memory files that the backend makes.
    """

    def __init__(self, repository: Path, device: str, *variants: str) -> None:
        _sweep()
        if not repository.is_dir():
            raise ServerStartError(
                f"model repository {str(repository)!r}: no such directory; name it with --model-repository"
            )
        self.repository = repository.resolve()
        self.device = device
        self.variants = (*variants, device)
        self.root = Path(tempfile.mkdtemp(prefix=f"{_NAME}{os.getpid()}-"))
        self._lock = _try_lock(self.root)
        self.models = self.root / "models"
        self.empty = self.root / "cwd"
        self.shm_prefix = f"{self.root.name}-"
        self._backends = self.root / "backends"

    def fill(self, towers: Mapping[str, Tower], decoders: int, wanted: Sequence[str] = ()) -> list[str]:
        """Link every model of the repository and write its configuration.

        Args:
            towers: by the value of a model's parameter `tower`; `main` is for those that have none.
            decoders: processes of a CPU model with several of them; 0 fits them to the cores. Where images
                are decoded on GPUs, processes on each; 0 leaves them as configured.
            wanted: models to serve, with the steps that they are made of; all, if none is named.

        Returns:
            The models' names.
        """
        self.empty.mkdir()
        configs = {
            file.parent.name: self._read(file.parent) for file in self.repository.glob("*/config.pbtxt")
        }
        if not configs:
            raise ServerStartError(
                f"model repository {str(self.repository)!r}: no <model>/config.pbtxt in it"
            )
        names = _with_steps(configs, wanted or list(configs))
        for name in names:
            self._stage_model(self.repository / name, configs[name], towers, decoders)
        return names

    def change(self, model: str) -> None:
        """Make a model look changed: Triton does not load again what has not changed since."""
        for version in (self.models / model).iterdir():
            if version.name.isdigit():
                (version / "loaded_again").write_text(str(time.time()), encoding="ascii")

    def remove_shared_memory(self) -> None:
        """Delete the shared memory of a server that died."""
        _remove_shared_memory(self.root.name)

    def remove(self) -> None:
        """Delete the directory, and shared memory that killed model processes have left."""
        _remove(self.root.name)
        remove_unused()
        if self._lock is not None:
            self._lock.close()

    def server_command(self) -> list[str]:
        """The `tritonserver` to run, with its backends."""
        package = _pytriton()
        if package is None:
            installed = shutil.which("tritonserver") or "/opt/tritonserver/bin/tritonserver"
            if not Path(installed).is_file():
                raise ServerStartError(
                    "no tritonserver: install nvidia-pytriton (pip install 'siglip-serve[server]') "
                    "or run in a Triton container"
                )
            return [installed]
        self._link_backend(package / "tritonserver")
        return [str(package / "tritonserver/bin/tritonserver"), f"--backend-directory={self._backends}"]

    def library_path(self, environment: Mapping[str, str]) -> dict[str, str]:
        """`LD_LIBRARY_PATH` with this interpreter's libpython first and the wheel's libraries second."""
        package = _pytriton()
        if package is None:
            return {}
        folders = [_libpython().parent, package.parent / "nvidia_pytriton.libs"]
        present = [path for path in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
        return {"LD_LIBRARY_PATH": os.pathsep.join([*map(str, folders), *present])}

    def _read(self, source: Path) -> Config:
        """A model's configuration: the first variant of it, if there is one."""
        variants = [source / "configs" / f"{variant}.pbtxt" for variant in self.variants]
        chosen = next((file for file in variants if file.is_file()), source / "config.pbtxt")
        try:
            config: Config = text_format.Parse(
                chosen.read_text(encoding="utf-8"), model_config_pb2.ModelConfig()
            )
        except text_format.ParseError as error:
            raise ServerStartError(f"{chosen}: {error}") from error
        return config

    def _stage_model(self, source: Path, config: Config, towers: Mapping[str, Tower], decoders: int) -> None:
        target = self.models / source.name
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.name.isdigit():  # a folder of its own, for `change`
                (target / entry.name).mkdir()
                for file in entry.iterdir():
                    (target / entry.name / file.name).symlink_to(file)
            elif entry.name not in {"config.pbtxt", "configs"}:
                (target / entry.name).symlink_to(entry)
        config.name = source.name
        tower = towers[config.parameters["tower"].string_value if "tower" in config.parameters else "main"]
        if config.max_batch_size:
            for tensor in [*config.input, *config.output]:
                tensor.dims[:] = tower.dims.get(tensor.name, tensor.dims)
        if config.backend == "python":
            for name, value in tower.identity.items():
                if name not in config.parameters:
                    config.parameters[name].string_value = value
            self._set_processes(config, decoders)
            _prefer_full_passes(config, tower)
        (target / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")

    def _set_processes(self, config: Config, decoders: int) -> None:
        decodes = any(tensor.name == _FILES for tensor in config.input)
        for group in config.instance_group:
            if group.kind == model_config_pb2.ModelInstanceGroup.KIND_CPU and group.count > 1:
                group.count = decoders or self._processes()
            elif group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU and decodes and decoders:
                group.count = decoders

    def _processes(self) -> int:
        cores = available_cores()
        # Beside a GPU, a quarter of the cores is left to the server and to its clients.
        return min(_MOST_PROCESSES, max(1, cores * 3 // 4) if self.device == "cuda" else cores)

    def _link_backend(self, server: Path) -> None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            have = sorted(path.name for path in stub.parents[1].iterdir())
            raise ServerStartError(
                f"no Triton Python backend for Python {version}; there is {', '.join(have)}"
            )
        target = self._backends / "python"
        target.mkdir(parents=True)
        for entry in [*(server / "backends/python").iterdir(), stub]:
            if entry.name != "__pycache__":
                (target / entry.name).symlink_to(entry)


def _prefer_full_passes(config: Config, tower: Tower) -> None:
    """Of a tower in several processes on a GPU: what it computes at once, if it takes larger batches."""
    gpu = model_config_pb2.ModelInstanceGroup.KIND_GPU
    several = any(group.kind == gpu and group.count > 1 for group in config.instance_group)
    if several and any(tensor.name == _PIXELS for tensor in config.input):
        rows = rows_of_a_pass(tower.dims["PATCH_EMBEDDINGS"][0])
        if rows < config.max_batch_size:
            config.dynamic_batching.preferred_batch_size[:] = [rows]


def _with_steps(configs: Mapping[str, Config], wanted: Sequence[str]) -> list[str]:
    """The wanted models and all that they are made of, in order of their names."""
    found: set[str] = set()
    left = list(wanted)
    while left:
        name = left.pop()
        if name not in configs:
            raise ServerStartError(
                f"model {name!r}: not in the repository; it has {', '.join(sorted(configs))}"
            )
        if name not in found:
            found.add(name)
            left += [step.model_name for step in configs[name].ensemble_scheduling.step]
    return sorted(found)


def _pytriton() -> Path | None:
    found = importlib.util.find_spec("pytriton")
    return Path(found.origin).parent if found and found.origin else None


def _libpython() -> Path:
    names = [sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LDLIBRARY")]
    library, multiarch = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("MULTIARCH") or ""
    for folder in (Path(library), Path(library) / multiarch):
        for name in names:
            if name and ".so" in name and (folder / name).is_file():
                return folder / name
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise ServerStartError(
        f"this Python ({sys.executable}) has no shared libpython, which Triton's Python backend needs: "
        f"on Debian and Ubuntu `apt-get install libpython{version}`; "
        "with pyenv build it with PYTHON_CONFIGURE_OPTS=--enable-shared"
    )


def _sweep() -> None:
    """Remove what earlier runs of this user left that were killed outright.

    A run holds a lock on its directory: process ids would not do, they mean something else in another
    container that shares /tmp.
    """
    for root in Path(tempfile.gettempdir()).glob(f"{_NAME}*/"):
        with suppress(OSError):
            status = root.stat()
            # One that is being made has no lock yet.
            old = status.st_uid == os.getuid() and time.time() - status.st_mtime > 10
            if old and (lock := _try_lock(root)) is not None:
                _remove(root.name)
                lock.close()


def _try_lock(root: Path) -> IO[bytes] | None:
    """The open, locked lock file of a run's directory; None while another process holds it."""
    lock = (root / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def _remove_shared_memory(name: str) -> None:
    for leftover in _SHM.glob(f"{name}*"):
        with suppress(OSError):
            leftover.unlink()


def _remove(name: str) -> None:
    _remove_shared_memory(name)
    shutil.rmtree(Path(tempfile.gettempdir()) / name, ignore_errors=True)

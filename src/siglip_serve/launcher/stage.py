"""The temporary directory from which a server runs: links to the models and fitted configurations."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from google.protobuf import text_format

from siglip_serve.config import CheckpointUse
from siglip_serve.engine.turns import remove_unused
from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.checkpoints import ServedCheckpoint
from siglip_serve.launcher.configurations import (
    Config,
    checkpoint_use,
    fit,
    mark_heatmaps,
    read_config,
    with_steps,
)
from siglip_serve.launcher.family import family, mapped_files

__all__ = ["Stage"]

_NAME = "siglip-serve-"
_SHM = Path("/dev/shm")


class Stage:
    """Files of one server run.

    Args:
        repository: directory of the models.
        device: `cpu` or `cuda`.
        variants: configurations to prefer to that of the device, see `read_config`.

    Attributes:
        root: the directory, named after this process; `remove` deletes it.
        models: the staged model repository.
        empty: an empty working directory, because the model processes import from theirs.
        backends: the place of the linked Python backend.
        shm_prefix: prefix of the shared-memory files that the Python backend makes.
        notes: sentences for the operator about the checkpoints that the staged models load.

    Raises:
        ServerStartError: the repository does not exist.
    """

    def __init__(self, repository: Path, device: str, *variants: str) -> None:
        _sweep()
        if not repository.is_dir():
            raise ServerStartError(
                f"model repository {str(repository)!r}: no such directory; name it with --model-repository"
            )
        self.notes: tuple[str, ...] = ()
        self._repository = repository.resolve()
        self._device = device
        self._variants = (*variants, device)
        self.root = Path(tempfile.mkdtemp(prefix=f"{_NAME}{os.getpid()}-"))
        self._lock = _try_lock(self.root)
        self.models = self.root / "models"
        self.empty = self.root / "cwd"
        self.backends = self.root / "backends"
        self.shm_prefix = f"{self.root.name}-"
        self._unused: set[Path] = set()

    def fill(
        self, checkpoints: Mapping[CheckpointUse, ServedCheckpoint], decoders: int, wanted: Sequence[str] = ()
    ) -> list[str]:
        """Link every model of the repository and write its fitted configuration.

        Args:
            checkpoints: by use, the value of a model's parameter `tower`.
            decoders: see `configurations.fit`.
            wanted: models to serve, together with the steps of each; empty: all.

        Returns:
            The models' names.

        Raises:
            ServerStartError: the repository has no models or not all wanted ones, or one is malformed.
        """
        self.empty.mkdir()
        folders = sorted(file.parent for file in self._repository.glob("*/config.pbtxt"))
        configs = {folder.name: read_config(folder, self._variants) for folder in folders}
        if not configs:
            raise ServerStartError(
                f"model repository {str(self._repository)!r}: no <model>/config.pbtxt in it"
            )
        names = with_steps(configs, wanted or list(configs))
        mark_heatmaps(configs, names)
        notes: dict[str, None] = {}
        for name in names:
            checkpoint = checkpoints[checkpoint_use(configs[name])]
            fit(configs[name], checkpoint, self._device, decoders)
            self._link(name, configs[name])
            if configs[name].backend == "python":  # an ensemble loads no checkpoint
                notes |= dict.fromkeys(checkpoint.notes)
        self.notes = tuple(notes)
        return names

    def change(self, model: str) -> None:
        """Make a model look changed, because Triton does not load an unchanged model again."""
        for version in (self.models / model).iterdir():
            if version.name.isdigit():
                (version / "loaded_again").write_text(str(time.time()), encoding="ascii")

    def remove_shared_memory(self) -> None:
        """Delete the shared memory of a server that died."""
        _remove_shared_memory(self.root.name)
        remove_unused()

    def remove_unused_memory(self, server: int) -> None:
        """Delete the shared memory that no model process maps, now and when this was last called.

        The server maps new memory before it starts the model process, so one look does not suffice. It also
        keeps the memory of dead ones mapped.

        Args:
            server: process id of `tritonserver`, which runs and loads no model now.
        """
        files = set(_SHM.glob(f"{self.root.name}*"))
        unused = files - mapped_files(family(server)[1:]) if files else files
        for file in unused & self._unused:
            file.unlink(missing_ok=True)
        self._unused = unused

    def remove(self) -> None:
        """Delete the directory, and the shared memory of killed model processes."""
        _remove(self.root.name)
        remove_unused()
        if self._lock is not None:
            self._lock.close()

    def _link(self, name: str, config: Config) -> None:
        target = self.models / name
        target.mkdir(parents=True)
        for entry in (self._repository / name).iterdir():
            if entry.name.isdigit():  # a directory instead of a link: `change` writes into it
                (target / entry.name).mkdir()
                for file in entry.iterdir():
                    (target / entry.name / file.name).symlink_to(file)
            elif entry.name not in {"config.pbtxt", "configs"}:
                (target / entry.name).symlink_to(entry)
        (target / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")


def _sweep() -> None:
    """Remove the files of this user's earlier runs that were killed.

    A run holds a lock on its directory. Its process id would not identify it: containers that share /tmp
    have process ids of their own.
    """
    for root in Path(tempfile.gettempdir()).glob(f"{_NAME}*/"):
        with suppress(OSError):
            status = root.stat()
            # A new directory is not locked yet.
            old = status.st_uid == os.getuid() and time.time() - status.st_mtime > 10
            if old and (lock := _try_lock(root)) is not None:
                _remove(root.name)
                lock.close()


def _try_lock(root: Path) -> IO[bytes] | None:
    """Open and lock the lock file of a run's directory; None while another process holds it."""
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

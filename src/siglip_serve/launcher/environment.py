"""The environment and the device of a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from siglip_serve.config import PREFIX
from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.tritonserver import library_path
from siglip_serve.machine import gpu_capabilities

__all__ = ["CHECKPOINT", "KEEP_MEMORY", "choose_device", "server_environment"]

# Each request allocates tensors of some 100 kB. By default glibc returns such memory to the kernel at once,
# which then has to clear it again page by page.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "MALLOC_TOP_PAD_": str(4 * 2**20),
}
CHECKPOINT = f"{PREFIX}CHECKPOINT"
_CHECKPOINTS = (CHECKPOINT, f"{PREFIX}TEAMS_CHECKPOINT")
_FOLDERS = (f"{PREFIX}CACHE", f"{PREFIX}CALIBRATION")


def server_environment(given: Mapping[str, str], directories: Mapping[str, Path]) -> dict[str, str]:
    """Make the server's environment, with absolute paths because the models run in another directory."""
    environment = {**KEEP_MEMORY, **given}
    for name in _CHECKPOINTS:
        if environment.get(name):
            environment[name] = str(directories[environment[name]])
    for name in _FOLDERS:
        if environment.get(name):
            environment[name] = str(Path(environment[name]).absolute())
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment | library_path(environment)


def choose_device(device: str) -> tuple[str, str | None]:
    """Choose `cpu` or `cuda`, and for `cuda` find the GPU of the lowest compute capability."""
    capabilities = () if device == "cpu" else gpu_capabilities()
    if device == "cuda" and not capabilities:
        raise ServerStartError("device cuda: the NVIDIA driver on this machine shows no GPU")
    if not capabilities:
        return "cpu", None
    return "cuda", f"cuda:{capabilities.index(min(capabilities))}"

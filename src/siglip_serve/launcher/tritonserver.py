"""Find the `tritonserver` of this installation, and the Python backend and libraries that it needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from siglip_serve.errors import ServerStartError

__all__ = ["library_path", "server_command", "server_options"]

_FORWARDED_HEADERS = "(?i)^(normalized|base64_encoded|color_order|embed_model|truncation|arrived)$"


def server_command(backends: Path) -> list[str]:
    """Find the binary: that of the `nvidia-pytriton` wheel, else the one on the PATH (Triton's container).

    Args:
        backends: directory to link the wheel's Python backend into; not made for a server of its own.

    Raises:
        ServerStartError: there is no `tritonserver`, or none for this version of Python.
    """
    package = _pytriton()
    if package is None:
        installed = shutil.which("tritonserver") or "/opt/tritonserver/bin/tritonserver"
        if not Path(installed).is_file():
            raise ServerStartError(
                "no tritonserver: needs the extra server (`.venv/bin/pip install -e '.[server]'` in the "
                "checkout) or a Triton container"
            )
        return [installed]
    _link_backend(package / "tritonserver", backends)
    return [str(package / "tritonserver/bin/tritonserver"), f"--backend-directory={backends}"]


def server_options(
    models: Path, addresses: Mapping[str, tuple[str, int]], closed: str, shm_prefix: str
) -> list[str]:
    """Write the options of a server.

    Args:
        models: the staged model repository.
        addresses: address and port of `http`, `grpc` and `metrics`.
        closed: APIs that need a key, and the key (`endpoint.Endpoint.closed`).
        shm_prefix: prefix of the shared-memory files that the Python backend makes.
    """
    return [
        f"--model-repository={models}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",  # the staged ones are complete; it starts each model twice
        *(f"--{kind}-address={address}" for kind, (address, _) in addresses.items()),
        *(f"--{kind}-port={port}" for kind, (_, port) in addresses.items()),
        f"--http-restricted-api={closed}",
        f"--grpc-restricted-protocol={closed}",
        f"--http-header-forward-pattern={_FORWARDED_HEADERS}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--exit-timeout-secs=30",
    ]


def library_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Compute `LD_LIBRARY_PATH` for the wheel's server: this Python's libpython first, then the wheel's own.

    Returns:
        The variable by its name; empty where the server is not that of the wheel.
    """
    package = _pytriton()
    if package is None:
        return {}
    folders = [_libpython().parent, package.parent / "nvidia_pytriton.libs"]
    present = [path for path in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
    return {"LD_LIBRARY_PATH": os.pathsep.join([*map(str, folders), *present])}


def _pytriton() -> Path | None:
    found = importlib.util.find_spec("pytriton")
    return Path(found.origin).parent if found and found.origin else None


def _link_backend(server: Path, backends: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = sorted(path.name for path in stub.parents[1].iterdir())
        raise ServerStartError(
            f"no Triton Python backend for Python {version}; there is one for {', '.join(have)}"
        )
    target = backends / "python"
    target.mkdir(parents=True)
    for entry in [*(server / "backends/python").iterdir(), stub]:
        if entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)


def _libpython() -> Path:
    names = [sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LDLIBRARY")]
    library, multiarch = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("MULTIARCH") or ""
    for folder in (Path(library), Path(library) / multiarch):
        for name in names:
            if name and ".so" in name and (folder / name).is_file():
                return folder / name
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise ServerStartError(
        f"this Python ({sys.executable}) has no shared libpython, which Triton's Python backend needs. "
        f"On Debian and Ubuntu run `apt-get install libpython{version}`; "
        "with pyenv build it with PYTHON_CONFIGURE_OPTS=--enable-shared"
    )

"""Settings of all tests: Triton's interpreter where there is no GPU, and the order of a parallel run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# Triton's functions become interpreted ones only if this is set before they are imported. torch imports them
# at times of its choosing, so it is set before any test is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The processes of a parallel run share the cores: threads of torch would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_SHARED_SERVERS = {"server", "exact_server", "sharing_server", "front", "gateway_url"}
# Files that share the server whose processes they kill.
_MORTAL = ("test_embed_interrupted.py", "test_launcher.py", "triton/client/test_restarts.py")
_OWN_SERVERS = (
    "test_clip.py",
    "test_costly_images.py",
    "test_gpu_jpeg.py",
    "test_hangs.py",
    "test_healing.py",
    "test_naflex.py",
    "test_turns.py",
)
# What takes longest comes first, so that no process is left with it at the end.
_FIRST = ("servers", "mortal")


def _scope_of(test: str) -> str:
    """Name what must run in one process: a file, or all files that share servers."""
    file = test.partition("::")[0]
    if "/triton/" not in file or file.endswith(_OWN_SERVERS):
        return file
    return "mortal" if file.endswith(_MORTAL) else "servers"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Give `pytest -n` whole files, in their order, and one process all files that share servers.

    Otherwise each process would start the shared servers for itself.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = _scope_of
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes longest, and refuse a shared server in a file that may run in another process.

    Raises:
        UsageError: such a test is to move to another file.
    """
    for item in items:
        shared = _SHARED_SERVERS.intersection(getattr(item, "fixturenames", ()))
        if shared and "/triton/" in item.nodeid and _scope_of(item.nodeid) != "servers":
            raise pytest.UsageError(f"{item.nodeid}: shares a server, which files of own servers must not")
    order = {scope: place for place, scope in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(_scope_of(item.nodeid), len(order)))

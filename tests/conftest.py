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
_OWN_SERVERS = (
    "test_clip.py",
    "test_costly_images.py",
    "test_gpu_jpeg.py",
    "test_healing.py",
    "test_launcher.py",
    "test_naflex.py",
    "test_restarts.py",
    "test_turns.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Give `pytest -n` whole files, in their order, and one process all files that share servers.

    Otherwise each process would start the shared servers for itself.
    """
    from xdist.scheduler import LoadScopeScheduling

    def process_of(test: str) -> str:
        file = test.partition("::")[0]
        return "servers" if "/triton/" in file and not file.endswith(_OWN_SERVERS) else file

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = process_of
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a shared server in a file that may run in another process than the shared servers.

    Raises:
        UsageError: such a test is to move to another file.
    """
    for item in items:
        shared = _SHARED_SERVERS.intersection(getattr(item, "fixturenames", ()))
        if shared and item.path.name in _OWN_SERVERS:
            raise pytest.UsageError(f"{item.nodeid}: shares a server, which files of own servers must not")

"""Settings of all tests: Triton's interpreter where there is no GPU, and the order of a parallel run."""

from __future__ import annotations

import os

import pytest
import torch

# Triton's functions become interpreted ones only if this is set before they are imported. torch imports them
# at times of its choosing, so it is set before any test is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The processes of a parallel run share the cores: threads of torch would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_SHARED_SERVERS = {"server", "exact_server", "sharing_server", "front"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tell `pytest -n` which tests to keep in one process: those of a file, and all that share servers.

    Otherwise each process would start the shared servers for itself.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        shares = _SHARED_SERVERS.intersection(getattr(item, "fixturenames", ()))
        group = "servers" if shares else item.path.relative_to(config.rootpath).as_posix()
        item.add_marker(pytest.mark.xdist_group(group))

"""A Ray cluster of three nodes on this machine, whose nodes and actors are killed and replaced."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any, Self

import psutil
from processes import still_running

from tests.chaos.bulk_job import below, command_of

__all__ = ["RayCluster"]

_NODES = 3
_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}


class RayCluster:
    """A head without cores, where drivers are at home, and nodes with one core each.

    Attributes:
        address: of the cluster.
    """

    def __enter__(self) -> Self:
        from ray.cluster_utils import Cluster

        self._seen: set[psutil.Process] = set()
        self._cluster: Any = Cluster(initialize_head=True, head_node_args={**_NODE, "num_cpus": 0})
        self._nodes = [self._cluster.add_node(**_NODE) for _ in range(_NODES)]
        self.address = str(self._cluster.address)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._look()
        self._cluster.shutdown()

    def kill_actor(self) -> bool:
        """Kill the process of the actor that has run longest."""
        return self._kill("ray::_RayWorker")

    def kill_decoder(self) -> bool:
        """Kill the process that has decoded longest."""
        return self._kill("siglip_serve.bulk.decoder")

    def kill_raylet(self) -> bool:
        """Kill the oldest node, and add another some seconds later."""
        self._look()
        node = self._nodes.pop(0)
        node.kill_raylet()
        self._cluster.remove_node(node, allow_graceful=False)
        time.sleep(3)
        self._nodes.append(self._cluster.add_node(**_NODE))
        return True

    def left_over(self, seconds: float = 30.0) -> int:
        """Shut the cluster down, and count processes of jobs that still run."""
        self._look()
        self._cluster.shutdown()
        return len(still_running(self._seen, timeout=seconds))

    def _kill(self, words: str) -> bool:
        found = self._look(words)
        if found:
            found[0].kill()
        return bool(found)

    def _look(self, words: str = "") -> list[psutil.Process]:
        found = below(os.getpid())
        self._seen |= {one for one in found if "siglip" in command_of(one) or "ray::" in command_of(one)}
        return [one for one in found if words in command_of(one)]

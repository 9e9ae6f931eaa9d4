"""`docker/monitoring`: Prometheus scrapes a real server, and every query of the dashboard has data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml
from images import encode, photo
from programs import free_port, program
from tritonclient.utils import InferenceServerException
from wire import OPENER, ROOT, GrpcCaller

from siglip_serve.launcher import TritonServer

FOLDER = ROOT / "docker" / "monitoring"
PICTURE = encode(photo(64, 48, 3), "JPEG")
DASHBOARD = json.loads((FOLDER / "dashboards" / "siglip-serve.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
# These have no data without a GPU, or without a fault of the server.
EMPTY = re.compile(r"nv_gpu_|BACKEND\|REJECTED")


@pytest.fixture(scope="module")
def prometheus(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus with the project's configuration, except for targets and intervals."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    address = f"127.0.0.1:{free_port()}"
    targets = {"siglip-serve": f"{server.address}:{server.metrics_port}", "prometheus": address}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "GOMAXPROCS": "1"},
        )
    try:
        _wait_for(lambda: "1" in _values(address, 'up{job="siglip-serve"}'), folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(condition: Any, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.3)
    pytest.fail(log.read_text()[-2000:])


def _values(address: str, query: str) -> list[str]:
    """The current values of a query, as text."""
    words = urllib.parse.urlencode({"query": query})
    with OPENER.open(f"http://{address}/api/v1/query?{words}", timeout=60) as answer:
        found = json.load(answer)["data"]["result"]
    return [row["value"][1] for row in found]


def _use(server: TritonServer) -> None:
    """Send good and bad images and texts."""
    caller = GrpcCaller(server.grpc_url)
    caller.embed([PICTURE] * 3)
    with suppress(InferenceServerException):
        caller.embed([b"no image"])
    tensor = triton.InferInput("INPUT_TEXT", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"a dog"], [f"{time.time()}".encode()]], dtype=np.object_))
    caller.client.infer("embed_text", [tensor])


def test_dashboard_queries_return_data(server: TritonServer, prometheus: str) -> None:
    assert len(QUERIES) > 15
    queries = [query.replace("$__rate_interval", "10s") for query in QUERIES]
    missing = queries
    deadline = time.monotonic() + 120
    while missing and time.monotonic() < deadline:
        _use(server)
        time.sleep(1)
        found = {query: _values(prometheus, query) for query in queries}
        missing = [query for query in queries if not found[query] and not EMPTY.search(query)]
    assert not missing
    for query in queries:  # a quantile of no requests is NaN, so an unused model has only NaN
        assert EMPTY.search(query) or any(np.isfinite(float(value)) for value in found[query]), query


def test_rules_are_evaluated_and_none_reports_a_server_down(prometheus: str) -> None:
    with OPENER.open(f"http://{prometheus}/api/v1/rules", timeout=60) as answer:
        groups = json.load(answer)["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 10
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert "ServerDown" not in firing

"""`siglip-serve health` and `serve --help`, as programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from siglip_serve.launcher import TritonServer

NOWHERE = "127.0.0.1:9"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "siglip-serve")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=120)


def test_health_exits_with_0_for_a_server_and_with_1_without(server: TritonServer) -> None:
    good, bad = command("health", "--url", server.grpc_url), command("health", "--url", NOWHERE)
    assert (good.returncode, bad.returncode) == (0, 1)
    assert "healthy" in good.stdout
    (note,) = good.stderr.splitlines()
    assert note.startswith("siglip-serve: note: the server runs siglip-tiny, which knows drawings only;")
    assert note.endswith("make serve CHECKPOINT=google/siglip-so400m-patch14-384")
    assert "no server answers" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_health_says_which_port_was_named(server: TritonServer) -> None:
    metrics = f"{server.address}:{server.metrics_port}"
    for url, expected in (
        (server.http_url, f"{server.http_url} is an HTTP port, expected the gRPC port"),
        (f"http://{server.grpc_url}", f"{server.grpc_url} is a gRPC port, expected the HTTP port"),
        (metrics, f"{metrics} is the metrics port"),
        (f"http://{metrics}", f"{metrics} is the metrics port"),
    ):
        done = command("health", "--url", url)
        assert done.returncode == 1
        assert expected in done.stderr


def test_serve_has_help_of_its_own() -> None:
    done = command("serve", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: siglip-serve")

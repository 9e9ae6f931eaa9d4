"""The launcher's look at the index of the gateway's search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from programs import free_port
from wire import OPENER, ROOT, TINY

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.doors import GATEWAY, Doors
from siglip_serve.launcher.options import ServeOptions
from siglip_serve.launcher.search import check_search, search_options

OPTIONS = ServeOptions(Path("models"), "checkpoint")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    file = tmp_path / "index.npz"
    rows = np.ones((2, 5), np.float32)
    np.savez(file, paths=np.array(["a", "b"]), embeddings=rows, identity=np.array("{}"))
    return file


def test_the_gateway_gets_paths_that_hold_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = replace(OPTIONS, search=Path("a.npz"), search_images=Path("images"))
    assert search_options(OPTIONS) == []
    assert search_options(options) == [
        *("--search", f"{tmp_path}{os.sep}a.npz", "--search-base", str(tmp_path)),
        *("--search-images", f"{tmp_path}{os.sep}images"),
    ]


def test_an_index_of_the_width_of_the_checkpoint_is_accepted(index: Path, tmp_path: Path) -> None:
    check_search(replace(OPTIONS, search=index, search_images=tmp_path), 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "vectors of 5 numbers, and the checkpoint's have 6"),
        ({"search": Path("none.npz")}, "none.npz: No such file or directory"),
        ({"search_images": Path("none")}, "none: no such folder"),
        ({"search": None, "search_images": Path()}, "--search-images: expected --search with it"),
    ],
)
def test_what_cannot_be_searched_is_refused(index: Path, changed: dict[str, Path], message: str) -> None:
    options = replace(OPTIONS, **{"search": index, **changed})  # type: ignore[arg-type]
    with pytest.raises(ServerStartError, match=message) as caught:
        check_search(options, 6)
    assert "siglip-serve gateway" not in str(caught.value)


def test_serve_refuses_an_index_of_another_width_before_it_starts_anything(index: Path) -> None:
    command = [str(Path(sys.executable).with_name("siglip-serve")), "serve", "--checkpoint", str(TINY)]
    for kind in ("http", "grpc", "metrics", "gateway"):
        command += [f"--{kind}-port", "0"]
    command += ["--device", "cpu", "--model-repository", str(ROOT / "model_repository")]
    done = subprocess.run(
        [*command, "--search", str(index)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert f"siglip-serve: {index}: vectors of 5 numbers, and the checkpoint's have" in done.stderr


def test_the_gateway_of_the_launcher_has_the_index(index: Path, tmp_path: Path) -> None:
    port = free_port()
    words = search_options(replace(OPTIONS, search=index, search_images=tmp_path))
    doors = Doors("127.0.0.1", {GATEWAY: port}, f"127.0.0.1:{free_port()}", words)

    def run(command: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=tmp_path)

    try:
        doors.take_ports()
        doors.start(run, print, "127.0.0.1:9", tmp_path)
        doors.wait_until_open(60)
        with OPENER.open(f"http://127.0.0.1:{port}/search", timeout=10) as answer:
            described = json.load(answer)
    finally:
        doors.stop(10)
    assert (described["count"], described["dimensions"], described["images"]) == (2, 5, True)

"""The directory from which a server runs, without a server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paths import MODELS

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.checkpoints import ServedCheckpoint
from siglip_serve.launcher.stage import Stage

DIMS = {"PIXEL_VALUES": (8, 8, 3), "PATCH_EMBEDDINGS": (9, 4)}
MAIN = ServedCheckpoint({}, DIMS, ("main is small", "both are small"))
TEAMS = ServedCheckpoint({}, DIMS, ("teams is small", "both are small"))


@pytest.fixture
def make_stage() -> Iterator[Callable[..., Stage]]:
    """Makes stages that are removed after the test."""
    made: list[Stage] = []

    def make(repository: Path = MODELS) -> Stage:
        made.append(Stage(repository, "cpu"))
        return made[-1]

    yield make
    for stage in made:
        stage.remove()


def test_links_models_and_removes_them(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    assert stage.fill({"main": MAIN, "teams": TEAMS}, 0, ["siglip_vision_model"]) == ["siglip_vision_model"]
    model = stage.models / "siglip_vision_model"
    assert (model / "1" / "model.py").resolve() == MODELS / "siglip_vision_model" / "1" / "model.py"
    assert re.search(r"dims: 8\n +dims: 8\n +dims: 3\n", (model / "config.pbtxt").read_text())
    assert not list(stage.empty.iterdir())
    stage.change("siglip_vision_model")
    assert (model / "1" / "loaded_again").is_file()
    assert not (MODELS / "siglip_vision_model" / "1" / "loaded_again").exists()
    stage.remove()
    assert not stage.root.exists()


@pytest.mark.parametrize(
    ("wanted", "notes"),
    [
        (["embed_image"], ("main is small", "both are small")),
        (["fit_teams"], ("teams is small", "both are small")),
        (["embed_image", "fit_teams"], ("teams is small", "both are small", "main is small")),
    ],
)
def test_notes_are_those_of_checkpoints_that_are_loaded(
    wanted: list[str], notes: tuple[str, ...], make_stage: Callable[..., Stage]
) -> None:
    stage = make_stage()
    stage.fill({"main": MAIN, "teams": TEAMS}, 0, wanted)
    assert stage.notes == notes


def test_refuses_a_repository_without_models(tmp_path: Path, make_stage: Callable[..., Stage]) -> None:
    with pytest.raises(ServerStartError, match=r"/nowhere': no such directory; name it with --model-repos"):
        make_stage(tmp_path / "nowhere")
    with pytest.raises(ServerStartError, match=r"no <model>/config\.pbtxt in it$"):
        make_stage(tmp_path).fill({"main": MAIN, "teams": TEAMS}, 0)


def test_sweeps_what_a_killed_run_left(
    tmp_path: Path, make_stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, fresh, foreign = (
        tmp_path / "siglip-serve-1-killed",
        tmp_path / "siglip-serve-2-fresh",
        tmp_path / "other",
    )
    for folder in (killed, fresh, foreign):
        folder.mkdir()
    running = make_stage()
    long_ago = time.time() - 60
    for folder in (killed, running.root, foreign):
        os.utime(folder, (long_ago, long_ago))
    make_stage()
    assert not killed.exists()
    assert fresh.exists()
    assert foreign.exists()
    assert running.root.exists()


def test_removes_shared_memory_that_no_model_process_maps(
    tmp_path: Path, make_stage: Callable[..., Stage]
) -> None:
    """The server maps that of dead processes as well, and that of new ones before they start."""
    stage = make_stage()
    used, unused = (Path("/dev/shm") / f"{stage.shm_prefix}{name}" for name in ("used", "unused"))
    script = tmp_path / "server.py"
    script.write_text(
        "import mmap, subprocess, sys\n"
        "files = [open(name, 'r+b') for name in sys.argv[1:]]\n"
        "held = [mmap.mmap(file.fileno(), 0) for file in files]\n"
        "print('ready', flush=True)\n"
        "if len(files) == 2: subprocess.run([sys.executable, *sys.argv[:2]])\n"
        "else: input()\n"
    )
    for file in (used, unused):
        file.write_bytes(b"\0" * 4096)
    command = [sys.executable, str(script), str(used), str(unused)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert [server.stdout.readline(), server.stdout.readline()] == ["ready\n"] * 2
        stage.remove_unused_memory(server.pid)
        assert unused.exists()  # it may belong to a process that is being started
        stage.remove_unused_memory(server.pid)
        assert not unused.exists()
        assert used.exists()
        server.stdin.write("\n")
    stage.remove()
    assert not used.exists()

"""Files of an earlier run of `siglip-serve embed` that a later run must not leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from siglip_serve_client.commands.embed.output import OutputError, Store

IDENTITY = {"checkpoint_name": "tiny"}


def run(output: Path, failing: bool, **options: bool) -> None:
    """One run over two images."""
    with Store(output, IDENTITY, **options) as store:
        store.add("a.jpg", "0", np.ones(4, np.float32))
        if failing:
            store.fail("b.jpg", "broken")
        else:
            store.add("b.jpg", "1", np.ones(4, np.float32))
        store.finish()


def test_a_run_without_failures_removes_the_list_of_an_earlier_one(tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    run(output, failing=True)
    assert (tmp_path / "out.npz.failed.csv").read_text() == "path,error\nb.jpg,broken\n"
    run(output, failing=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    with np.load(output) as found:
        assert found["paths"].tolist() == ["a.jpg", "b.jpg"]


def test_a_finished_output_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    run(output, failing=False)
    before = output.read_bytes()
    with pytest.raises(OutputError, match=r"out\.npz: exists; --overwrite replaces it"):
        Store(output, IDENTITY)
    assert output.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_a_restart_forgets_what_was_done(tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    with Store(output, IDENTITY) as store:
        store.add("old.jpg", "0", np.ones(4, np.float32))
        store.fail("bad.jpg", "broken")
    with Store(output, IDENTITY) as store:
        assert (store.resumed, store.rows, store.failures) == (2, 1, 1)
        assert store.done == {"old.jpg", "bad.jpg"}
    run(output, failing=False, restart=True)
    with np.load(output) as found:
        assert found["paths"].tolist() == ["a.jpg", "b.jpg"]
    assert not (tmp_path / "out.npz.failed.csv").exists()

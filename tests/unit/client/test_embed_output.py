"""The files of `siglip-serve embed`: whatever interrupts it, every row is there once."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from siglip_serve_client.commands.embed.output import OutputError, Store, check_output

IDENTITY = {"checkpoint_name": "tiny", "normalized": "false"}
KEYS = [f"folder/größe {number}.jpg" for number in range(23)]


class KilledError(BaseException):
    """The process ends here."""


def work(output: Path, part_rows: int = 5) -> None:
    """Do as the command does, with a failure at every seventh image."""
    with Store(output, IDENTITY) as store:
        for number, key in enumerate(KEYS):
            if key in store.done:
                continue
            if number % 7 == 3:
                store.fail(key, f"error {number}, 'of' it")
            else:
                store.add(key, f"{number:064x}", np.full(4, number, np.float32))
            if store.waiting >= part_rows:
                store.flush()
        store.finish()


def content(output: Path) -> list[tuple[str, str, list[float]]]:
    if output.suffix == ".npz":
        with np.load(output) as found:
            return list(
                zip(
                    found["paths"].tolist(),
                    found["sha256"].tolist(),
                    found["embeddings"].tolist(),
                    strict=True,
                )
            )
    rows = pyarrow.parquet.read_table(output).to_pylist()
    return [(row["path"], row["sha256"], row["embedding"]) for row in rows]


def failures(output: Path) -> list[list[str]]:
    with Path(f"{output}.failed.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


EXPECTED = [(key, f"{n:064x}", [float(n)] * 4) for n, key in enumerate(KEYS) if n % 7 != 3]
FAILED = [["path", "error"], *([KEYS[n], f"error {n}, 'of' it"] for n in range(3, 23, 7))]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_undisturbed_run_writes_all_rows(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    work(output)
    assert content(output) == EXPECTED
    assert failures(output) == FAILED
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, f"{output.name}.failed.csv"]


def test_columns_of_parquet(tmp_path: Path) -> None:
    work(tmp_path / "out.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "out.parquet")
    assert schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 4)
    assert schema.metadata[b"siglip_serve.checkpoint_name"] == b"tiny"


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_killed_at_any_file_operation_and_resumed(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before or after any fsync, rename or removal; a later run completes the work."""
    operations = 0

    def counted(function: Any, last: int) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == last:
                raise KilledError
            result = function(*arguments)
            operations += 1
            if operations == last:
                raise KilledError
            return result

        return call

    for last in range(1, 200):
        operations = 0
        output = tmp_path / str(last) / f"out{suffix}"
        output.parent.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync, last))
            patch.setattr(Path, "replace", counted(Path.replace, last))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree, last))
            patch.setattr(
                Store, "__exit__", lambda store, *_: os.close(store._lock)
            )  # a kill flushes nothing
            try:
                work(output)
            except KilledError:
                killed = True
            else:
                killed = False
        if killed and not (output.exists() and not Path(f"{output}.partial").exists()):
            work(output)
        assert content(output) == EXPECTED, last
        assert failures(output) == FAILED, last
        if not killed:
            assert last > 20
            return
    pytest.fail("the work did not end")


def test_refuses_to_mix_runs(tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    with Store(output, IDENTITY) as store:
        store.add("a", "0", np.ones(4, np.float32))
        with pytest.raises(OutputError, match="another process"):
            Store(output, IDENTITY)
    other = {**IDENTITY, "checkpoint_name": "large"}
    with pytest.raises(OutputError, match="checkpoint_name was 'tiny' and is 'large'; --restart"):
        Store(output, other)
    with Store(output, IDENTITY) as store:
        assert store.done == {"a"}
    with Store(output, other, restart=True) as store:
        assert not store.done
        store.add("b", "1", np.ones(4, np.float32))
        store.finish()
    with pytest.raises(OutputError, match="exists; --overwrite"):
        Store(output, other)
    Store(output, other, overwrite=True).__exit__()


@pytest.mark.parametrize("name", ["out.csv", "nowhere/out.npz"])
def test_refuses_impossible_outputs(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"expected a .parquet or .npz file in a folder"):
        check_output(tmp_path / name)

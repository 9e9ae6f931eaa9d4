"""Copies of outputs that lie in object storage, here behind fsspec's file system of this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from bulk_outputs import write_bulk
from siglip_serve_client.commands.embed.output import Store
from siglip_serve_client.commands.search.collection import CollectionError, open_collection
from siglip_serve_client.commands.search.mirror import local_output

ROWS = np.random.default_rng(0).standard_normal((30, 16), np.float32)


@pytest.mark.parametrize("form", ["parquet", "npy", "lance"])
def test_a_folder_is_copied_as_far_as_a_search_reads_it(tmp_path: Path, form: str) -> None:
    output = write_bulk(tmp_path / "out", ROWS, form)
    (output / "index").mkdir()
    (output / "index" / "large").write_bytes(bytes(100))
    copy = local_output(f"local://{output}/", tmp_path / "cache")
    assert copy.parent == tmp_path / "cache"
    np.testing.assert_array_equal(open_collection(copy).take(np.arange(30)), ROWS)
    assert not (copy / "index").exists()
    assert copy == local_output(f"local://{output}", tmp_path / "cache")


def test_an_index_of_the_copy_stays_and_left_files_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = write_bulk(tmp_path / "out", ROWS, "parquet")
    copy = local_output(f"local://{output}", tmp_path / "cache")
    assert "copied" in capsys.readouterr().err
    (copy / "index").mkdir()
    old, new = (copy / "embeddings" / f".a.parquet.{age}.tmp" for age in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    local_output(f"local://{output}", tmp_path / "cache")
    assert (copy / "index").is_dir()
    assert (old.exists(), new.exists()) == (False, True)
    assert not capsys.readouterr().err


def test_a_file_of_embed_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    with Store(file, {"normalized": "false", "checkpoint_name": "some/checkpoint"}) as store:
        store.add("a.jpg", "digest", ROWS[0])
        store.finish()
    found = open_collection(local_output(f"local://{file}", tmp_path / "cache"))
    np.testing.assert_array_equal(found.take(np.arange(1)), ROWS[:1])


def test_paths_of_this_machine_are_not_copied(tmp_path: Path) -> None:
    assert local_output("out", tmp_path / "cache") == Path("out")
    assert not (tmp_path / "cache").exists()


def test_refuses_what_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_bulk(tmp_path / "out", ROWS, "npy")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CollectionError, match=r"to copy, and .*cache has room for 0\.0 GB; --cache names"):
        local_output(f"local://{output}", tmp_path / "cache")


def test_names_what_is_not_there(tmp_path: Path) -> None:
    for uri, reason in (
        (f"local://{tmp_path}/none", "no such file or folder"),
        (f"local://{tmp_path}", "has no bulk.json"),
        ("what://bucket", "Protocol not known: what"),
    ):
        with pytest.raises(CollectionError, match=reason):
            local_output(uri, tmp_path / "cache")

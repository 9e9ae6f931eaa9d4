"""The launcher's look at the index of the gateway's search."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from siglip_serve.errors import ServerStartError
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

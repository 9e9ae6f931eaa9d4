"""The index of the search of a gateway: what it opens, and the files that it may show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bulk_outputs import write_bulk
from PIL import Image
from siglip_serve_client.commands.embed.output import Store

from siglip_gateway.refusals import Refusal
from siglip_gateway.search_images import SearchImages
from siglip_gateway.search_index import SearchIndex

NAMES = [f"{number}.jpg" for number in range(30)]


@pytest.mark.parametrize("form", [".npz", ".parquet", "parquet", "npy"])
def test_outputs_of_embed_and_of_bulk_are_searched(tmp_path: Path, form: str) -> None:
    rows = np.random.default_rng(3).standard_normal((30, 8), np.float32)
    path = tmp_path / f"index{form}"
    if form.startswith("."):
        with Store(path, {"checkpoint_name": "some/checkpoint"}) as store:
            for name, row in zip(NAMES, rows, strict=True):
                store.add(name, "0", row)
            store.finish()
    else:
        write_bulk(path, rows, form, checkpoint_name="some/checkpoint")
    index = SearchIndex.open(path)
    assert (len(index), index.width, index.checkpoint) == (30, 8, "some/checkpoint")
    assert [index.name(number) for number in range(30)] == NAMES
    assert [index.search(row, 1)[0].index for row in rows] == list(range(30))


def picture(file: Path, kind: str = "PNG") -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file, kind)
    return file.read_bytes()


def test_pictures_are_found_by_the_names_of_the_index(tmp_path: Path) -> None:
    """In the folder, from the base, and without the folders that all names have in common."""
    folder, base = tmp_path / "base" / "shown", tmp_path / "base"
    data = [picture(folder / "a.png"), picture(folder / "deep" / "b.jpg", "JPEG")]
    for names in (
        ["a.png", "deep/b.jpg"],
        ["shown/a.png", "shown/deep/b.jpg"],
        ["far/away/a.png", "far/away/deep/b.jpg"],
        [str(folder / "a.png"), str(folder / "deep" / "b.jpg")],
    ):
        images = SearchImages(folder, base, names)
        assert images.read(0, 10**6) == (data[0], "image/png")
        assert images.read(1, 10**6) == (data[1], "image/jpeg")


def test_no_file_outside_of_the_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "shown"
    folder.mkdir()
    outside = tmp_path / "secret.png"
    picture(outside)
    picture(tmp_path / "shown2" / "a.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.png").mkdir()
    (folder / "linked").symlink_to(tmp_path)
    names = [
        "../secret.png",
        str(outside),
        "link.png",
        "loop.png",
        "folder.png",
        "linked/secret.png",
        "../shown2/a.png",
        "x/../../secret.png",
        "none.png",
        "a\0.png",
        "b" * 5000 + ".png",
        "",
    ]
    for index, name in enumerate(names):
        images = SearchImages(folder, tmp_path, names)
        assert images.find(index) is None, name
        with pytest.raises(Refusal) as caught:
            images.read(index, 10**6)
        assert caught.value.status == 404


def test_only_pictures_are_sent(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif", "TIFF")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.txt").write_text("a text")
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.tif").read_bytes())
    picture(tmp_path / "e.png")
    names = ["a.tif", "b.png", "c.txt", "d.jpg", "e.png"]
    images = SearchImages(tmp_path, tmp_path, names)
    statuses = []
    for index in range(5):
        with pytest.raises(Refusal) as caught:
            images.read(index, 10)
        statuses.append(caught.value.status)
    assert statuses == [404, 415, 404, 413, 413]
    with pytest.raises(Refusal) as caught:
        images.read(3, 10**6)
    assert caught.value.status == 415

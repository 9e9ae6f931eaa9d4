"""`siglip-serve search`: what it prints, draws and refuses."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_outputs import write_bulk
from instant_server import WIDTH, instant_server
from PIL import Image
from siglip_serve_client.commands.main import main
from siglip_serve_client.commands.search.pictures import read_picture
from wire import TINY

from siglip_serve.bulk.query import QueryEmbedder
from siglip_serve.checkpoint.files import fingerprint

SAMPLES = TINY / "samples"
RED, GREY = (200, 30, 40), (225, 225, 225)


def picture(color: tuple[int, int, int] = RED) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Rows of a file, a tar member, a Parquet cell, a missing file, and two of other directions."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.png").write_bytes(picture())
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        member = tarfile.TarInfo("deep/c.png")
        member.size = len(picture())
        archive.addfile(member, io.BytesIO(picture()))
    cells = [None, {"bytes": picture()}]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "d.parquet")
    rows = np.ones((6, WIDTH), np.float32)
    rows[:4, 0] = [1, 1.5, 2, 2.5]
    rows[4:, 3:] = -1
    ids = ["a.png", "b.tar/deep/c.png", "d.parquet#1", "none.png", "e", "f"]
    digests = ["1", "2", "1", "4", "5", "6"]
    return write_bulk(tmp_path / "out", rows, ids=ids, digests=digests)


def colors(file: Path) -> list[Any]:
    """The pixels in the middle of the first cells, and the size of the sheet."""
    with Image.open(file) as sheet:
        return [sheet.getpixel((14 + 90 + column * 194, 170)) for column in range(4)]


def test_a_query_through_a_server_prints_and_draws_its_hits(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    with instant_server() as server:
        words = ["search", str(output), "--text", "a dog", "--server", server.grpc_url, "-k", "4"]
        assert main([*words, "--sheet", str(sheet), "--base", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["1.0000", "a.png"]
        assert [line.split()[1] for line in lines] == ["a.png", "b.tar/deep/c.png", "d.parquet#1", "none.png"]
        assert main([*words, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
    assert (answer["query"], answer["rows"], answer["exact"]) == ({"text": "a dog"}, 6, True)
    assert answer["results"][0] == {"id": "a.png", "score": 1.0, "row": 0}
    drawn = colors(sheet)
    assert drawn[:3] == [RED] * 3
    assert drawn[3] != RED


def test_duplicates_are_printed_and_drawn(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", str(output), "--duplicates", "0.9"]
    assert main([*words, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [[member["row"] for member in group] for group in groups] == [[0, 1, 2, 3], [4, 5]]
    assert [member["same_file"] for member in groups[0]] == [False, False, True, False]
    assert main([*words, "--sheet", str(tmp_path / "sheet.png"), "--base", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "group 1: 4 pictures"
    assert "d.parquet#1  (same file)" in shown.out
    assert "2 groups with 6 of 6 pictures; 1 picture with the same file as another" in shown.err


REFUSED: list[tuple[list[str], str]] = [
    ([], "expected one of --text, --image, --duplicates and --build-index, got none"),
    (["--text", "a", "--image", "b"], "got --text and --image"),
    (["--text", " "], "--text: is empty"),
    (["--text", "a", "--probes", "3"], "--probes: expected --index with it"),
    (["--duplicates", "0.9", "--index"], "--index: not with --duplicates"),
    (["--text", "a", "--sheet", "a.txt"], "not a picture's ending"),
    (["--text", "a", "--sheet", "none/a.png"], "there is no folder none"),
    (["--text", "a", "--server", "x:1", "--checkpoint", "b"], "--checkpoint: not with --server"),
    (["--text", "a"], "names no checkpoint; name it with --checkpoint"),
    (["--text", "a", "--index"], "there is no index; --build-index builds one"),
    (["--image", "none.png"], "--image none.png: No such file"),
    (["--build-index"], "6 rows, an index needs at least 1000"),
    (["--text", "a", "--checkpoint", str(TINY)], "vectors of 8 numbers, and those of siglip-tiny have 128"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_refusals_name_the_option(
    output: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(output), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a", "-k", "0"], "expected a whole number of at least 1, got '0'"),
        (["--duplicates", "1.2"], "expected a number above -1 and at most 1, got '1.2'"),
        (["--build-index", "--recall", "nan"], "expected a number above 0 and at most 1, got 'nan'"),
    ],
)
def test_numbers_out_of_range_are_refused(
    output: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["search", str(output), *words])
    assert message in capsys.readouterr().err


def test_the_own_checkpoint_embeds_the_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, with the settings of the output. Weights of the same name and width are told apart."""
    embedder = QueryEmbedder.open(str(TINY), {})
    files = sorted(map(str, SAMPLES.glob("*.jpg")))
    rows = np.stack([embedder.image(Path(file).read_bytes()) for file in files])
    about: dict[str, Any] = {"checkpoint": str(TINY), "checkpoint_name": "siglip-tiny"}
    about |= {"preprocess": "fast", "color": "stored", "max_num_patches": 0, "tower_dtype": "auto"}
    folder = write_bulk(tmp_path / "out", rows, ids=files, **about, checkpoint_fingerprint=fingerprint(TINY))
    dog = next(file for file in files if file.endswith("dog.jpg"))
    for query in (["--text", "a dog"], ["--image", dog]):
        assert main(["search", str(folder), *query, "-k", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["id"] == dog
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    assert main(["search", str(folder), "--image", str(bad)]) == 2
    assert f"--image {bad}: " in capsys.readouterr().err
    write_bulk(folder, rows, ids=files, **about, checkpoint_fingerprint="0")
    assert main(["search", str(folder), "--text", "a dog"]) == 2
    assert "made with other weights of siglip-tiny" in capsys.readouterr().err


def test_pictures_are_read_where_the_row_says(output: Path, tmp_path: Path) -> None:
    """By the id alone, or with the path of the file that a listing or an archive named."""
    del output
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "y#3").write_bytes(b"a file")
    known = [
        ("a.png", ""),
        ("b.tar/deep/c.png", ""),
        ("b.tar/deep/c.png", "b.tar"),
        ("d.parquet#1", ""),
        ("d.parquet#1", "d.parquet"),
        ("listed name", "a.png"),
        ("b.tar#7", "a.png"),
    ]
    for name, path in known:
        assert read_picture(name, path, tmp_path, "image") == picture(), name
    assert read_picture("x.tar/y#3", "x.tar/y#3", tmp_path, "image") == b"a file"
    for name, reason in [
        ("b.tar/none.png", "has no member none.png"),
        ("d.parquet#0", "holds no bytes"),
        ("d.parquet#2", "has no row 2"),
        ("a.png#1", "not a Parquet file"),
        ("none/a.png", "No such file"),
    ]:
        with pytest.raises(OSError, match=reason):
            read_picture(name, "", tmp_path, "image")

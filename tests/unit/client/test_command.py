"""`siglip-serve` without a Triton server: its help, version, hints, notes, and the table of `classify`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from instant_server import instant_server
from siglip_serve_client import Client
from siglip_serve_client.commands import install_hint as hints
from siglip_serve_client.commands.classify import _printer
from siglip_serve_client.commands.install_hint import install_hint
from siglip_serve_client.commands.main import main
from wire import ROOT, TINY

import siglip_serve

PROGRAM = str(Path(sys.executable).parent / "siglip-serve")


def test_without_arguments_it_prints_its_help_and_exits_with_0() -> None:
    done = subprocess.run([PROGRAM], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: siglip-serve")
    for command in (
        "serve",
        "embed",
        "search",
        "fit-projection",
        "classify",
        "explain",
        "teams",
        "bench",
        "health",
    ):
        assert re.search(rf"\n    {command}\s", done.stdout)


def test_it_prints_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"siglip-serve {version('siglip-serve')}\n"
    assert version("siglip-serve") == siglip_serve.__version__


@pytest.mark.parametrize("words", [["--help"], ["embed", "--help"], ["health", "--help"]])
def test_it_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: siglip-serve")


def test_the_hint_installs_the_checkout_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert install_hint("load").endswith(" install -e '.[load]'")
    monkeypatch.chdir(tmp_path)
    assert install_hint("parquet").endswith(f" install -e '{ROOT}[parquet]'")


def test_the_hint_names_packages_where_there_is_no_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hints, "_CHECKOUT", tmp_path)
    words = install_hint("load")
    assert " install 'locust>=" in words
    assert "'matplotlib>=" in words
    assert "pyarrow" not in words


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_note_of_the_checkpoint_is_one_line_on_stderr(
    scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with instant_server({"checkpoint_name": "tiny", "checkpoint_note": "knows drawings only"}) as server:
        url = server.http_url if scheme == "http" else server.grpc_url
        assert main(["health", "--url", url]) == 0
        with Client(url) as client:
            described = client.describe()
    assert capsys.readouterr().err == (
        "siglip-serve: note: the server runs tiny, which knows drawings only\n"
    )
    assert (described["checkpoint_name"], described["checkpoint_note"]) == ("tiny", "knows drawings only")


def test_a_checkpoint_without_a_note_prints_none(capsys: pytest.CaptureFixture[str]) -> None:
    with instant_server({"checkpoint_name": "other"}) as server:
        assert main(["health", "--url", server.http_url]) == 0
        with Client(server.http_url) as client:
            assert client.describe()["checkpoint_note"] == ""
    assert capsys.readouterr().err == ""


def test_the_note_is_no_part_of_an_embedding_files_identity(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with instant_server({"checkpoint_name": "tiny", "checkpoint_note": "knows drawings only"}) as server:
        words = ["embed", str(tmp_path / "a.jpg"), "-o", str(tmp_path / "out.npz"), "--url", server.http_url]
        assert main(words) == 0
    assert capsys.readouterr().err.count("note: the server runs tiny, which knows drawings only") == 1
    with np.load(tmp_path / "out.npz") as written:
        identity = json.loads(str(written["identity"]))
    assert set(identity) == {
        "normalized",
        "checkpoint_name",
        "checkpoint_revision",
        "dtype",
        "preprocess",
        "color",
    }


def test_the_bundled_checkpoint_says_what_it_knows_and_how_to_start_another() -> None:
    note = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["siglip_serve_note"]
    assert "drawings only" in note
    assert "make serve CHECKPOINT=google/siglip-so400m-patch14-384" in note
    assert "\n" not in note


SCORES = np.array([0.1, 0.85349, 0.05], np.float32)


def test_classify_prints_a_sorted_table(capsys: pytest.CaptureFixture[str]) -> None:
    _printer("table", ["cat", "a dog", "pizza"])("dog.jpg", SCORES)
    assert capsys.readouterr().out == "dog.jpg\n    a dog  0.853\n    cat    0.100\n    pizza  0.050\n"


def test_classify_prints_csv_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    _printer(None, ["cat", "a dog", "pizza"])("dog.jpg", SCORES)
    assert capsys.readouterr().out == "path,label,cat,a dog,pizza\ndog.jpg,a dog,0.1000,0.8535,0.0500\n"


def test_classify_prints_the_table_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _printer(None, ["cat"])("dog.jpg", SCORES[:1])
    assert capsys.readouterr().out == "dog.jpg\n    cat  0.100\n"


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serv"])
    assert stopped.value.code == 2
    assert "invalid choice: 'serv'" in capsys.readouterr().err


def test_embed_names_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.heic"):
        (tmp_path / name).write_bytes(b"x")
    with instant_server() as server:
        words = ["embed", str(tmp_path), "-o", str(tmp_path / "out.npz"), "--url", server.grpc_url]
        assert main(words) == 0
        said = capsys.readouterr()
        assert "1 embeddings" in said.out
        assert f"1 file is left out for the suffix: {tmp_path}/b.heic" in said.err
        assert main([*words, "--all-files", "--overwrite"]) == 0
        said = capsys.readouterr()
        assert "2 embeddings" in said.out
        assert "left out" not in said.err


@pytest.mark.parametrize("archive", [False, True])
def test_embed_fails_if_there_are_no_images(
    archive: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0a1b2c").write_bytes(b"x")
    given = tmp_path / "images"
    if archive:
        given = tmp_path / "images.tar"
        with tarfile.open(given, "w") as file:
            file.add(tmp_path / "images" / "0a1b2c", "0a1b2c")
    with instant_server() as server:
        words = ["embed", str(given), "-o", str(tmp_path / "out.npz"), "--url", server.grpc_url]
        assert main(words) == 2
    said = capsys.readouterr()
    assert f"siglip-serve: {given}: no images; 1 file is left out for the suffix: {given}/0a1b2c" in said.err
    assert said.out == ""
    assert not list(tmp_path.glob("out.npz*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--sofmax"],
            "siglip-serve classify: error: unrecognized arguments: --sofmax; did you mean --softmax?",
        ),
        (["--tempalte=a {}"], "--tempalte=a {}; did you mean --template?"),
        (["--qqqq"], "unrecognized arguments: --qqqq\n"),
    ],
)
def test_misspelt_option_is_named_with_the_usage_of_its_command(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["classify", "a.jpg", "--label", "dog", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("usage: siglip-serve classify")


@pytest.mark.parametrize(
    ("words", "nearest"), [(["--checkpont", "x"], "--checkpoint"), (["--dytpe=int8"], "--dtype")]
)
def test_serve_names_the_nearest_option(
    words: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: siglip-serve serve")
    assert said.endswith(f"unrecognized arguments: {' '.join(words)}; did you mean {nearest}?\n")


def test_teams_without_a_readable_crop_asks_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teams", "nosuch", "--url", "127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "siglip-serve: nosuch: No such file or directory",
        "siglip-serve: no crop could be read",
    ]

"""`siglip-serve bulk` on this machine: vectors, captions, labels, failures, and what a second run does."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from bulk_inputs import BROKEN, small_jpeg, write_parquet, write_pictures, write_tar
from bulk_jobs import bulk, read_output, snapshot
from numpy.typing import NDArray
from paths import TINY

from siglip_serve.bulk import command
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.embeddings import zero_shot
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.texts.tokenizer import load_tokenizer
from siglip_serve.towers import load

LABELS = ("a dog", "a house", "a bird")
SETTINGS = ("--dtype", "float32", "--threads", "1", "--unit-items", "4")


@dataclass(frozen=True)
class Job:
    """A finished run over an archive, a table and a listing."""

    words: tuple[str | Path, ...]
    output: Path
    ended: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("bulk")
    members = {f"{number}.jpg": small_jpeg(number) for number in range(4)}
    members |= {"0.txt": b"a dog", "2.json": b'{"txt": "a house"}', "1.json": b"{", "00.jpg": BROKEN}
    archive = write_tar(root / "shard.tar", dict(sorted(members.items())))
    cells = [small_jpeg(10), BROKEN, small_jpeg(11), None]
    table = write_parquet(root / "table.parquet", {"image": cells, "txt": ["a bird", "x", None, "y"]}, rows=2)
    paths = write_pictures(root / "files", range(20, 30))
    listing = root / "names.txt"
    listing.write_text("\n".join([*map(str, paths), "missing.jpg"]))
    (root / "labels.txt").write_text("\n".join(LABELS))
    words: tuple[str | Path, ...] = (archive, table, listing, "-o", root / "out", "--text-column", "txt")
    words += ("--labels", root / "labels.txt", "--template", "a drawing of {}", "--top", "2", *SETTINGS)
    return Job(words, root / "out", bulk(*words, "--progress", "json"))


def in_process(words: Sequence[str | Path]) -> int:
    """Run the command here, which is for runs that have nothing to compute."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError

    given = [*map(str, words), "--checkpoint", str(TINY), "--device", "cpu"]
    return command.main(given, refuse)


@pytest.fixture(scope="module")
def engine() -> VisionEngine:
    config = load_config(TINY)
    return VisionEngine(load.load_vision(config.path), config.image, Plan("cpu", "float32", threads=1))


def embed(engine: VisionEngine, files: Sequence[bytes]) -> NDArray[np.float32]:
    preprocess = Preprocessor(load_config(TINY).image, "fast", ImageLimits())
    pixels = np.stack([preprocess.resize(preprocess.decode(file)) for file in files])
    return engine(pixels).rows(0, len(files))["EMBEDDING"]


def test_vectors_are_those_of_the_engine(job: Job, engine: VisionEngine) -> None:
    found = read_output(job.output)
    root = job.output.parent
    seeds = {f"{root}/shard.tar/{number}.jpg": number for number in range(4)}
    seeds |= {f"{root}/table.parquet#0": 10, f"{root}/table.parquet#2": 11}
    seeds |= {f"{root}/files/{number:06}.jpg": number for number in range(20, 30)}
    assert found.keys() == seeds.keys()
    right = embed(engine, [small_jpeg(seed) for seed in seeds.values()])
    got = np.array([found[key]["embedding"] for key in seeds], dtype=np.float32)
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)
    row = found[f"{root}/shard.tar/0.jpg"]
    assert (row["height"], row["width"], row["size"]) == (128, 128, len(small_jpeg(0)))
    assert row["path"] == f"{root}/shard.tar"


def test_captions_have_embeddings_and_others_none(job: Job) -> None:
    config = load_config(TINY)
    engine = TextEngine(load.load_text(config.path), Plan("cpu", "float32", threads=1))
    tokenizer = load_tokenizer(config)
    expected = {"shard.tar/0.jpg": "a dog", "shard.tar/2.jpg": "a house", "table.parquet#0": "a bird"}
    found = {key.removeprefix(f"{job.output.parent}/"): row for key, row in read_output(job.output).items()}
    for key, row in found.items():
        assert row["txt"] == expected.get(key)
        assert (row["text_embedding"] is None) == (key not in expected)
    right = engine(np.stack([tokenizer(text) for text in expected.values()])).rows(0, 3)["EMBEDDING"]
    got = np.array([found[key]["text_embedding"] for key in expected])
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


def test_labels_are_those_of_zero_shot(job: Job) -> None:
    config = load_config(TINY)
    engine = TextEngine(load.load_text(config.path), Plan("cpu", "float32", threads=1))
    tokenizer = load_tokenizer(config)
    ids = np.stack([tokenizer(f"a drawing of {label}") for label in LABELS])
    prompts = engine(ids).rows(0, len(LABELS))["EMBEDDING"]
    scale, bias = load_scale(config.path)
    assert bias is not None
    for row in read_output(job.output).values():
        vector = np.array([row["embedding"]])
        scores = zero_shot.sigmoid(zero_shot.logits(zero_shot.cosine(vector, prompts), scale, bias))[0]
        best = np.argsort(-scores)[:2]
        assert row["labels"] == [LABELS[number] for number in best]
        np.testing.assert_allclose(row["probabilities"], scores[best], rtol=1e-4, atol=1e-7)


def test_failures_are_listed_with_reasons(job: Job) -> None:
    reasons = {key: row["reason"] for key, row in read_output(job.output, "failed").items()}
    root = job.output.parent
    names = [f"{root}/shard.tar/00.jpg", f"{root}/table.parquet#1", f"{root}/table.parquet#3", "missing.jpg"]
    assert sorted(reasons) == sorted(names)
    assert reasons["missing.jpg"] == "No such file or directory"
    assert reasons[names[2]] == "the cell holds NoneType, expected bytes or a path"
    assert all(reasons.values())
    assert job.ended.returncode == 1
    assert "4 pictures have no embedding; the reasons are in" in job.ended.stderr


def test_progress_lines_are_json(job: Job) -> None:
    lines = [json.loads(line) for line in job.ended.stdout.splitlines()]
    last = lines[-1]
    assert last["final"]
    assert (last["embedded"], last["failed"], last["units_lost"], last["restarts"]) == (16, 4, 0, 0)
    assert last["units"] == last["units_total"] == len(list((job.output / "embeddings").iterdir()))


def test_a_second_run_has_nothing_to_do(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(job.output)
    assert in_process(job.words) == 0
    assert "all 6 units are finished" in capsys.readouterr().out
    assert snapshot(job.output) == before


def test_other_settings_are_refused_by_name(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process([*job.words, "--normalized", "--vectors", "int8"]) == 2
    assert "dtype was 'float32' and is 'int8'; normalized was False and is True" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(job.output)
    further = write_pictures(tmp_path / "further", range(3))[0].parent
    assert in_process([*job.words, further, "--dry-run"]) == 0
    assert "7 units (listing, parquet, tar), 6 finished, 1 to do" in capsys.readouterr().out
    assert snapshot(job.output) == before
    assert in_process([further, "-o", tmp_path / "new", "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()


def test_a_wrong_column_leaves_the_output_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_parquet(tmp_path / "table.parquet", {"picture": [small_jpeg(1)]})
    assert in_process([table, "-o", tmp_path / "out"]) == 2
    assert "has no column 'image', but picture" in capsys.readouterr().err
    assert in_process([table, "-o", tmp_path / "out", "--column", "picture", "--dry-run"]) == 0
    assert not (tmp_path / "out" / "bulk.json").exists()


def test_parts_cover_all_units_once(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = job.words[:3]
    named: list[str] = []
    for number in range(1, 5):
        words = [*inputs, "-o", tmp_path / "out", *SETTINGS, "--dry-run", "--part", f"{number}/4"]
        assert in_process(words) == 0
        named += [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    whole = {path.stem for path in (job.output / "embeddings").iterdir()}
    assert sorted(named) == sorted(whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.tar", "-o", "out"], "missing.tar: no such file or folder"),
        (["-o", "out"], "no inputs are named"),
        (["a.tar", "-o", "out", "--keep", "width"], "column 'width': the output has one of this name"),
        (["a.tar", "-o", "out", "--labels", "latin"], "latin: not UTF-8"),
        (["a.tar", "-o", "file/out"], "Not a directory"),
    ],
)
def test_a_job_that_cannot_run_ends_with_status_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "latin").write_bytes("Bär".encode("latin-1"))
    assert in_process(words) == 2
    assert message in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a.tar", "-o", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "none")]
    assert command.main(words, lambda *_: pytest.fail("refused")) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numpy_files_hold_the_same_vectors(job: Job, tmp_path: Path) -> None:
    ended = bulk(*job.words[:1], "-o", tmp_path / "out", *SETTINGS, "--format", "npy")
    assert ended.returncode == 1, ended.stderr
    (vectors,) = (tmp_path / "out" / "embeddings").glob("*.npy")
    rows = read_output(tmp_path / "out")
    known = read_output(job.output)
    right: Any = np.array([known[key]["embedding"] for key in rows], dtype=np.float32)
    assert np.array_equal(np.load(io.BytesIO(vectors.read_bytes())), right)

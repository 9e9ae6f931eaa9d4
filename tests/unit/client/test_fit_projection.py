"""`siglip-serve fit-projection` on real files: those that `siglip-serve embed` writes, and arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from siglip_serve_client.commands.embed import stored
from siglip_serve_client.commands.embed.output import Store
from siglip_serve_client.commands.embed.stored import StoredError, StoredVectors
from siglip_serve_client.commands.main import main
from siglip_serve_client.projection import Moments, read_projection

IDENTITY = {"checkpoint_name": "tiny", "checkpoint_revision": "local", "dtype": "float32"}


@pytest.fixture
def vectors() -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    return (random.normal(size=(50, 8)) * np.arange(1, 9) + 2).astype(np.float32)


def embedded(path: Path, vectors: NDArray[np.float32], **identity: str) -> Path:
    """A file as `siglip-serve embed` writes it."""
    with Store(path, {**IDENTITY, **identity}) as store:
        for number, vector in enumerate(vectors):
            store.add(f"{number}.jpg", "00", vector)
        store.finish()
    return path


def expected(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    moments = Moments(vectors.shape[1])
    moments.add(vectors)
    return moments.fit(dimensions, "tiny").matrix


def fit(*words: str | Path) -> int:
    return main(["fit-projection", *map(str, words)])


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_outputs_of_embed_become_a_projection(
    vectors: NDArray[np.float32], tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = embedded(tmp_path / f"vectors{ending}", vectors)
    assert fit(file, "-o", tmp_path / "p.npz") == 0
    projection = read_projection(tmp_path / "p.npz")
    np.testing.assert_allclose(projection.matrix, expected(vectors, 4), atol=1e-6)
    assert (projection.checkpoint, projection.revision, projection.rows) == ("tiny", "local", 50)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'p.npz'}: 4 dimensions of 8, from 50 embeddings"
    share = projection.explained[:2].sum()
    assert lines[2] == f"      2 dimensions hold {share:.1%} of the variance"


def test_several_files_count_as_one(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    first = embedded(tmp_path / "a.npz", vectors[:20])
    second = embedded(tmp_path / "b.parquet", vectors[20:])
    assert fit(first, second, "-o", tmp_path / "p.npz", "--dimensions", "7") == 0
    np.testing.assert_allclose(read_projection(tmp_path / "p.npz").matrix, expected(vectors, 7), atol=1e-6)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
def test_arrays_need_the_name_of_the_checkpoint(
    vectors: NDArray[np.float32], tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "a.npy", vectors.astype(dtype))
    words = (tmp_path / "a.npy", "-o", tmp_path / "p.npz")
    assert fit(*words) == 2
    assert "a.npy: does not name its checkpoint; give it with --checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "p.npz").exists()
    assert fit(*words, "--checkpoint", "mine") == 0
    assert read_projection(tmp_path / "p.npz").checkpoint == "mine"


@pytest.mark.parametrize("ending", [".npz", ".npy", ".parquet"])
def test_files_are_read_in_blocks(
    vectors: NDArray[np.float32], tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_BLOCK", 16)
    path = tmp_path / f"a{ending}"
    if ending == ".npy":
        np.save(path, vectors)
    else:
        embedded(path, vectors)
    blocks = list(StoredVectors(path).blocks())
    assert [len(block) for block in blocks] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), vectors)


def test_other_columns_and_lists_of_any_length(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"v": list(vectors), "n": list(range(50))}), path)
    np.testing.assert_array_equal(np.concatenate(list(StoredVectors(path, "v").blocks())), vectors)
    with pytest.raises(StoredError, match=r"a\.parquet: no column 'embedding', but v, n"):
        StoredVectors(path)
    with pytest.raises(StoredError, match="row 0 of 'n' is no list of numbers"):
        StoredVectors(path, "n")
    ragged = [*vectors[:3], vectors[3, :5]]
    pyarrow.parquet.write_table(pyarrow.table({"embedding": ragged}), path)
    with pytest.raises(StoredError, match=r"a\.parquet: row 3 has 5 values, expected 8"):
        list(StoredVectors(path).blocks())


def test_files_without_vectors_are_refused(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", vectors[0])
    np.save(tmp_path / "whole.npy", vectors.astype(int))
    np.save(tmp_path / "columns.npy", np.asfortranarray(vectors))
    np.save(tmp_path / "none.npy", vectors[:0])
    np.savez(tmp_path / "other.npz", vectors=vectors)
    for name in ("text.npz", "text.npy", "text.parquet", "text.txt"):
        (tmp_path / name).write_text("no vectors are here")
    for name, message in {
        "flat.npy": r"float32\[8\], expected floats \[rows, width\]",
        "whole.npy": "int64",
        "columns.npy": "by columns, expected floats",
        "none.npy": "0 vectors of width 8",
        "other.npz": "embeddings.npy",
        "text.npz": "not a zip file",
        "text.npy": "magic string",
        "text.parquet": "not a Parquet file",
        "text.txt": r"expected a file of \.npz, \.parquet, \.npy",
        "nothing.npy": "No such file",
        "nothing.npz": "No such file",
        "nothing.parquet": "No such file",
    }.items():
        with pytest.raises(StoredError, match=f"{name}.*{message}"):
            StoredVectors(tmp_path / name)


def test_a_file_that_is_cut_off_is_named_with_the_row(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-70])
    with pytest.raises(StoredError, match=r"a\.npy: cut off in row 47 of 50"):
        list(StoredVectors(tmp_path / "a.npy").blocks())


def test_what_does_not_fit_together_is_refused(
    vectors: NDArray[np.float32], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = embedded(tmp_path / "good.npz", vectors)
    other = embedded(tmp_path / "other.npz", vectors, checkpoint_name="base")
    narrow = embedded(tmp_path / "narrow.npz", vectors[:, :6])
    bad = vectors.copy()
    bad[33] = np.nan
    broken = embedded(tmp_path / "broken.npz", bad)
    output = tmp_path / "p.npz"
    for words, message in {
        (good, other): f"embeddings of several checkpoints: {good} of tiny local, {other} of base local",
        (good, narrow): f"{narrow}: width 6, but {good} has 8",
        (good, "--checkpoint", "base"): f"{good}: of the checkpoint tiny, but --checkpoint is base",
        (good, broken): f"{broken}: row 33: a vector with a value that is not finite",
        (good, "--dimensions", "9"): "9 dimensions, but 50 vectors give 1 to 8",
    }.items():
        assert fit(*words, "-o", output) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"siglip-serve: {message}"
        assert list(tmp_path.glob("*p.npz*")) == []


def test_an_output_is_not_replaced_unasked(
    vectors: NDArray[np.float32], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = embedded(tmp_path / "good.npz", vectors)
    (tmp_path / "p.npz").write_text("kept")
    assert fit(good, "-o", tmp_path / "p.npz") == 2
    assert "p.npz: exists; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "p.npz").read_text() == "kept"
    assert fit(good, "-o", tmp_path / "p.npz", "--overwrite") == 0
    assert read_projection(tmp_path / "p.npz").rows == 50
    assert fit(good, "-o", tmp_path / "p.bin") == 2
    assert "p.bin: expected a .npz file" in capsys.readouterr().err

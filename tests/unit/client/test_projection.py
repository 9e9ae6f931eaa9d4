"""Projections on matrices whose principal components are known."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from siglip_serve_client.compact import unit
from siglip_serve_client.projection import Moments, Projection, read_projection, write_projection


def fitted(vectors: NDArray[np.float32], dimensions: int, block: int = 7) -> Projection:
    moments = Moments(vectors.shape[1])
    for start in range(0, len(vectors), block):
        moments.add(vectors[start : start + block])
    return moments.fit(dimensions, "a/checkpoint", "abc")


@pytest.fixture
def vectors() -> NDArray[np.float32]:
    """200 vectors of width 12 around a mean far from 0, as embeddings of images are."""
    random = np.random.default_rng(3)
    spread = random.normal(size=(200, 12)) * np.linspace(1, 0.1, 12)
    return (spread @ np.linalg.qr(random.normal(size=(12, 12)))[0] + 3).astype(np.float32)


def test_the_first_rows_are_the_directions_of_most_variance() -> None:
    """Ten points on the unit circle around the first axis, and two values without variance."""
    angles = np.linspace(-0.3, 0.3, 10)
    points = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], 1).astype(np.float32)
    projection = fitted(points, 2)
    np.testing.assert_allclose(projection.matrix, [[0, 1, 0, 0], [1, 0, 0, 0]], atol=1e-6)
    variances = np.array([np.sin(angles).var(), np.cos(angles).var()])
    np.testing.assert_allclose(projection.explained, variances / variances.sum(), rtol=1e-5)
    assert (projection.rows, projection.most, projection.width) == (10, 2, 4)


def test_components_are_those_of_a_singular_value_decomposition(vectors: NDArray[np.float32]) -> None:
    projection = fitted(vectors, 5)
    centred = unit(vectors).astype(np.float64)
    centred -= centred.mean(0)
    _, singular, rows = np.linalg.svd(centred)
    np.testing.assert_allclose(np.abs(projection.matrix @ rows[:5].T), np.eye(5), atol=1e-5)
    np.testing.assert_allclose(projection.explained, (singular**2 / (singular**2).sum())[:5], rtol=1e-6)


@pytest.mark.parametrize("block", [1, 64, 200])
def test_blocks_do_not_change_the_result(vectors: NDArray[np.float32], block: int) -> None:
    np.testing.assert_allclose(fitted(vectors, 6, block).matrix, fitted(vectors, 6).matrix, atol=1e-6)


def test_the_length_of_a_vector_does_not_count(vectors: NDArray[np.float32]) -> None:
    longer = vectors * np.linspace(1, 50, len(vectors), dtype=np.float32)[:, None]
    np.testing.assert_allclose(fitted(longer, 6).matrix, fitted(vectors, 6).matrix, atol=1e-5)


def test_a_fit_to_more_dimensions_begins_with_that_to_fewer(vectors: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(fitted(vectors, 8).matrix[:3], fitted(vectors, 3).matrix)
    long = fitted(vectors, 8).project(vectors, 8, normalized=False)
    np.testing.assert_allclose(
        fitted(vectors, 8).project(vectors, 3), unit(long[:, :3]), rtol=1e-5, atol=1e-6
    )


def test_projected_vectors_are_products_with_the_rows(vectors: NDArray[np.float32]) -> None:
    projection = fitted(vectors, 4)
    texts = -vectors[:9, ::-1]  # of another cone: the same matrix, and no mean
    expected = [[float(np.dot(row, text)) for row in projection.matrix] for text in texts]
    found = projection.project(texts, 4, normalized=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(projection.project(texts, 4), axis=1), 1, rtol=1e-6)


def test_all_components_keep_every_angle(vectors: NDArray[np.float32]) -> None:
    whole = fitted(vectors, 12).project(vectors, 12)
    np.testing.assert_allclose(whole @ whole.T, unit(vectors) @ unit(vectors).T, atol=1e-5)


def test_equal_collections_give_equal_signs(vectors: NDArray[np.float32]) -> None:
    matrix = fitted(vectors, 6).matrix
    np.testing.assert_allclose(fitted(vectors[::-1].copy(), 6).matrix, matrix, atol=1e-5)
    assert (np.take_along_axis(matrix, np.abs(matrix).argmax(1)[:, None], 1) > 0).all()


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "not finite"), (np.inf, "not finite"), (0, "zeros")])
def test_vectors_without_a_direction_are_named(vectors: NDArray[np.float32], bad: float, what: str) -> None:
    vectors[5] = bad
    with pytest.raises(ValueError, match=f"^5: a vector .*{what}"):
        Moments(12).add(vectors)


def test_fewer_vectors_than_dimensions_are_refused(vectors: NDArray[np.float32]) -> None:
    assert fitted(vectors[:6], 5).most == 5
    with pytest.raises(ValueError, match="6 dimensions, but 6 vectors give 1 to 5"):
        fitted(vectors[:6], 6)
    with pytest.raises(ValueError, match="13 dimensions, but 200 vectors give 1 to 12"):
        fitted(vectors, 13)


def test_other_widths_are_refused(vectors: NDArray[np.float32]) -> None:
    projection = fitted(vectors, 4)
    with pytest.raises(ValueError, match="vectors of width 11, expected 12"):
        projection.project(vectors[:, :11], 2)
    for dimensions in (0, 5):
        with pytest.raises(ValueError, match=f"dimensions: {dimensions}, expected 1 to 4"):
            projection.project(vectors, dimensions)


def test_files_keep_everything(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    projection = fitted(vectors, 4)
    with (tmp_path / "p.npz").open("wb") as file:
        write_projection(projection, file)
    found = read_projection(tmp_path / "p.npz")
    np.testing.assert_array_equal(found.matrix, projection.matrix)
    np.testing.assert_array_equal(found.explained, projection.explained)
    assert (found.rows, found.checkpoint, found.revision) == (200, "a/checkpoint", "abc")


def test_damaged_and_other_files_are_refused(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    whole = io.BytesIO()
    write_projection(fitted(vectors, 4), whole)
    (tmp_path / "cut.npz").write_bytes(whole.getvalue()[:-40])
    np.savez(tmp_path / "other.npz", embeddings=vectors)
    np.save(tmp_path / "array.npy", vectors)
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("cut.npz", "other.npz", "array.npy", "text.npz"):
        with pytest.raises(ValueError, match=f"{name}: not a file of `siglip-serve fit-projection`"):
            read_projection(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_projection(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("projection", np.ones((4, 12), np.float32), "not orthonormal"),
        ("projection", np.eye(4, 12), r"float64\[4, 12\], expected float32"),
        ("projection", np.eye(3, 12, dtype=np.float32), "expected float32"),
        ("projection", np.zeros((0, 12), np.float32), "expected float32"),
        ("about", np.array('{"format": 2}'), "format 2, expected 1"),
    ],
)
def test_files_of_a_wrong_content_are_refused(
    vectors: NDArray[np.float32],
    tmp_path: Path,
    name: str,
    value: NDArray[np.float32],
    message: str,
) -> None:
    whole = io.BytesIO()
    write_projection(fitted(vectors, 4), whole)
    whole.seek(0)
    content = dict(np.load(whole))
    np.savez(tmp_path / "p.npz", **{**content, name: value})
    with pytest.raises(ValueError, match=message):
        read_projection(tmp_path / "p.npz")

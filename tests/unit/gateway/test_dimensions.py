"""Requests for fewer dimensions: with a projection, without one, and with one of another checkpoint."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateways import PNG, URI, WIDTH, gateway, gateway_process, vector
from numpy.typing import NDArray
from programs import free_port
from siglip_serve_client.compact import COMPACT, compact, unit
from siglip_serve_client.projection import Projection, write_projection

from siglip_gateway.app import create_app
from siglip_gateway.backend import Checkpoint
from siglip_gateway.command import main
from siglip_gateway.dimensions import mismatch
from siglip_gateway.options import GatewayOptions

MOST = 6


def projection(
    name: str = "stand-in", width: int = WIDTH, most: int = MOST, revision: str = "local"
) -> Projection:
    random = np.random.default_rng(1)
    rows = np.linalg.qr(random.normal(size=(width, most)))[0].T.astype(np.float32)
    return Projection(rows, np.full(most, 0.1), 100, name, revision)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return written(projection(), tmp_path)


def written(made: Projection, folder: Path) -> str:
    with (folder / "p.npz").open("wb") as file:
        write_projection(made, file)
    return str(folder / "p.npz")


def expected(dimensions: int, *contents: str | bytes) -> NDArray[np.float32]:
    rows = projection().matrix[:dimensions]
    return unit(np.stack([rows @ vector(content) for content in contents]))


@pytest.mark.parametrize("dimensions", [1, 5, MOST])
def test_openai_vectors_are_projected_and_scaled(file: str, dimensions: int) -> None:
    with gateway(projection=file) as client:
        answer = client.post("/v1/embeddings", json={"input": ["a", URI], "dimensions": dimensions}).json()
    found = np.array([entry["embedding"] for entry in answer["data"]], np.float32)
    assert found.shape == (2, dimensions)
    np.testing.assert_allclose(found, expected(dimensions, "a", PNG), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoding", ["base64", "float16", *COMPACT])
def test_every_encoding_is_of_the_projected_vector(file: str, encoding: str) -> None:
    body = {"input": "a", "dimensions": 5}
    with gateway(projection=file) as client:
        plain = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        found = client.post("/v1/embeddings", json={**body, "encoding_format": encoding}).json()
    values: Any = found["data"][0]["embedding"]
    short = np.array([plain], np.float32)
    if encoding in COMPACT:
        assert values == compact(short, encoding)[0].tolist()
    else:
        kind = "<f4" if encoding == "base64" else "<f2"
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(values), kind), short[0].astype(kind))


def test_cohere_vectors_are_projected_in_every_type(file: str) -> None:
    kinds = ["float", *COMPACT]
    body = {"texts": ["a", "b"], "embedding_types": kinds, "output_dimension": MOST}
    with gateway(projection=file) as client:
        found = client.post("/v2/embed", json=body).json()["embeddings"]
        pictures = client.post("/v2/embed", json={"images": [URI], "output_dimension": MOST}).json()
    short = np.array(found["float"], np.float32)
    np.testing.assert_allclose(short, expected(MOST, "a", "b"), rtol=1e-5, atol=1e-6)
    for kind in COMPACT:
        np.testing.assert_array_equal(found[kind], compact(short, kind))
    np.testing.assert_allclose(pictures["embeddings"]["float"], expected(MOST, PNG), rtol=1e-5, atol=1e-6)


def test_raw_vectors_are_projected_unscaled(file: str) -> None:
    with gateway(projection=file) as client:
        body = {"input": "a", "dimensions": 4, "normalized": False}
        (entry,) = client.post("/v1/embeddings", json=body).json()["data"]
    np.testing.assert_allclose(entry["embedding"], projection().matrix[:4] @ (2 * vector("a")), rtol=1e-5)


@pytest.mark.parametrize("body", [{}, {"dimensions": None}, {"dimensions": WIDTH}])
def test_without_fewer_dimensions_vectors_are_the_checkpoints(file: str, body: dict[str, Any]) -> None:
    with gateway(projection=file) as client:
        (entry,) = client.post("/v1/embeddings", json={"input": "a", **body}).json()["data"]
    np.testing.assert_array_equal(np.array(entry["embedding"], np.float32), vector("a"))


@pytest.mark.parametrize("dimensions", [-1, 0, MOST + 1, WIDTH - 1, WIDTH + 1, 2**62])
def test_other_dimensions_are_refused(file: str, dimensions: int) -> None:
    with gateway(projection=file) as client:
        answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": dimensions})
        cohere = client.post("/v2/embed", json={"texts": ["a"], "output_dimension": dimensions})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "dimensions", "invalid_value")
    assert error["message"].startswith(f"dimensions: {dimensions}, expected 1 to 6, or 16: ")
    assert cohere.status_code == 400
    assert cohere.json()["message"].startswith("output_dimension: ")


def test_without_a_projection_the_refusal_names_the_command() -> None:
    with gateway() as client:
        answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": 8})
        cohere = client.post("/v2/embed", json={"texts": ["a"], "output_dimension": 8})
    for message in (answer.json()["error"]["message"], cohere.json()["message"]):
        assert "vectors of stand-in have 16 dimensions and no projection shortens them" in message
        assert "`siglip-serve fit-projection`" in message
        assert "`siglip-serve gateway --projection FILE`" in message


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (projection("other"), "is of other with width 16, but Triton serves stand-in with width 16"),
        (projection(width=8), "is of stand-in with width 8, but Triton serves stand-in with width 16"),
    ],
)
def test_a_projection_of_another_checkpoint_is_refused(made: Projection, reason: str, tmp_path: Path) -> None:
    with gateway(projection=written(made, tmp_path)) as client:
        answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": 4})
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "projection_mismatch")
    assert error["message"] == f"the projection {reason}"


@pytest.mark.parametrize(
    ("fitted", "served", "fits"),
    [
        ("abc", "abc", True),
        ("abc", "abd", False),
        ("abc", "local", True),
        ("local", "abc", True),
        ("", "abc", True),
        ("local", "", True),
    ],
)
def test_revisions_of_a_hub_must_agree(fitted: str, served: str, fits: bool) -> None:
    found = mismatch(projection(revision=fitted), Checkpoint("stand-in", WIDTH, revision=served))
    assert (found == "") == fits
    if not fits:
        assert "(revision abc)" in found
        assert "(revision abd)" in found


def test_models_tells_the_most_dimensions(file: str) -> None:
    with gateway(projection=file) as client:
        assert client.get("/v1/models").json()["data"][0]["projected_dimensions"] == MOST
    with gateway() as client:
        assert client.get("/v1/models").json()["data"][0]["projected_dimensions"] is None


def test_options_keep_the_projection(file: str) -> None:
    options = GatewayOptions(projection=file)
    assert GatewayOptions.from_json(options.to_json()) == options


def test_a_file_that_is_no_projection_ends_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.npz").write_text("nothing")
    for path in (tmp_path / "p.npz", tmp_path / "none.npz"):
        assert main(["--projection", str(path), "--port", "0"]) == 1
        assert "siglip-serve gateway: --projection: " in (error := capsys.readouterr().err)
        assert str(path) in error
    with pytest.raises(ValueError, match="not a file of `siglip-serve fit-projection`"):
        create_app(GatewayOptions(projection=str(tmp_path / "p.npz")))


def test_a_gateway_starts_with_a_projection_where_triton_does_not_answer(file: str) -> None:
    """The first request with `dimensions` then compares the checkpoints."""
    with gateway_process(f"127.0.0.1:{free_port()}", "--projection", file):
        pass

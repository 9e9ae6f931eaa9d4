"""Patches and grids of requests: batches of several requests, and inputs that are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_module
from numpy.typing import NDArray
from random_checkpoints import random_naflex, save_naflex

from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Settings

MOST = 12
GRIDS = [[3, 4], [1, 2], [6, 2], [1, 7], [2, 2]]
PATCHES = np.random.default_rng(0).integers(0, 256, (len(GRIDS), MOST, 768), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_naflex(random_naflex(), tmp_path_factory.mktemp("naflex"), MOST)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[Any]:
    """The image tower as a Triton model."""
    with triton_module.installed():
        from siglip_serve.serving.context import Context
        from siglip_serve.serving.counters import RefusalCounter
        from siglip_serve.serving.siglip_vision import SiglipVisionModel

        settings = Settings(checkpoint=str(checkpoint), dtype="float32")
        name = "siglip_vision_model"
        made = SiglipVisionModel(
            Context(settings, load_config(checkpoint), "cpu", name, RefusalCounter(name), shared=False)
        )
        yield made
        made.close()


def request(rows: list[int], grids: Any = None, **inputs: NDArray[Any]) -> triton_module.Request:
    """A request for some of `PATCHES`, with their own grids unless others are given."""
    own = np.array([GRIDS[row] for row in rows] if grids is None else grids, dtype=np.int32)
    outputs = ("PATCH_MAPS",) if inputs else ("EMBEDDING",)
    return triton_module.Request({"PIXEL_VALUES": PATCHES[rows], "PATCH_GRID": own, **inputs}, outputs, {})


def test_rows_of_several_requests_keep_their_grids(model: Any) -> None:
    alone = [model.execute([request([row])])[0].arrays["EMBEDDING"][0] for row in range(len(GRIDS))]
    responses = model.execute([request([3]), request([0, 1]), request([4, 2])])
    for response, rows in zip(responses, ([3], [0, 1], [4, 2]), strict=True):
        expected = [alone[row] for row in rows]
        np.testing.assert_allclose(response.arrays["EMBEDDING"], expected, atol=1e-5)
    (other,) = model.execute([request([0], [[4, 3]])])
    assert np.abs(other.arrays["EMBEDDING"][0] - alone[0]).max() > 1e-3


def test_maps_end_with_zeros(model: Any) -> None:
    vectors = np.ones((1, 2, 64), dtype=np.float32)
    (found,) = model.execute([request([3], PROMPT_VECTORS=vectors)])
    assert found.arrays["PATCH_MAPS"].shape == (1, 2, MOST)
    assert np.count_nonzero(found.arrays["PATCH_MAPS"]) == 2 * 7


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[3, 4]], "PATCH_GRID: 1 rows, expected 2 as PIXEL_VALUES"),
        (
            [[3, 4], [0, 5]],
            "PATCH_GRID[1]: got [0, 5], expected rows and columns above 0 and at most 12 patches",
        ),
        (
            [[2, 7], [1, 1]],
            "PATCH_GRID[0]: got [2, 7], expected rows and columns above 0 and at most 12 patches",
        ),
        ([[2**16, 2**16], [1, 1]], "PATCH_GRID[0]: got [65536, 65536]"),
        ([[3], [4]], "PATCH_GRID: got int32 [2, 1], expected int32 ['rows', 2]"),
    ],
)
def test_refuses_grids_that_are_not_those_of_the_patches(model: Any, grids: Any, message: str) -> None:
    wrong, good = model.execute([request([0, 1], grids), request([2])])
    assert message in wrong.error.text
    assert good.error is None


def test_names_a_grid_that_is_missing(model: Any) -> None:
    (found,) = model.execute([triton_module.Request({"PIXEL_VALUES": PATCHES[:1]}, ("EMBEDDING",), {})])
    assert "PATCH_GRID: missing" in found.error.text

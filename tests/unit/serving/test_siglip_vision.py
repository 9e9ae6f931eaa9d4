"""The order of responses where Triton hands requests of several kinds to one model at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import triton_module
from numpy.typing import NDArray
from paths import TINY

from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Settings

VISION = load_config(TINY).vision
SIDE = VISION.image_size
PIXELS = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The image tower of the bundled checkpoint as a Triton model."""
    with triton_module.installed():
        from siglip_serve.serving.context import Context
        from siglip_serve.serving.counters import RefusalCounter
        from siglip_serve.serving.siglip_vision import SiglipVisionModel

        settings = Settings(checkpoint=str(TINY), dtype="float32", backend="torch")
        name = "siglip_vision_model"
        made = SiglipVisionModel(
            Context(settings, load_config(TINY), "cpu", name, RefusalCounter(name), shared=False)
        )
        yield made
        made.close()


def request(
    rows: Sequence[int], vectors: int = 0, outputs: Sequence[str] = ("EMBEDDING",), **parameters: Any
) -> triton_module.Request:
    """A request for some of `PIXELS`, with vectors if their number is given."""
    inputs: dict[str, NDArray[Any]] = {"PIXEL_VALUES": PIXELS[list(rows)]}
    if vectors:
        inputs["PROMPT_VECTORS"] = np.ones((1, vectors, VISION.embedding_size), dtype=np.float32)
    return triton_module.Request(inputs, outputs, parameters)


def test_answers_requests_with_and_without_vectors_in_their_order(model: Any) -> None:
    (whole,) = model.execute([request(range(6))])
    expected = whole.arrays["EMBEDDING"]
    given = [
        request([0]),
        request([1], 2, ("EMBEDDING", "PATCH_MAPS")),
        request([2, 3]),
        request([4], 1, ("EMBEDDING", "PATCH_MAPS")),
        request([5]),
    ]
    responses = model.execute(given)
    for response, rows in zip(responses, ([0], [1], [2, 3], [4], [5]), strict=True):
        assert response.error is None
        np.testing.assert_allclose(response.arrays["EMBEDDING"], expected[rows], rtol=1e-3, atol=1e-3)
    assert [response.arrays.get("PATCH_MAPS", np.zeros((1, 0))).shape[1] for response in responses] == [
        *(0, 2, 0, 1, 0)
    ]


def test_an_error_is_of_its_own_request(model: Any) -> None:
    given = [
        request([0]),
        request([1], unknown=True),
        request([2], outputs=("PATCH_MAPS",)),
        request([3, 4], 1, ("PATCH_MAPS",)),
        request([5], normalized=True),
    ]
    first, unknown, maps, two, last = model.execute(given)
    (whole,) = model.execute([request(range(6))])
    expected = whole.arrays["EMBEDDING"]
    np.testing.assert_allclose(first.arrays["EMBEDDING"], expected[:1], rtol=1e-3, atol=1e-3)
    unit = expected[5:] / np.linalg.norm(expected[5:])
    np.testing.assert_allclose(last.arrays["EMBEDDING"], unit, rtol=1e-3, atol=1e-3)
    assert "parameter 'unknown': unknown" in unknown.error.text
    assert "PATCH_MAPS: only of requests with the input PROMPT_VECTORS" in maps.error.text
    assert "PIXEL_VALUES: 2 images with vectors, expected one" in two.error.text
    assert {error.error.code for error in (unknown, maps, two)} == {0}


def test_a_missing_input_is_refused_and_its_neighbours_are_answered(model: Any) -> None:
    """Triton counts inputs only: PROMPT_VECTORS may come in place of PIXEL_VALUES."""
    alone = request([1], 2)
    del alone.inputs["PIXEL_VALUES"]
    first, second, third = model.execute([request([0]), alone, request([2])])
    assert (second.error.text, second.error.code) == ("PIXEL_VALUES: missing", 0)
    assert first.arrays["EMBEDDING"].shape == third.arrays["EMBEDDING"].shape == (1, VISION.embedding_size)

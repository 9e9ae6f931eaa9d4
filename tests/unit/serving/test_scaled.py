"""The setting `preprocess` at `scaled` in the models that read images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import triton_module
from images import encode, photo
from numpy.typing import NDArray
from paths import TINY
from readers import reader

from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Settings

CONFIG = load_config(TINY).image
JPEG = encode(photo(1000, 800), "JPEG", quality=90)


@pytest.fixture
def models() -> Iterator[dict[str, Any]]:
    """The models that decode pictures and crops."""
    with triton_module.installed():
        from siglip_serve.serving.context import Context
        from siglip_serve.serving.counters import RefusalCounter
        from siglip_serve.serving.siglip_vision import SiglipVisionProcess
        from siglip_serve.serving.team import JerseyProcess

        settings = Settings(checkpoint=str(TINY), preprocess="scaled")
        kinds = {"siglip_vision_process": SiglipVisionProcess, "jersey_process": JerseyProcess}
        yield {
            name: kind(Context(settings, load_config(TINY), "cpu", name, RefusalCounter(name), shared=False))
            for name, kind in kinds.items()
        }


def ask(model: Any, inputs: dict[str, NDArray[Any]]) -> Any:
    (response,) = model.execute([triton_module.Request(inputs, (), {})])
    return response.arrays


def test_pictures_are_scaled_and_jerseys_are_not(models: dict[str, Any]) -> None:
    files = np.empty((1, 1), dtype=np.object_)
    files[0, 0] = JPEG
    pixels = reader(CONFIG, "scaled")(JPEG)
    assert not np.array_equal(pixels, reader(CONFIG, "fast")(JPEG))
    answer = ask(models["siglip_vision_process"], {"INPUT_IMAGE": files})
    np.testing.assert_array_equal(answer["PIXEL_VALUES"], pixels[None])
    np.testing.assert_array_equal(answer["IMAGE_SIZE"], [[800, 1000]])

    jersey = reader(CONFIG, "fast").decode(JPEG)[160:400, 250:750]
    answer = ask(models["jersey_process"], {"CROPS": files})
    np.testing.assert_array_equal(answer["PIXEL_VALUES"], reader(CONFIG, "fast").resize(jersey.copy())[None])

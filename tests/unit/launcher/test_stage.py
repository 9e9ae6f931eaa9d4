"""The configurations that the launcher writes, without a server."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format
from paths import ROOT
from tritonclient.grpc import model_config_pb2

from siglip_serve.launcher.stage import Stage, Tower

REPOSITORY = ROOT / "model_repository"


def staged(device: str, tokens: int, model: str = "siglip_vision_model") -> Any:
    """The configuration of a model for a tower with so many tokens."""
    dims = {
        "PIXEL_VALUES": (8, 8, 3),
        "EMBEDDING": (4,),
        "MEAN_EMBEDDING": (4,),
        "PATCH_EMBEDDINGS": (tokens, 4),
    }
    tower = Tower({}, {**dims, "PATCH_MAPS": (-1, tokens), "PROMPT_VECTORS": (-1, 4)})
    stage = Stage(REPOSITORY, device)
    try:
        stage.fill({"main": tower, "teams": tower}, 0, [model])
        text = (stage.models / model / "config.pbtxt").read_text(encoding="utf-8")
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    finally:
        stage.remove()


@pytest.mark.parametrize(("tokens", "preferred"), [(729, [56]), (1024, [40]), (196, []), (256, [])])
def test_large_towers_prefer_batches_that_they_compute_at_once(tokens: int, preferred: list[int]) -> None:
    config = staged("cuda", tokens)
    assert list(config.dynamic_batching.preferred_batch_size) == preferred
    assert all(size < config.max_batch_size for size in preferred)
    assert config.dynamic_batching.default_queue_policy.max_queue_size


def test_a_cpu_and_a_single_process_prefer_what_the_repository_says() -> None:
    assert 56 not in staged("cpu", 729).dynamic_batching.preferred_batch_size
    assert not staged("cuda", 729, "siglip_base_model").dynamic_batching.preferred_batch_size

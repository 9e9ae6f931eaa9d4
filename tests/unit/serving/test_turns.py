"""Processes of one model take turns, unless the settings say otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton_module
from paths import ROOT

from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Settings
from siglip_serve.engine.turns import peers_name

TINY = ROOT / "checkpoints" / "siglip-tiny"


@pytest.mark.parametrize(("turns", "shared"), [("on", True), ("off", True), ("on", False)])
def test_only_several_processes_join_and_none_that_the_settings_tell_not_to(turns: str, shared: bool) -> None:
    name = "siglip_vision_model"
    file = Path(f"/dev/shm/siglip-serve-turns-{peers_name(name, 'cpu')}")
    with triton_module.installed():
        from siglip_serve.serving.context import Context, open_turns
        from siglip_serve.serving.counters import RefusalCounter

        settings = Settings(checkpoint=str(TINY), turns=turns)  # type: ignore[arg-type]
        joined = open_turns(
            Context(settings, load_config(TINY), "cpu", name, RefusalCounter(name), shared=shared)
        )
        try:
            assert file.exists() == (shared and turns == "on")
        finally:
            joined.close()
    assert not file.exists()

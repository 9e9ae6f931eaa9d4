"""Settings: where they come from, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from siglip_serve.config import Settings, load_settings
from siglip_serve.engine.plan import fastest_dtype
from siglip_serve.errors import SettingsError
from siglip_serve.machine import available_cores


def test_a_model_parameter_wins_over_the_environment() -> None:
    environment = {"SIGLIP_SERVE_CHECKPOINT": "a", "SIGLIP_SERVE_MAX_ROWS": "3", "HOME": "/root"}
    settings = load_settings(environment, {"checkpoint": "b"})
    assert settings == Settings(checkpoint="b", max_rows=3)


@pytest.mark.parametrize(
    ("environment", "parameters", "message"),
    [
        ({}, {}, "'checkpoint' is not given"),
        ({"SIGLIP_SERVE_CHECKPOINT": ""}, {}, "'checkpoint' is not given"),
        ({"SIGLIP_SERVE_CHECKPONT": "a"}, {}, "variable SIGLIP_SERVE_CHECKPONT: no such setting"),
        ({}, {"checkpoint": "a", "dtipe": "x"}, "model parameter 'dtipe': no such setting"),
        ({}, {"checkpoint": "a", "dtype": "int4"}, "got 'int4', expected one of auto, float32"),
        ({}, {"checkpoint": "a", "max_image_bytes": "32MB"}, "got '32MB', expected a whole number"),
    ],
)
def test_what_is_refused(environment: dict[str, str], parameters: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(environment, parameters)


def test_kubernetes_service_links_are_no_settings() -> None:
    links = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP_ADDR"]
    environment = {f"SIGLIP_SERVE_{name}": "x" for name in links}
    assert load_settings(environment, {"checkpoint": "a"}) == Settings(checkpoint="a")


def test_fastest_dtype() -> None:
    assert fastest_dtype(9) == "bfloat16"
    assert fastest_dtype(7) == "float16"
    flags = Path("/proc/cpuinfo").read_text()
    fast = " avx512_bf16" in flags or " amx_bf16" in flags
    assert fastest_dtype(None) == ("bfloat16" if fast else "float32")


def test_available_cores() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)

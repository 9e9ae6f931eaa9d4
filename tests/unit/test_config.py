"""Settings: their sources, and the values that are refused."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from siglip_serve.config import Settings, load_settings
from siglip_serve.errors import SettingsError

WHOLE = "expected a whole number >= 0"


def test_model_parameter_wins_over_the_environment() -> None:
    environment = {"SIGLIP_SERVE_CHECKPOINT": "a", "SIGLIP_SERVE_MAX_ROWS": "3", "HOME": "/root"}
    settings = load_settings(environment, {"checkpoint": "b"})
    assert settings == Settings(checkpoint="b", max_rows=3)


def test_reads_the_process_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLIP_SERVE_CHECKPOINT", "a")
    assert load_settings() == Settings(checkpoint="a")


@pytest.mark.parametrize(
    ("environment", "parameters", "message"),
    [
        ({}, {}, "setting 'checkpoint' is not given (environment variable SIGLIP_SERVE_CHECKPOINT)"),
        ({"SIGLIP_SERVE_CHECKPOINT": ""}, {}, "setting 'checkpoint' is not given (environment variable "),
        (
            {"SIGLIP_SERVE_CHECKPONT": "a"},
            {},
            "environment variable SIGLIP_SERVE_CHECKPONT: no such setting; ",
        ),
        (
            {},
            {"checkpoint": "a", "dtipe": "x"},
            "model parameter 'dtipe': no such setting; the settings are ",
        ),
        ({}, {"checkpoint": "a", "Dtype": "int8"}, "model parameter 'Dtype': no such setting; the settings"),
        (
            {},
            {"checkpoint": "a", "dtype": "int4"},
            "model parameter 'dtype': got 'int4', expected one of auto, f",
        ),
        ({}, {"checkpoint": "a", "tower": "team"}, "'tower': got 'team', expected one of main, teams"),
        (
            {},
            {"checkpoint": "a", "max_decode_seconds": "0"},
            "'max_decode_seconds': got '0', expected a number > 0",
        ),
        ({}, {"checkpoint": "a", "max_decode_seconds": "inf"}, "got 'inf', expected a number > 0"),
        ({}, {"checkpoint": "a", "slow_request_seconds": "1s"}, "got '1s', expected a number > 0"),
        ({}, {"checkpoint": "a", "max_image_bytes": "32MB"}, f"'max_image_bytes': got '32MB', {WHOLE}"),
        ({}, {"checkpoint": "a", "max_rows": ""}, f"model parameter 'max_rows': got '', {WHOLE}"),
        ({}, {"checkpoint": "a", "max_rows": "-1"}, f"model parameter 'max_rows': got '-1', {WHOLE}"),
        ({}, {"checkpoint": "a", "max_rows": "+1"}, f"model parameter 'max_rows': got '+1', {WHOLE}"),
        ({}, {"checkpoint": "a", "max_rows": "1.0"}, f"model parameter 'max_rows': got '1.0', {WHOLE}"),
        ({}, {"checkpoint": "a", "max_rows": " 1"}, f"model parameter 'max_rows': got ' 1', {WHOLE}"),
        ({}, {"checkpoint": "a", "max_rows": "٣"}, f"model parameter 'max_rows': got '٣', {WHOLE}"),
        ({}, {"checkpoint": "a", "max_rows": "²"}, f"model parameter 'max_rows': got '²', {WHOLE}"),
        (
            {"SIGLIP_SERVE_CHECKPOINT": "a", "SIGLIP_SERVE_THREADS": "1٣"},
            {},
            f"environment variable SIGLIP_SERVE_THREADS: got '1٣', {WHOLE}",
        ),
    ],
)
def test_refuses_a_setting_and_names_its_source(
    environment: dict[str, str], parameters: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_settings(environment, parameters)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("1", 1), ("007", 7), ("33554432", 33554432)])
def test_reads_whole_numbers(text: str, value: int) -> None:
    assert load_settings({}, {"checkpoint": "a", "max_rows": text}).max_rows == value


def test_ignores_the_service_links_of_kubernetes() -> None:
    links = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP_ADDR"]
    environment = {f"SIGLIP_SERVE_{name}": "x" for name in links}
    assert load_settings(environment, {"checkpoint": "a"}) == Settings(checkpoint="a")


@pytest.mark.parametrize("name", ["PORTS", "PORT_X", "SERVICE", "SERVICE_HOSTS"])
def test_refuses_names_that_only_resemble_service_links(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^environment variable SIGLIP_SERVE_{name}: no such setting; "):
        load_settings({f"SIGLIP_SERVE_{name}": "x"}, {"checkpoint": "a"})


@pytest.mark.parametrize(
    ("tower", "teams_checkpoint", "expected"),
    [("main", "", "a"), ("main", "b", "a"), ("teams", "", "a"), ("teams", "b", "b")],
)
def test_a_model_loads_the_checkpoint_of_its_use(tower: str, teams_checkpoint: str, expected: str) -> None:
    given = {"checkpoint": "a", "teams_checkpoint": teams_checkpoint, "tower": tower}
    assert load_settings({}, given).own_checkpoint == expected


def test_every_option_has_a_group_and_a_help() -> None:
    hidden = {setting.name for setting in fields(Settings) if not setting.metadata}
    assert hidden == {"tower", "checkpoint_name", "checkpoint_revision", "checkpoint_note", "heatmaps"}
    for setting in fields(Settings):
        if setting.metadata:
            assert setting.metadata["group"], setting.name
            assert setting.metadata["help"], setting.name

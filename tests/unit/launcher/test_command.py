"""`siglip-serve serve`: its options, and what it prints, without a server."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paths import TINY

from siglip_serve.config import Settings, load_settings
from siglip_serve.errors import SettingsError
from siglip_serve.launcher import ServeOptions, command
from siglip_serve.launcher.command import (
    _announce,
    _command_name,
    _example,
    _parser,
    _serve_options,
    main,
)

ALL = ("classify_image", "embed_image")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGLIP_SERVE_CHECKPOINT", raising=False)
    monkeypatch.setattr(command, "_command_name", lambda: "siglip-serve")


def server(checkpoint: Path | str, models: tuple[str, ...] = ALL, notes: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        options=ServeOptions(Path(), str(checkpoint)),
        models=models,
        notes=notes,
        device="cpu",
        address="127.0.0.1",
        http_url="127.0.0.1:8000",
        grpc_url="127.0.0.1:8001",
        metrics_port=8002,
        gateway_port=None,
        log_file="/log",
    )


def test_gives_the_server_every_option_and_leaves_the_rest_to_the_environment() -> None:
    words = [
        "--checkpoint",
        "a",
        "--models",
        "embed_image, fit_teams,",
        "--http-port",
        "1",
        "--shared-memory",
    ]
    words += ["--gateway-projection", "p.npz"]
    words += ["--max-rows", "5", "--dtype", "float32", "--teams-checkpoint", "b", "--log-file", "/log"]
    options = _serve_options(_parser().parse_args(words))
    assert options.checkpoint == "a"
    assert options.models == ("embed_image", "fit_teams")
    assert (options.http_port, options.grpc_port, options.metrics_port) == (1, 8001, 8002)
    assert (options.host, options.device, options.shared_memory) == ("127.0.0.1", "auto", True)
    assert options.gateway_projection == Path("p.npz")
    assert (options.log_file, options.model_repository) == (Path("/log"), Path("model_repository"))
    assert options.settings == {"dtype": "float32", "max_rows": "5", "teams_checkpoint": "b"}


def test_takes_the_checkpoint_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLIP_SERVE_CHECKPOINT", "c")
    assert _serve_options(_parser().parse_args([])).checkpoint == "c"
    assert _serve_options(_parser().parse_args(["--checkpoint", "a"])).checkpoint == "a"


def test_refuses_to_start_without_a_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main([]) == 1
    expected = "siglip-serve: name a checkpoint with --checkpoint or the variable SIGLIP_SERVE_CHECKPOINT\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "option", ["--tower", "--checkpoint-name", "--checkpoint-revision", "--checkpoint-note"]
)
def test_refuses_settings_that_only_the_launcher_sets(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["--checkpoint", "a", option, "teams"])
    assert f"unrecognized arguments: {option} teams" in capsys.readouterr().err


def test_help_shows_each_default_once() -> None:
    text = re.sub(r"\s+", " ", _parser().format_help())
    assert "(default: )" not in text
    assert not re.search(r"\(default: [^)]*\) \(default", text)
    for name, value in vars(load_settings({}, {"checkpoint": "a"})).items():
        if Settings.__dataclass_fields__[name].metadata and name != "checkpoint":
            part = text[text.index(f" --{name.replace('_', '-')} ", text.index("checkpoints:")) :]
            own = re.match(r" --.*?\(default: ([^)]*)\)", part)
            if value != "":
                assert own is not None, name
                assert own[1] == str(value), name


def test_example_classifies_a_sample_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = (
        "Try it in another terminal:\n"
        f"  siglip-serve classify {TINY}/samples/automobile.jpg --url 127.0.0.1:8001 \\\n"
        "    --label automobile --label dog --label elephant\n"
    )
    assert _example(server(TINY), "") == expected


def test_example_classifies_the_given_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY)
    text = _example(server(tmp_path), str(TINY / "samples" / "dog.jpg"))
    assert " classify samples/dog.jpg --url" in text
    assert " --label dog --label automobile --label elephant\n" in text
    text = _example(server(TINY), "my pictures/1.jpg")
    assert " classify 'my pictures/1.jpg' --url" in text
    assert " --label dog --label cat --label car\n" in text


def test_example_without_a_sample_has_a_placeholder(tmp_path: Path) -> None:
    assert _example(server(tmp_path), "") == (
        "Try it in another terminal, with an image of your own in place of IMAGE.jpg:\n"
        "  siglip-serve classify IMAGE.jpg --url 127.0.0.1:8001 \\\n"
        "    --label dog --label cat --label car\n"
    )


def test_example_names_only_models_that_are_served() -> None:
    assert _example(server(TINY, ("embed_image",)), "").endswith(
        "  siglip-serve health --url 127.0.0.1:8001\n"
    )
    assert _example(server(TINY, ("embed_text",)), "") == ""


def test_example_names_the_command_as_the_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(tmp_path)
    assert _command_name() == "siglip-serve"  # not installed next to this Python
    script = folder / "siglip-serve"
    script.touch(mode=0o755)
    assert _command_name() == "siglip-serve"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _command_name() == "bin/siglip-serve"
    monkeypatch.chdir(Path(__file__).parent)
    assert _command_name() == str(script)


def test_announcement_prints_each_note_in_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    _announce(server(TINY, notes=("a knows drawings only", "b is narrow")), 9.87, "")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "siglip-serve: note: a knows drawings only",
        "siglip-serve: note: b is narrow",
        "siglip-serve: ready after 9.9 s on cpu",
    ]
    assert lines[-1] == "Ctrl-C stops it."


@pytest.mark.parametrize(
    ("host", "direct", "warns"),
    [
        ("0.0.0.0", True, True),
        ("127.0.0.1", True, False),
        ("localhost", True, False),
        ("0.0.0.0", False, False),
    ],
)
def test_warns_of_a_triton_that_other_hosts_reach_without_a_door(
    host: str, direct: bool, warns: bool
) -> None:
    notes = " ".join(command._unprotected(ServeOptions(Path(), "checkpoint", host=host, direct_http=direct)))
    assert ("gzip" in notes and "nested JSON" in notes) == warns
    assert bool(notes) == warns


def test_announcement_names_the_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    running = server(TINY)
    _announce(running, 1, "")
    assert "gateway" not in capsys.readouterr().out
    running.gateway_port = 8085
    _announce(running, 1, "")
    printed = capsys.readouterr().out
    assert "  gateway  http://127.0.0.1:8085 " in printed
    assert "  page     http://127.0.0.1:8085/\n" in printed


def test_the_gateway_has_the_next_free_port_if_its_own_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", "a"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        monkeypatch.setattr(command, "_GATEWAY_PORT", port)
        found = _serve_options(_parser().parse_args(words)).gateway_port
        assert found is not None
        assert found > port
        assert capsys.readouterr().out == (
            f"siglip-serve: note: port {port} is taken, so the gateway has port {found}\n"
        )
        # A port that is asked for is not replaced, and neither are those of the other protocols used.
        asked = _serve_options(_parser().parse_args([*words, "--gateway-port", str(port)]))
        assert asked.gateway_port == port
        other = _serve_options(_parser().parse_args([*words, "--http-port", str(found)])).gateway_port
        assert other not in (None, port, found)


def test_the_gateway_is_left_out_on_request_and_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", "a"]
    assert _serve_options(_parser().parse_args([*words, "--no-gateway"])).gateway_port is None
    with pytest.raises(SettingsError, match="belong to the gateway"):
        _serve_options(_parser().parse_args([*words, "--no-gateway", "--search", "a.npz"]))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "fastapi" else object())
    assert _serve_options(_parser().parse_args(words)).gateway_port is None
    assert "no gateway, because fastapi is not installed" in capsys.readouterr().out

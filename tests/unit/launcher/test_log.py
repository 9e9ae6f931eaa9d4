"""The server's log: its file, and the cause of a failed start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.log import Journal, asked_to_end, cause, loading, open_log, read, tail

OF_A_MODEL = (
    "E1128 model.cc:1] failed to load 'a': TritonModelException: siglip-serve cannot start: mis-shaped:"
    "\\n  one\\n  two\\n\\nAt:\\n  model.py(1): initialize\n"
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_cause_is_the_models_message_once(log: Path) -> None:
    again = OF_A_MODEL.replace("'a'", "'b'")
    log.write_text(f"I1128 ready\n{OF_A_MODEL}{again}E1128 server.cc:1] failed to start\n")
    assert cause(log) == "mis-shaped:\n  one\n  two"


def test_cause_is_otherwise_tritons_errors(log: Path) -> None:
    log.write_text("I1128 ready\nE1128 server.cc:1] failed to start HTTP\nerror: creating server\n")
    assert cause(log).splitlines() == [
        "tritonserver ended during startup:",
        "E1128 server.cc:1] failed to start HTTP",
        "error: creating server",
        f"the whole log: {log}",
    ]
    log.write_text("".join(f"E1128 a] failed {number}\n" for number in range(9)))
    assert "failed 7" in cause(log)
    assert "failed 8" not in cause(log)


def test_cause_is_otherwise_the_end_of_the_log(log: Path) -> None:
    log.write_text("I1128 one\nI1128 two\n")
    assert cause(log) == f"tritonserver ended during startup\nthe last lines of {log}:\nI1128 one\nI1128 two"


def test_tail_quotes_the_last_lines(log: Path) -> None:
    log.write_bytes(b"one\ntwo\nthr\xffee\n")
    assert tail(log, 2) == f"the last lines of {log}:\ntwo\nthr\ufffdee"


def test_opens_an_empty_log_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    log = open_log(None, 8000)
    assert log == tmp_path / "siglip-serve" / "8000.log"
    log.write_text("of an earlier run")
    assert open_log(None, 8000).read_bytes() == b""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_log(None, 1) == tmp_path / ".local" / "state" / "siglip-serve" / "1.log"


def test_refuses_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ServerStartError, match=r"^log file .*/file/log: .*; choose another one with --log-file$"
    ):
        open_log(tmp_path / "file" / "log", 8000)


def test_a_log_that_is_a_device_reads_as_empty() -> None:
    """Such a one has no end."""
    device = Path("/dev/full")
    assert read(device) == ""
    assert cause(device) == "tritonserver ended during startup\nthe last lines of /dev/full:"


def test_reads_the_end_of_a_large_log(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siglip_serve.launcher.log._MOST_BYTES", 4)
    log.write_text("0123456789")
    assert read(log) == "6789"
    assert read(log, 8) == "89"
    assert read(log / "nowhere") == ""


def test_names_the_models_that_are_loading(log: Path) -> None:
    begun = 'TRITONBACKEND_ModelInstanceInitialize: {}_0_1 (CPU device 0)"\n'
    log.write_text(begun.format("a") + begun.format("b_c"))
    start = log.stat().st_size
    with log.open("a") as file:
        file.write(begun.format("b") + begun.format("b_c") + "successfully loaded 'b'\n")
    assert loading(log, start, ["a", "b", "b_c"]) == ["b_c"]


def test_finds_out_that_a_server_was_asked_to_end(log: Path) -> None:
    log.write_text("I1128 ready\nSignal (6) received.\nSignal (11) received.\n")
    assert not asked_to_end(log, 0)
    log.write_text("I1128 ready\nSignal (15) received.\n")
    assert asked_to_end(log, 0)
    assert asked_to_end(log, log.stat().st_size) is False
    assert asked_to_end(Path("/dev/full"), 0) is None
    assert asked_to_end(log.with_name("gone"), 0) is None


def test_journal_writes_to_the_log_and_to_standard_error(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(log)
    journal.say("one")
    journal.say("two")
    assert log.read_text() == capsys.readouterr().err == "siglip-serve: one\nsiglip-serve: two\n"


@pytest.mark.parametrize("unwritable", ["/dev/full", "/proc/nowhere/log"])
def test_journal_survives_a_full_disk_and_no_standard_error(
    unwritable: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(Path(unwritable)).say("lost")
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - closed below, which fails
    closed = (log.parent / "closed").open("w", encoding="utf-8")
    closed.close()
    for stream in (None, closed, full):
        monkeypatch.setattr(sys, "stderr", stream)
        Journal(log).say("kept")
    with pytest.raises(OSError, match="No space left"):
        full.close()
    assert log.read_text() == "siglip-serve: kept\n" * 3

"""A start that hangs, dies or is refused, with small processes in place of the server."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from siglip_serve.errors import START_REFUSED, ServerStartError
from siglip_serve.launcher import progress
from siglip_serve.launcher.endpoint import Endpoint
from siglip_serve.launcher.start import Start, UnluckyStartError

MODELS = ["embed_image", "siglip_vision_model", "siglip_vision_process"]
BEGUN = '"TRITONBACKEND_ModelInstanceInitialize: {}_0_1 (CPU device 0)"\n'


class FakeEndpoint(Endpoint):
    def __init__(self, ready: bool = False, infer: Callable[[], None] = lambda: None) -> None:
        super().__init__("127.0.0.1:1")
        self.ready, self.infer = ready, infer

    def is_ready(self) -> bool:
        return self.ready

    def embed_image(self) -> None:
        self.infer()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "log"
    file.write_text("of an earlier start: successfully loaded 'siglip_vision_model'\n")
    return file


@pytest.fixture
def start(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Start]]:
    monkeypatch.setattr(progress, "_PAUSE", 0.05)
    made = []

    def make(command: str, endpoint: FakeEndpoint | None = None, timeout: float = 20.0) -> Start:
        made.append(subprocess.Popen(["sh", "-c", command]))
        size = log.stat().st_size
        return Start(made[-1], endpoint or FakeEndpoint(), MODELS, log, size, timeout, stalled_after=0.5)

    yield make
    for process in made:
        process.kill()
        process.wait()


def refused(start: Start, kind: type[ServerStartError]) -> str:
    with pytest.raises(ServerStartError) as caught:
        start.wait_until_served(lambda: True)
    assert type(caught.value) is kind
    return str(caught.value)


def test_names_the_model_that_hangs(start: Callable[..., Start], log: Path) -> None:
    hanging = start("exec sleep 60")
    with log.open("a") as file:
        file.write(BEGUN.format("siglip_vision_model") + BEGUN.format("siglip_vision_process"))
        file.write("successfully loaded 'siglip_vision_process'\n")
    message = refused(hanging, UnluckyStartError)
    assert message == "model siglip_vision_model made no progress for 0 s"


def test_names_tritonserver_if_no_model_was_loading(start: Callable[..., Start]) -> None:
    assert refused(start("exec sleep 60"), UnluckyStartError).startswith("tritonserver made no progress")


def test_watches_the_first_inference(start: Callable[..., Start]) -> None:
    def hangs() -> None:
        threading.Event().wait(10)

    endpoint = FakeEndpoint(True, hangs)
    assert "made no progress" in refused(start("exec sleep 60", endpoint), UnluckyStartError)


def test_another_attempt_may_help_where_the_first_inference_failed(start: Callable[..., Start]) -> None:
    def fails() -> None:
        raise ServerStartError("the first inference failed: not healthy")

    message = refused(start("exec sleep 60", FakeEndpoint(True, fails)), UnluckyStartError)
    assert message.startswith("the first inference failed: not healthy\nthe last lines of")


@pytest.mark.parametrize(
    ("said", "command", "kind"),
    [
        ("E1 failed to load: Stub process 'a' is not healthy.", "exit 1", UnluckyStartError),
        ("", "kill -SEGV $$", UnluckyStartError),
        ("E1 failed to bind the port", "exit 1", ServerStartError),
        (f"{START_REFUSED}int8 lacks nncf", "kill -SEGV $$", ServerStartError),
    ],
)
def test_tells_bad_luck_from_a_lasting_reason(
    said: str, command: str, kind: type[ServerStartError], start: Callable[..., Start], log: Path
) -> None:
    ending = start(f"sleep 0.2; {command}")
    with log.open("a") as file:
        file.write(said + "\n")
    refused(ending, kind)


def test_names_the_model_that_did_not_load(start: Callable[..., Start], log: Path) -> None:
    ending = start("sleep 0.2; exit 1")
    with log.open("a") as file:
        file.write(BEGUN.format("siglip_vision_model") + "E1 failed: Stub process is not healthy.\n")
    expected = "siglip_vision_model did not load: tritonserver ended during startup"
    assert refused(ending, UnluckyStartError).startswith(expected)


def test_ends_when_it_takes_too_long_or_is_not_wanted(start: Callable[..., Start]) -> None:
    assert refused(start("exec sleep 60", timeout=0.1), ServerStartError).startswith("not ready after 0 s")
    with pytest.raises(ServerStartError, match="the server was stopped"):
        start("exec sleep 60").wait_until_served(lambda: False)


def test_is_served_after_an_inference(start: Callable[..., Start]) -> None:
    start("exec sleep 60", FakeEndpoint(True)).wait_until_served(lambda: True)

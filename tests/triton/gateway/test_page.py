"""The page in a browser without a window, before a real gateway and a real Triton."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, Page, browser
from gateways import gateway_process
from siglip_serve_client import Client
from wire import ROOT, TINY

from siglip_serve.launcher import TritonServer

SAMPLES = TINY / "samples"
TABS = ("classify", "heatmap", "teams", "search", "embed")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(chrome: Browser, gateway_url: str) -> Iterator[Page]:
    """The page, opened. No error may reach the console, and no request another host."""
    with chrome.page() as opened:
        opened.open(gateway_url)
        ready(opened)
        yield opened
        opened.listen()
        assert opened.problems == []
        assert all(url.startswith((f"{gateway_url}/", "blob:", "data:")) for url in opened.requests)


@pytest.fixture(scope="module")
def triton(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


def ready(page: Page) -> None:
    page.wait("document.getElementById('checkpoint').dataset.state !== 'waiting'")


def show(page: Page, tab: str) -> None:
    page.click(f"#tab-{tab}")
    assert not page.evaluate(f"document.getElementById('{tab}').hidden")


def text(page: Page, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def result(page: Page, tab: str, turn: str = "true") -> None:
    """Wait until a panel shows a result."""
    shown = f"!document.querySelector('#{tab} [data-part=result]').hidden"
    idle = f"!document.querySelector('#{tab} [data-part=run]').hasAttribute('aria-busy')"
    page.wait(f"{shown} && {idle} && ({turn})")


def error(page: Page, tab: str) -> str:
    """Wait until a panel shows an error, and return it."""
    page.wait(f"!document.querySelector('#{tab} [data-part=error]').hidden")
    assert page.evaluate(f"document.querySelector('#{tab} [data-part=result]').hidden")
    return text(page, f"#{tab} [data-part=error]")


def request_as(page: Page, tab: str, language: str) -> str:
    """The request of a panel as code."""
    page.evaluate(
        f"[...document.querySelectorAll('#{tab} .code [role=tab]')]"
        f".find((tab) => tab.textContent === '{language}').click()"
    )
    return text(page, f"#{tab} .code code")


def run_code(command: list[str], code: str, folder: Path = ROOT) -> str:
    """The output of a program."""
    done = subprocess.run(
        [*command, code], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


def test_it_names_the_checkpoint_and_what_that_knows(page: Page, triton: Client) -> None:
    assert text(page, "#checkpoint-name") == triton.describe()["checkpoint_name"]
    assert text(page, "#checkpoint-facts") == f"{triton.check_health()} dimensions"
    page.wait("!document.getElementById('note').hidden")
    assert "knows drawings only" in text(page, "#note-text")


def test_a_sample_is_classified(page: Page, triton: Client) -> None:
    assert "Choose a picture" in text(page, "#classify [data-part=empty]")
    page.click("#classify .sample[data-name='dog.jpg']")
    result(page, "classify")
    rows = page.evaluate(
        "[...document.querySelectorAll('#classify .bars li')]"
        ".map((row) => [...row.children].slice(0, 2).map((part) => part.textContent))"
    )
    labels = text(page, "#classify [data-part=labels]").split()
    expected = triton.classify(SAMPLES / "dog.jpg", labels, softmax=True)
    order = np.argsort(-expected)
    assert [label for label, _ in rows] == [labels[index] for index in order]
    assert rows[0] == ["dog", f"{100 * expected.max():.1f} %"]
    assert "dog is the most probable" in text(page, "#announcer")


def test_a_file_is_sent_as_it_is(page: Page, triton: Client) -> None:
    page.choose_files("#classify [data-part=file]", [SAMPLES / "rocket.png"])
    result(page, "classify")
    assert "rocket.png" in text(page, "#classify [data-part=name]")
    page.fill("#classify [data-part=labels]", "rocket\nsunflower")
    page.evaluate("document.querySelector('[name=classify-softmax][value=false]').click()")
    first = "document.querySelector('#classify .bar-label').textContent === 'rocket'"
    result(page, "classify", first)
    expected = triton.classify(SAMPLES / "rocket.png", ["rocket", "sunflower"], softmax=False)
    assert text(page, "#classify .bar-value") == f"{100 * expected[0]:.1f} %"


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_the_request_as_code_gives_the_same_answer(page: Page, triton: Client, language: str) -> None:
    """Labels with quotes of every kind, and a key word of Python."""
    labels = ["dog", "a 'cat'", 'so-called "true" \\ pizza', "100 % null", "Übergröße 🦒"]
    page.fill("#classify [data-part=labels]", "\n".join(labels))
    page.click("#classify .sample[data-name='dog.jpg']")
    result(page, "classify")
    command = {
        "curl": ["bash", "-euo", "pipefail", "-c"],
        "Python": [sys.executable, "-c"],
        "JavaScript": ["node", "--input-type=module", "-e"],
    }[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    printed = run_code(command, request_as(page, "classify", language))
    expected = triton.classify(SAMPLES / "dog.jpg", labels, softmax=True)
    found = re.search(r"probabilities'?\"?: ?\[([^\]]+)\]", printed)
    assert found is not None, printed
    np.testing.assert_allclose([float(word) for word in found[1].split(",")], expected, rtol=1e-6)


def test_errors_of_the_server_are_shown(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture at all")
    page.choose_files("#classify [data-part=file]", [broken])
    message = error(page, "classify")
    assert message.startswith("The server answered 400")
    assert "image" in message
    # Chromium logs each failed request, which is no fault of the page.
    page.listen()
    page.problems = [problem for problem in page.problems if "status of 400" not in problem]
    page.click("#classify .sample[data-name='dog.jpg']")
    result(page, "classify")
    assert page.evaluate("document.querySelector('#classify [data-part=error]').hidden")


def test_missing_inputs_are_named(page: Page) -> None:
    page.click("#classify [data-part=run]")
    assert "Choose a picture first" in error(page, "classify")
    page.fill("#classify [data-part=labels]", "\n")
    page.click("#classify .sample[data-name='dog.jpg']")
    page.wait(
        "document.querySelector('#classify [data-part=error]').textContent.includes('at least one label')"
    )


def test_dropped_and_pasted_pictures_are_taken(page: Page) -> None:
    """Events that carry a file, as a browser makes them when a user drops or pastes."""
    make = (
        "const blob = await (await fetch('/page/samples/{0}')).blob();"
        "const data = new DataTransfer(); data.items.add(new File([blob], '{0}', {{type: blob.type}}));"
    )
    page.evaluate(
        f"(async () => {{ {make.format('pizza.jpg')} document.querySelector('#classify [data-part=drop]')"
        ".dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})); })()"
    )
    result(page, "classify", "document.querySelector('#classify .bar-label').textContent === 'pizza'")
    page.evaluate(
        f"(async () => {{ {make.format('guitar.jpg')} document.body"
        ".dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true})); })()"
    )
    result(page, "classify", "document.querySelector('#classify .bar-label').textContent === 'guitar'")


def test_vectors_and_their_cosine(page: Page, triton: Client) -> None:
    show(page, "embed")
    page.choose_files("#embed [data-part=a] [data-part=file]", [SAMPLES / "dog.jpg"])
    result(page, "embed")
    dog = triton.embed_image(SAMPLES / "dog.jpg", True)
    shown = text(page, "#embed .numbers").split()
    assert shown[:8] == [f"{value:.4f}" for value in dog[:8]]
    assert f"{len(dog)} values, length 1.000" in text(page, "#embed .facts")
    page.click("#embed [data-part=b] [name=embed-b][value=text] ")
    page.fill("#embed [data-part=b] [data-part=text]", "a photo of a dog, drawn")
    result(page, "embed", "!document.querySelector('#embed [data-part=cosine]').hidden")
    expected = float(dog @ triton.embed_text("a photo of a dog, drawn", True))
    assert text(page, "#embed [data-part=cosine-value]") == f"{expected:.3f}"
    printed = run_code([sys.executable, "-c"], request_as(page, "embed", "Python"), SAMPLES)
    assert printed.count("'embedding'") >= 2


def test_tabs_are_worked_with_the_keyboard(page: Page) -> None:
    page.evaluate("document.getElementById('tab-classify').focus()")
    tabs = page.evaluate("[...document.querySelectorAll('#tabs [role=tab]')].map((tab) => tab.id)")
    for key, expected in (
        ("ArrowRight", tabs[1]),
        ("ArrowLeft", tabs[0]),
        ("ArrowLeft", tabs[-1]),
        ("Home", tabs[0]),
        ("End", tabs[-1]),
    ):
        page.press(key)
        assert page.evaluate("document.activeElement.id") == expected
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
        shown = page.evaluate(
            "[...document.querySelectorAll('.panel:not([hidden])')].map((panel) => panel.id)"
        )
        assert shown == [expected.removeprefix("tab-")]
    assert page.evaluate("location.hash") == f"#{tabs[-1].removeprefix('tab-')}"


def test_a_picture_is_classified_with_the_keyboard_alone(page: Page) -> None:
    """From the top of the page, Tab reaches the first sample, and Space chooses it."""
    page.evaluate("document.activeElement.blur()")
    for _ in range(20):
        page.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('sample')"):
            break
    assert page.evaluate("document.activeElement.matches('#classify .sample:focus-visible')")
    page.press("Space")
    result(page, "classify")


def test_dark_and_light(page: Page, gateway_url: str) -> None:
    def background() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    page.prefer("light")
    assert background() > 600
    page.prefer("dark")
    assert background() < 100
    page.click("#theme-button")
    assert background() > 600
    page.open(gateway_url)
    ready(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert background() > 600


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_scrolls_in_one_direction(page: Page, width: int) -> None:
    page.window(width, 844, 2.0, mobile=True)
    page.click("#classify .sample[data-name='dog.jpg']")
    result(page, "classify")
    for tab in page.evaluate("[...document.querySelectorAll('#tabs [role=tab]')].map((tab) => tab.id)"):
        page.evaluate(f"document.getElementById('{tab}').click()")
        assert page.evaluate("document.documentElement.scrollWidth") == width, tab
    assert page.evaluate("getComputedStyle(document.querySelector('#classify .camera')).display") != "none"
    assert (
        page.evaluate("document.querySelector('#classify [data-part=camera]').getAttribute('capture')")
        == "environment"
    )


def test_a_key_is_asked_for_and_kept(chrome: Browser, server: TritonServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n", encoding="utf-8")
    with gateway_process(server.grpc_url, "--api-key-file", str(keys)) as url, chrome.page() as page:
        page.open(url)
        page.wait("document.getElementById('key-dialog').open")
        assert "needs a key" in text(page, "#key-problem")
        page.fill("#key-field", "wrong")
        page.press("Enter")
        page.wait("document.getElementById('key-problem').textContent.includes('refuses this key')")
        page.fill("#key-field", "right")
        page.press("Enter")
        page.wait("!document.getElementById('note').hidden")
        page.click("#classify .sample[data-name='dog.jpg']")
        result(page, "classify")
        code = request_as(page, "classify", "curl")
        assert "$SIGLIP_KEY" in code
        assert "right" not in code
        assert page.evaluate("Object.values(localStorage).join()") == ""
        assert page.evaluate("sessionStorage.length") == 1

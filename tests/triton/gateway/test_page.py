"""The page in a browser without a window, before a real gateway and a real Triton."""

from __future__ import annotations

import ast
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
from PIL import Image
from players import CROPS, TRACKS
from players import FRAME as PLAYERS
from siglip_serve_client import Client
from wire import ROOT, TINY

from siglip_gateway.page.routes import FOLDER
from siglip_serve.launcher import TritonServer

SAMPLES = TINY / "samples"


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
    code = request_as(page, "classify", language)
    shown = "console.log(await answer.json())"
    assert (shown in code) is (language == "JavaScript")
    printed = run_code(command, code.replace(shown, "console.log(JSON.stringify(await answer.json()))"))
    answer = ast.literal_eval(printed) if language == "Python" else json.loads(printed)
    assert answer["labels"] == labels
    expected = triton.classify(SAMPLES / "dog.jpg", labels, softmax=True)
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=1e-6)


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


def test_a_heatmap_of_a_sample(page: Page, triton: Client) -> None:
    show(page, "heatmap")
    assert "Each prompt gets a map" in text(page, "#heatmap [data-part=empty]")
    page.click("#heatmap .sample[data-name='scene.jpg']")
    result(page, "heatmap")
    prompts = text(page, "#heatmap [data-part=prompts]").split()
    expected = triton.explain(SAMPLES / "scene.jpg", prompts)
    scores = page.evaluate("[...document.querySelectorAll('.prompt-score')].map((part) => part.textContent)")
    assert scores == [f"{score:.3f}" for score in expected.scores]
    assert text(page, "#heatmap [data-part=prompt]") == "elephant"
    limit = np.abs(expected.heatmaps).max()
    assert float(text(page, "#heatmap [data-part=most]")) == pytest.approx(limit, rel=0.05)
    # Colours where the prompt's own object is strongest, and the guitar's: red, and not red.
    for row, colour in ((0, "red"), (1, "blue")):
        y, x = np.unravel_index(expected.heatmaps[row].argmax(), expected.heatmaps[row].shape)
        assert warm(page, int(x), int(y)) is (colour == "red")
    page.click("#heatmap .prompts li:nth-child(2) .prompt")
    assert text(page, "#heatmap [data-part=prompt]") == "guitar"
    assert warm(page, int(x), int(y))


def warm(page: Page, x: int, y: int) -> bool:
    """The map's colour at a pixel has more red than blue."""
    # Read from a copy: Chromium warns of a canvas that is painted and read.
    red, _, blue, _ = page.evaluate(
        "(() => { const copy = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
        f" copy.drawImage(document.querySelector('#heatmap [data-part=map]'), -{x}, -{y});"
        " return [...copy.getImageData(0, 0, 1, 1).data]; })()"
    )
    return bool(red > blue)


def test_opacity_and_scale_need_no_request(page: Page, triton: Client) -> None:
    show(page, "heatmap")
    page.click("#heatmap .sample[data-name='scene.jpg']")
    result(page, "heatmap")
    page.listen()
    asked = len(page.requests)
    page.evaluate("document.querySelector('#heatmap [data-part=opacity]').focus()")
    page.press("End")
    assert page.evaluate("document.querySelector('#heatmap [data-part=map]').style.opacity") == "1"
    page.press("Home")
    assert page.evaluate("document.querySelector('#heatmap [data-part=map]').style.opacity") == "0"
    page.evaluate("document.querySelector('[name=heatmap-scale][value=each]').click()")
    expected = np.abs(
        triton.explain(SAMPLES / "scene.jpg", ["elephant", "guitar", "pizza"]).heatmaps[0]
    ).max()
    assert float(text(page, "#heatmap [data-part=most]")) == pytest.approx(expected, rel=0.05)
    page.listen()
    assert len(page.requests) == asked


def test_absolute_maps_have_no_background(page: Page, triton: Client) -> None:
    show(page, "heatmap")
    page.evaluate("document.querySelector('[name=heatmap-mode][value=absolute]').click()")
    assert page.evaluate("document.querySelector('#heatmap [data-part=background-field]').hidden")
    page.fill("#heatmap [data-part=prompts]", "pizza")
    page.click("#heatmap .sample[data-name='pizza.jpg']")
    result(page, "heatmap")
    expected = triton.explain(SAMPLES / "pizza.jpg", ["pizza"], mode="absolute")
    assert text(page, "#heatmap .prompt-score") == f"{expected.scores[0]:.3f}"
    assert float(text(page, "#heatmap [data-part=most]")) == pytest.approx(
        np.abs(expected.heatmaps).max(), rel=0.05
    )
    printed = run_code([sys.executable, "-c"], request_as(page, "heatmap", "Python"))
    assert "'heatmaps'" in printed


def test_the_sample_match_has_two_teams_and_outliers(page: Page, triton: Client) -> None:
    show(page, "teams")
    page.click("#teams [data-part=sample]")
    result(page, "teams")
    match = FOLDER / "samples" / "match.jpg"
    boxes = json.loads(match.with_suffix(".json").read_text(encoding="utf-8"))
    expected = triton.fit_teams(frame=match, boxes=boxes)
    outliers = expected.outlier_score > 2
    counts = [int(((expected.labels == team) & ~outliers).sum()) for team in (0, 1)]
    assert groups(page) == {"Team 1": counts[0], "Team 2": counts[1], "Outliers": int(outliers.sum())}
    assert 0 < outliers.sum() < 8
    assert text(page, "#teams [data-part=words]").startswith("OK")
    drawn = page.evaluate(
        "[...document.querySelectorAll('#teams .stage rect')].map((box) => box.className.baseVal)"
    )
    teams = [
        "outlier" if far else f"team-{label}" for label, far in zip(expected.labels, outliers, strict=True)
    ]
    assert drawn == teams
    # All but the most typical players are outliers at the slider's lowest place.
    page.evaluate("document.querySelector('#teams [data-part=outliers]').focus()")
    page.press("Home")
    assert groups(page)["Outliers"] == int((expected.outlier_score > 1).sum())


def groups(page: Page) -> dict[str, int]:
    """The number of players by the name of their group."""
    found: dict[str, int] = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#teams .group')]"
        ".map((group) => [group.getAttribute('aria-label'), group.querySelectorAll('li').length]))"
    )
    return found


def test_a_folder_of_crops_with_tracks(page: Page, triton: Client, tmp_path: Path) -> None:
    """Natural order of the names, tracks by the pattern, then teams by the state of the first fit."""
    paths = []
    for number, (crop, track) in enumerate(zip(CROPS, TRACKS, strict=True)):
        paths.append(tmp_path / f"{number}_track{track}.png")
        crop.save(paths[-1])
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    show(page, "teams")
    page.choose_files("#teams [data-part=files]", [tmp_path / "notes.txt", *reversed(paths)])
    result(page, "teams")
    expected = triton.fit_teams(crops=paths, track_ids=TRACKS)
    assert f"{len(paths)} crops, {len(set(TRACKS))} tracks" in text(page, "#teams [data-part=crops-message]")
    page.evaluate("document.querySelector('#teams [data-part=outliers]').value = 6")
    page.evaluate("document.querySelector('#teams [data-part=outliers]').dispatchEvent(new Event('input'))")
    far = expected.outlier_score > 6
    found = groups(page)
    assert [found[f"Team {team + 1}"] for team in (0, 1)] == [
        int(((expected.labels == team) & ~far).sum()) for team in (0, 1)
    ]
    name = page.evaluate("document.querySelector('#teams .players li').title")
    assert re.fullmatch(r"\d+_track\d+\.png, track \d+, margin [01]\.\d\d, outlier score \d+\.\d", name)
    page.click("#teams [data-part=keep]")
    page.choose_files("#teams [data-part=files]", paths[:10])
    result(page, "teams", "document.querySelectorAll('#teams .players li').length === 10")
    labels = triton.classify_teams(crops=paths[:10], state=expected.state).labels
    assert groups(page)["Team 1"] == int((labels == 0).sum())
    assert '"state":' in request_as(page, "teams", "curl")


def test_boxes_are_drawn_with_the_mouse(page: Page, tmp_path: Path) -> None:
    frame = tmp_path / "frame.png"
    Image.fromarray(PLAYERS).save(frame)
    show(page, "teams")
    page.evaluate("document.querySelector('[name=teams-kind][value=frame]').click()")
    page.choose_files("#teams [data-part=as-frame] [data-part=file]", [frame])
    page.wait("document.querySelector('#teams [data-part=frame-image]').naturalWidth > 0")
    page.click("#teams [data-part=frame-draw]")
    left, top, width, height = page.evaluate(
        "(() => { const box = document.querySelector('#teams .stage').getBoundingClientRect();"
        " return [box.x, box.y, box.width, box.height]; })()"
    )
    page.drag((left + width / 4, top + height / 4), (left + width / 2, top + height / 2))
    (box,) = page.wait("JSON.parse(document.querySelector('#teams [data-part=boxes]').value || 'null')")
    shape = PLAYERS.shape
    expected = (shape[1] / 4, shape[0] / 4, shape[1] / 2, shape[0] / 2)
    np.testing.assert_allclose(box, expected, atol=shape[1] / width + 1)
    page.click("#teams [data-part=run]")
    assert "boxes" in error(page, "teams") or "crops" in error(page, "teams")
    page.listen()
    page.problems = [problem for problem in page.problems if "status of 400" not in problem]
    page.fill("#teams [data-part=boxes]", "[[1, 2, 3]]")
    assert "Box 0" in text(page, "#teams [data-part=boxes-message]")
    page.click("#teams [data-part=frame-clear]")
    assert text(page, "#teams [data-part=frame-count]") == "0 boxes"


def test_the_search_says_how_to_start(page: Page) -> None:
    show(page, "search")
    page.wait("!document.querySelector('#search [data-part=none]').hidden")
    assert "--search" in text(page, "#search [data-part=none]")
    assert page.evaluate("document.querySelector('#search [data-part=some]').hidden")


def test_a_collection_is_searched(
    chrome: Browser, server: TritonServer, triton: Client, tmp_path: Path
) -> None:
    index = tmp_path / "samples.npz"
    command = [str(Path(sys.executable).with_name("siglip-serve")), "embed", "--url", server.grpc_url]
    subprocess.run([*command, str(SAMPLES), "-o", str(index)], check=True, capture_output=True, timeout=120)
    options = ("--search", str(index), "--search-images", str(SAMPLES))
    with gateway_process(server.grpc_url, *options) as url, chrome.page() as page:
        page.open(f"{url}/#search")
        ready(page)
        page.wait("!document.querySelector('#search [data-part=some]').hidden")
        count = len(list(SAMPLES.iterdir()))
        assert f"{count} vectors of" in text(page, "#search [data-part=collection]")
        page.fill("#search [data-part=text]", "a penguin")
        page.press("Enter")
        result(page, "search")
        assert text(page, "#search .hit-name").endswith("penguin.png")
        score = triton.embed_text("a penguin", True) @ triton.embed_image(SAMPLES / "penguin.png", True)
        assert float(text(page, "#search .hit-score")) == pytest.approx(float(score), abs=0.0006)
        page.wait(f"document.querySelectorAll('#search .hit img').length === {count}")
        page.wait(
            "[...document.querySelectorAll('#search .hit img')].every((image) => image.naturalWidth > 0)"
        )
        page.evaluate("document.querySelector('[name=search-kind][value=picture]').click()")
        page.click("#search .sample[data-name='dog.jpg']")
        result(page, "search", "document.querySelector('#search .hit-name').textContent.endsWith('dog.jpg')")
        page.listen()
        assert page.problems == []


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

"""Chromium without a window, driven over its DevTools protocol through a pair of pipes.

The protocol is JSON with a zero byte after each message, so this needs no package and no port.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paths import ROOT
from programs import PROGRAM_PATH

__all__ = ["Page", "browser", "chromium"]

_NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
_TOOLS = ROOT / ".tools"
_PATIENCE = 60.0  # seconds until a condition that never holds fails a test
_FLAGS = (
    "--headless",
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-proxy-server",
)
_KEYS = {
    "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38,
    "End": 35, "Enter": 13, "Escape": 27, "Home": 36, "Space": 32, "Tab": 9,
}  # fmt: skip


def chromium() -> tuple[str, Mapping[str, str]]:
    """The path of Chromium and its environment; the test is skipped where it is missing."""
    unpacked = _TOOLS / "usr/lib/chromium/chromium-headless-shell"
    for name in _NAMES:
        found = shutil.which(name, path=PROGRAM_PATH)
        if found is not None and not Path(found).is_relative_to(_TOOLS):
            return found, os.environ
    if not unpacked.is_file():
        import pytest  # here, because programs that are no tests use this module too

        pytest.skip("chromium is not installed: install it, or run `make tools`")
    # The libraries that the system lacks are unpacked beside it.
    folder = _TOOLS / "usr/lib/x86_64-linux-gnu"
    libraries = os.pathsep.join((str(folder), str(folder / "pulseaudio")))
    return str(unpacked), {**os.environ, "LD_LIBRARY_PATH": libraries}


class Page:
    """A page of the browser, with what it said and asked.

    Attributes:
        problems: errors and warnings of the console, and exceptions that no code caught.
        requests: URLs that the page asked for.
    """

    def __init__(self, pipe: _Pipe, session: str, context: str) -> None:
        self._pipe, self._session, self._context = pipe, session, context
        self.problems: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        return self._pipe.call(method, parameters, self._session)

    def open(self, url: str) -> None:
        """Go to a URL and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript. A promise is waited for."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        self.listen()
        return answer["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            value = self.evaluate(condition)
            if value:
                return value
            time.sleep(0.02)
        text = self.evaluate("document.body.innerText")
        raise AssertionError(f"never true: {condition}\n{self.problems}\n{text}")

    def click(self, selector: str) -> None:
        """Click the middle of the first element that fits, as a mouse does."""
        place = self.wait(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            " if (!node) return null; node.scrollIntoView({block: 'center'});"
            " const box = node.getBoundingClientRect();"
            " return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null; })()"
        )
        self.drag(place, place)

    def drag(self, begin: Sequence[float], end: Sequence[float]) -> None:
        """Press the mouse at one place of the window and let it go at another."""
        for kind, (x, y) in (("mousePressed", begin), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key by its name; 2 is Ctrl and 8 is Shift."""
        code = _KEYS[key]
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=" " if key == "Space" else key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
                text=text if kind == "keyDown" else "",
            )

    def fill(self, selector: str, text: str) -> None:
        """Type a text in place of a field's own."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{field}.focus(); {field}.select()")
        self.call("Input.insertText", text=text)
        self.evaluate(f"{field}.dispatchEvent(new Event('change', {{bubbles: true}}))")

    def choose_files(self, selector: str, paths: Sequence[Path]) -> None:
        """Choose files in a file input, as its dialog does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def window(self, width: int, height: int, scale: float = 1.0, *, mobile: bool = False) -> None:
        """Set the size of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)

    def prefer(self, scheme: str) -> None:
        """Prefer the colour scheme `light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what the window shows, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def listen(self) -> None:
        """Take in what the page reported so far."""
        for message in self._pipe.events(self._session):
            parameters = message["params"]
            match message["method"]:
                case "Runtime.exceptionThrown":
                    self.problems.append(str(parameters["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                    self.problems.append(str(parameters["args"]))
                case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                    entry = parameters["entry"]
                    self.problems.append(f"{entry['text']} {entry.get('url', '')}")
                case "Network.requestWillBeSent":
                    self.requests.append(parameters["request"]["url"])

    def close(self) -> None:
        """Close the page with its cookies and storage."""
        self._pipe.call("Target.disposeBrowserContext", {"browserContextId": self._context}, None)


class Browser:
    """A running Chromium."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe

    @contextmanager
    def page(self, width: int = 1280, height: int = 900) -> Iterator[Page]:
        """A page that shares nothing with others."""
        context = self._pipe.call("Target.createBrowserContext", {}, None)["browserContextId"]
        target = self._pipe.call(
            "Target.createTarget", {"url": "about:blank", "browserContextId": context}, None
        )["targetId"]
        attached = self._pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        page = Page(self._pipe, attached["sessionId"], context)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.window(width, height)
        try:
            yield page
        finally:
            page.close()


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium of its own, with its profile in this folder."""
    path, environment = chromium()
    to_browser, from_browser = os.pipe(), os.pipe()
    # The protocol has the descriptors 3 and 4 of the browser.
    shell = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    command = [path, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        env=environment,
        pass_fds=(to_browser[0], from_browser[1]),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    pipe = _Pipe(to_browser[1], from_browser[0])
    try:
        yield Browser(pipe)
    finally:
        pipe.close()  # at the end of its input the browser ends
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Pipe:
    """Messages to and from the browser."""

    def __init__(self, output: int, source: int) -> None:
        self._output, self._source = os.fdopen(output, "wb"), os.fdopen(source, "rb", buffering=0)
        self._last = 0
        self._rest = b""
        self._messages: deque[dict[str, Any]] = deque()
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, parameters: Mapping[str, Any], session: str | None) -> dict[str, Any]:
        """The result of a method."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._output.write(json.dumps(message).encode() + b"\0")
        self._output.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                break
            if "method" in answer:
                self._events.append(answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def events(self, session: str) -> list[dict[str, Any]]:
        """The events of a page that were not taken yet."""
        found = [event for event in self._events if event.get("sessionId") == session]
        self._events = [event for event in self._events if event.get("sessionId") != session]
        return found

    def close(self) -> None:
        """Close both ends."""
        self._output.close()
        self._source.close()

    def _next(self) -> dict[str, Any]:
        while not self._messages:
            data = self._source.read(2**16)
            if not data:
                raise AssertionError("Chromium ended")
            *whole, self._rest = (self._rest + data).split(b"\0")
            self._messages.extend(json.loads(part) for part in whole if part)
        return self._messages.popleft()

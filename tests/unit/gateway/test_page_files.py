"""The files of the page: their headers, and that they need nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gateways import gateway

from siglip_gateway.page.routes import FOLDER

FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
TEXTS = [path for path in FILES if path.suffix in {".css", ".html", ".js", ".svg"}]
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


def _url(path: Path) -> str:
    name = path.relative_to(FOLDER).as_posix()
    return "/" if name == "index.html" else f"/page/{name}"


def test_every_file_is_served_without_a_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n", encoding="utf-8")
    with gateway(api_key_file=str(keys)) as client:
        assert client.get("/v1/models").status_code == 401
        for path in FILES:
            answer = client.get(_url(path))
            assert (answer.status_code, answer.content) == (200, path.read_bytes()), path
            assert answer.headers["content-type"] == TYPES[path.suffix]
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_a_file_is_told_so() -> None:
    with gateway() as client:
        first = client.get("/")
        tag = first.headers["etag"]
        assert first.headers["cache-control"] == "no-cache"
        for known in (tag, f'"other", W/{tag}', "*"):
            again = client.get("/", headers={"if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
        assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
        assert client.head("/").headers["etag"] == tag
        assert client.get("/page/main.js").headers["etag"] != tag


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    with gateway() as client:
        policy = client.get("/").headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert "unsafe" not in policy


def test_other_paths_are_no_files() -> None:
    with gateway() as client:
        for path in (
            "/page/",
            "/page/index.html",
            "/page/../app.py",
            "/page/%2e%2e/routes.py",
            "/page/none.js",
        ):
            answer = client.get(path)
            assert answer.status_code == 404, path
            assert "no such path" in answer.json()["error"]["message"]
        assert client.post("/").status_code == 405
        client.get("/")
        client.get("/page/none.js")
        text = client.get("/metrics").text
    assert 'siglip_gateway_requests_total{api="page",status="200"} 1' in text


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.name))
def test_files_load_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    if path.suffix == ".html":
        text = re.sub(r'<a href="https://[^"]+"', "", text)  # a link loads nothing until it is followed
    assert not re.search(r"https?://|[\"'(]//|@import", text)
    for target in re.findall(r"""(?:src|href)=["']([^"'$]+)""", text):
        assert target.startswith(("/page/", "#", "/docs")), target


def test_the_index_has_no_inline_script_or_style() -> None:
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", text)
    assert all(re.search(r"\ssrc=", tag) for tag in re.findall(r"<script[^>]*>", text))


def test_every_module_is_used() -> None:
    modules = {path.name for path in TEXTS if path.suffix == ".js"}
    text = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
    used = set(re.findall(r'from "\./([\w-]+\.js)"', text)) | set(
        re.findall(r'src="/page/([\w-]+\.js)"', text)
    )
    assert modules == used

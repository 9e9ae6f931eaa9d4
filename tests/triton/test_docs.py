"""Every bash and Python block of the README and the deployment pages runs, as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from wire import ROOT

from siglip_serve.launcher import TritonServer

DEPLOYMENTS = sorted((ROOT / "deployments").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "clients").glob("*.md")), *DEPLOYMENTS]
# Their commands need what no test has: an engine, a cluster.
FURTHER = [ROOT / "docker" / "README.md", ROOT / "deployments" / "kubernetes" / "README.md"]
BLOCKS = [
    pytest.param(language, block, id=f"{page.parent.name}-{page.name}-{number}")
    for page in PAGES
    for number, (language, block) in enumerate(
        re.findall(
            r"^```(bash|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    )
]
HEADINGS = ["Stages", "Example Request", "Performance Analysis", "Validation", "Results", "Code"]


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_block_runs(language: str, block: str, server: TritonServer, tmp_path: Path) -> None:
    for name in ("checkpoints", "validate", "model_repository"):
        (tmp_path / name).symlink_to(ROOT / name)
    for port, own in ((8000, server.http_port), (8001, server.grpc_port), (8002, server.metrics_port)):
        block = re.sub(rf"\b(127\.0\.0\.1|localhost):{port}\b", f"127.0.0.1:{own}", block)
    block = re.sub(r"\.venv/bin/", "", block)
    block = re.sub(
        r"siglip-serve (embed|classify|explain|bench|health)",
        rf"siglip-serve \1 --url {server.grpc_url}",
        block,
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*run, block],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        timeout=120,
        check=False,
    )
    output = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == 0, output
    assert done.stdout or ">" in block, output
    assert '"error"' not in output


@pytest.mark.parametrize("page", DEPLOYMENTS, ids=lambda page: page.name)
def test_pages_have_the_fixed_headings(page: Path) -> None:
    assert re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE) == HEADINGS


def test_the_page_of_heatmaps_lists_the_words_that_one_prompt_is_compared_with() -> None:
    source = (ROOT / "src" / "siglip_serve" / "serving" / "explain.py").read_text(encoding="utf-8")
    words = re.findall(r'"(\w+)"', source.partition("_BACKGROUND = (")[2].partition(")")[0])
    page = (ROOT / "deployments" / "explain_image.md").read_text(encoding="utf-8")
    assert len(words) > 10
    assert f"{', '.join(words)}." in page.replace("\n", " ")


@pytest.mark.parametrize("page", [*PAGES, *FURTHER], ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target

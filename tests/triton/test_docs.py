"""Every bash and Python block of the pages runs, as it is printed and one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import PAGES, blocks, name
from programs import free_port
from wire import ROOT

from siglip_serve.launcher import TritonServer

RUNNABLE = [page for page in PAGES if any(language in ("bash", "python") for language, _ in blocks(page))]
# What the commands of the pages find at the top of a checkout.
_CHECKOUT = ("benchmarks", "checkpoints", "clients", "model_repository", "training", "validate")
# A block and, at most one line of text later, what it prints.
_SHOWN = re.compile(
    r"^```bash\n((?:(?!```).*\n)+)```\n\n(?:It prints[^\n]*:\n\n)?((?:    .*\n)+)", re.MULTILINE
)
SHOWN = [
    pytest.param(page, block, shown, id=f"{name(page)}-{number}")
    for page in RUNNABLE
    for number, (block, shown) in enumerate(_SHOWN.findall(page.read_text(encoding="utf-8")))
]
_GATEWAY = "http://127.0.0.1:8080"
_OWN_GATEWAY = 8090  # port of a gateway that a block starts
# Clients that the extra `dev` does not bring. Their blocks run where they are installed.
_OPTIONAL = ("langchain_openai", "llama_index", "litellm")
_ROUNDING = 0.003  # the server of a reader computes in bfloat16 where the processor has it


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_blocks_run_one_after_the_other(
    page: Path, server: TritonServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _lay_out(tmp_path)
    before = _entries(tmp_path)
    for language, block in blocks(page):
        if language not in ("bash", "python") or not _installed(block):
            continue
        gateway = request.getfixturevalue("gateway_url") if _GATEWAY in block else ""
        _run(language, _for_server(block.replace(_GATEWAY, gateway), server), tmp_path)
    # Results go where git ignores them.
    assert _entries(tmp_path) - before <= {"build"}


@pytest.mark.parametrize(("page", "block", "shown"), SHOWN)
def test_shown_output_is_what_the_command_prints(
    page: Path, block: str, shown: str, server: TritonServer, tmp_path: Path
) -> None:
    _lay_out(tmp_path)
    printed = _run("bash", _for_server(block, server), tmp_path)
    expected, found = ([_values(line) for line in text.splitlines()] for text in (shown, printed))
    for line in expected:
        assert any(
            line == pytest.approx(other, abs=_ROUNDING) for other in found if len(other) == len(line)
        ), f"{name(page)} shows {line}, the command prints\n{printed}"


def _values(line: str) -> list[str | float]:
    """Words and numbers of a line, as a table's and as a CSV file's."""
    words = re.split(r"[,\s]+", line.strip())
    return [float(word) if re.fullmatch(r"-?\d+\.\d+", word) else word for word in words]


def _installed(block: str) -> bool:
    return all(
        find_spec(name) for name in _OPTIONAL if re.search(rf"^(from|import) {name}\b", block, re.MULTILINE)
    )


def _lay_out(folder: Path) -> None:
    for entry in _CHECKOUT:
        (folder / entry).symlink_to(ROOT / entry)
    (folder / ".venv").symlink_to(sys.prefix)


def _entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _for_server(block: str, server: TritonServer) -> str:
    """The block with the ports of the test's server instead of the default ones."""
    for port, own in ((8000, server.http_port), (8001, server.grpc_port), (8002, server.metrics_port)):
        block = re.sub(rf"\b127\.0\.0\.1:{port}\b", f"127.0.0.1:{own}", block)
    block = block.replace(str(_OWN_GATEWAY), str(free_port()))
    commands = "bench|classify|embed|explain|health|teams"
    return re.sub(rf"siglip-serve ({commands})\b", rf"siglip-serve \1 --url {server.grpc_url}", block)


def _run(language: str, block: str, folder: Path) -> str:
    """Run a block and return its output."""
    run = [".venv/bin/python", "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*run, block],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    output = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{block}\n{output}"
    assert output, f"prints nothing:\n{block}"
    assert '"error"' not in output, f"{block}\n{output}"
    return output

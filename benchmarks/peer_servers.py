"""Servers of SigLIP that `peers.py` compares: how each is started, and where it takes images and texts.

Each is a process of its own, in the environment that it needs, on the same checkpoint:

| name | server | environment |
| --- | --- | --- |
| `ours` | this project's, Triton's HTTP with the bytes of an image or a text | this one |
| `gateway` | the same server, by the API of OpenAI with data URIs | this one |
| `fastapi` | `peer_fastapi.py` | transformers, torchvision, fastapi, uvicorn, httptools, uvloop |
| `litserve` | `peer_litserve.py` | transformers, torchvision, litserve |
| `infinity` | `infinity_emb v2` | infinity-emb[torch,server,vision] |
| `weaviate` | the code of Weaviate's multi2vec-clip container | its requirements.txt |
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.cpu_time import family
from benchmarks.json_clients import image_request, text_request
from benchmarks.load import first_answers
from benchmarks.load_clients import JsonForm, Target

__all__ = ["NAMES", "Choice", "Input", "Program", "Server", "Way", "bodies", "run_server", "stopped"]

Input = Literal["image", "text"]
_ROOT = Path(__file__).parents[1]
_PRINT_VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version

found = []
for name in sys.argv[1:]:
    try:
        found.append(f"{name} {version(name)}")
    except PackageNotFoundError:
        found.append(f"no {name}")
print("; ".join(found))
"""


@dataclass(frozen=True)
class Way:
    """Where a server takes images, and where texts."""

    image: Target
    text: Target

    def target(self, given: Input) -> Target:
        """The target of one kind of input."""
        return self.image if given == "image" else self.text


@dataclass(frozen=True)
class Program:
    """The program of a server.

    Attributes:
        command: without the checkpoint's data; it listens on 127.0.0.1.
        ways: by name. Only this project's server has two.
        packages: whose versions name the software.
        dtype: arithmetic of both towers.
        folder: where it runs.
    """

    command: Sequence[str]
    ways: Mapping[str, Way]
    packages: Sequence[str]
    dtype: str
    folder: Path = _ROOT


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        pid: the process above all others.
        start_seconds: from the start of its process to its first answer for an image.
        software: packages and their versions.
    """

    program: Program
    pid: int
    start_seconds: float
    software: str


@dataclass(frozen=True)
class Choice:
    """Choices that all servers are started with.

    Attributes:
        pythons: interpreter of a server's environment by the server's name; this one where none is named.
        weaviate: directory with the code of Weaviate's container, unchanged.
        arguments: further arguments by name of the server.
    """

    checkpoint: Path
    device: str
    dtype: str
    pythons: Mapping[str, str]
    weaviate: Path | None = None
    arguments: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def python(self, name: str) -> str:
        """The interpreter of a server, as an absolute path: some servers start in a folder of their own."""
        return os.path.abspath(self.pythons.get(name, sys.executable))  # noqa: PTH100 - a link to it stays one


def bodies(target: Target, given: Input, inputs: Sequence[Any]) -> list[bytes]:
    """Requests of one input each, in the form that a target takes."""
    if target.kind in ("http", "triton_http"):
        return [value.encode() if isinstance(value, str) else value for value in inputs]
    form: Any = target.kind
    make = image_request if given == "image" else text_request
    return [make(form, [value]) for value in inputs]


def _ours(choice: Choice, port: int, folder: Path) -> Program:
    gateway = _free_port()
    command = [str(Path(sys.executable).with_name("siglip-serve")), "serve"]
    command += ["--checkpoint", str(choice.checkpoint), "--device", choice.device, "--dtype", choice.dtype]
    command += ["--models", "embed_image,embed_text", "--http-port", str(port), "--grpc-port", "0"]
    command += ["--metrics-port", "0", "--gateway-port", str(gateway), "--log-file", str(folder / "log")]
    http, openai = f"127.0.0.1:{port}", f"127.0.0.1:{gateway}"
    ways = {
        "ours": Way(Target("triton_http", http, "embed_image"), Target("triton_http", http, "embed_text")),
        "gateway": _both("openai", openai, "/v1/embeddings"),
    }
    return Program(command, ways, ["nvidia-pytriton", "openvino", "torch"], choice.dtype)


def _fastapi(choice: Choice, port: int, folder: Path) -> Program:
    del folder
    url = f"127.0.0.1:{port}"
    way = Way(Target("http", url, "/embed"), Target("http", url, "/embed_text"))
    packages = ["transformers", "torch", "torchvision", "fastapi", "uvicorn", "pillow"]
    return _transformers(choice, "fastapi", way, port, packages)


def _litserve(choice: Choice, port: int, folder: Path) -> Program:
    del folder
    way = _both("openai", f"127.0.0.1:{port}", "/predict")
    packages = ["litserve", "transformers", "torch", "torchvision", "pillow"]
    return _transformers(choice, "litserve", way, port, packages)


def _transformers(choice: Choice, name: str, way: Way, port: int, packages: Sequence[str]) -> Program:
    command = [choice.python(name), "-m", f"benchmarks.peer_{name}", "--port", str(port)]
    command += ["--checkpoint", str(choice.checkpoint), "--device", choice.device, "--dtype", choice.dtype]
    return Program(command, {name: way}, packages, choice.dtype)


def _infinity(choice: Choice, port: int, folder: Path) -> Program:
    del folder
    python = choice.python("infinity")
    command = [str(Path(python).with_name("infinity_emb")), "v2", "--model-id", str(choice.checkpoint)]
    command += ["--engine", "torch", "--device", choice.device, "--dtype", choice.dtype, "--no-compile"]
    command += ["--no-bettertransformer", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-level", "error", "--served-model-name", "any"]
    # On CPUs it reads the option and computes in float32.
    dtype = "float32" if choice.device == "cpu" else choice.dtype
    way = _both("openai", f"127.0.0.1:{port}", "/embeddings")
    packages = ["infinity-emb", "transformers", "torch", "torchvision", "pillow"]
    return Program(command, {"infinity": way}, packages, dtype)


def _weaviate(choice: Choice, port: int, folder: Path) -> Program:
    if choice.weaviate is None:
        raise ValueError("weaviate: needs --weaviate FOLDER, a clone of weaviate/multi2vec-clip-inference")
    for name in ("app.py", "clip.py", "meta.py"):
        (folder / name).symlink_to(choice.weaviate.resolve() / name)
    (folder / "models").mkdir()
    (folder / "models" / "siglip").symlink_to(choice.checkpoint)
    (folder / "models" / "model_name").write_text(str(choice.checkpoint), encoding="utf-8")
    command = [choice.python("weaviate"), "-m", "uvicorn", "app:app", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--log-level", "warning", "--no-access-log"]
    way = _both("weaviate", f"127.0.0.1:{port}", "/vectorize")
    packages = ["transformers", "torch", "torchvision", "fastapi", "uvicorn", "pillow"]
    return Program(command, {"weaviate": way}, packages, "float32", folder)


_PROGRAMS: Mapping[str, Callable[[Choice, int, Path], Program]] = {
    "ours": _ours,
    "fastapi": _fastapi,
    "litserve": _litserve,
    "infinity": _infinity,
    "weaviate": _weaviate,
}
NAMES = tuple(_PROGRAMS)


@contextmanager
def run_server(name: str, choice: Choice, image: bytes, timeout: float) -> Iterator[Server]:
    """Start a server of `NAMES`, and stop it with all its processes.

    Args:
        image: a file, for the first request.
        timeout: seconds until its answer.

    Raises:
        OSError: the checkpoint is not a directory that can be copied.
        RuntimeError: the server ended, or did not answer in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A copy of its own: memory that several servers map from one file would count as a part for each.
        own = Path(shutil.copytree(choice.checkpoint, Path(folder) / "checkpoint"))
        program = _PROGRAMS[name](replace(choice, checkpoint=own), _free_port(), Path(folder))
        software = _versions(choice.python(name), program.packages)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*program.command, *choice.arguments.get(name, ())],
            cwd=program.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            target = next(iter(program.ways.values())).image
            _wait_for_answer(name, process, target, image, timeout)
            yield Server(program, process.pid, time.perf_counter() - begin, software)
        finally:
            _stop(process)


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Let processes and all below them do nothing meanwhile."""
    members = [member for pid in pids for member in family(pid)]
    try:
        for member in members:
            member.suspend()
        yield
    finally:
        for member in reversed(members):  # those that wait for others last
            member.resume()


def _wait_for_answer(
    name: str, process: subprocess.Popen[bytes], target: Target, image: bytes, timeout: float
) -> None:
    requests = bodies(target, "image", [image])
    deadline, last = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{name}: ended during its start, status {process.returncode}")
        try:
            first_answers(target, requests)
            return
        except RuntimeError as error:  # it does not listen yet, or is not ready
            last = str(error)
            time.sleep(0.05)
    raise RuntimeError(f"{name}: no answer after {timeout:.0f} s, at last {last}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server, and what it leaves behind."""
    members = family(process.pid)
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in members[1:]:
        if member.is_running():
            member.kill()


def _both(kind: JsonForm, url: str, path: str) -> Way:
    return Way(Target(kind, url, path), Target(kind, url, path))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _versions(python: str, packages: Sequence[str]) -> str:
    """The versions of packages in an environment, such as `torch 2.13.0; no torchvision`."""
    command = [python, "-c", _PRINT_VERSIONS, *packages]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

"""Two processes of the image tower that take turns: answers, a killed process, and the end of the server.

On a CPU the tower has one process, so the repository is changed to have two.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException
from wire import ROOT, TINY

from siglip_serve.checkpoint.config import load_config
from siglip_serve.launcher import ServeOptions, TritonServer

MODEL = "siglip_vision_model"
TOWER = ("EMBEDDING", "MEAN_EMBEDDING", "PATCH_EMBEDDINGS")
MAPS = ("PATCH_MAPS", "UNATTRIBUTED", "EMBEDDING")

Arrays = dict[str, NDArray[Any]]


@contextmanager
def serve(folder: Path) -> Iterator[TritonServer]:
    repository = Path(shutil.copytree(ROOT / "model_repository", folder / "models"))
    config = repository / MODEL / "configs" / "cpu.pbtxt"
    one, two = "kind: KIND_CPU count: 1", "kind: KIND_CPU count: 2"
    assert one in config.read_text()
    config.write_text(config.read_text().replace(one, two))
    options = ServeOptions(
        repository,
        str(TINY),
        models=(MODEL,),
        log_file=folder / "log",
        settings={"dtype": "float32", "decoders": "2", "threads": "1"},
    )
    with TritonServer(options) as server:
        yield server


def turn_files(server_pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"siglip-serve-turns-*-{server_pid}-{MODEL}-cpu"))


def takers(server: TritonServer) -> set[int]:
    """The process that holds the turn at this moment, if any."""
    (file,) = turn_files(server.pid)
    found = re.findall(r"POSIX +ADVISORY +WRITE (\d+) \w+:\w+:(\d+) ", Path("/proc/locks").read_text())
    return {int(pid) for pid, inode in found if int(inode) == file.stat().st_ino}


def towers(server: TritonServer) -> list[psutil.Process]:
    family = psutil.Process(server.pid).children(recursive=True)
    return [process for process in family if any(f"/{MODEL}/" in word for word in process.cmdline())]


def ask(
    client: triton.InferenceServerClient,
    pixels: NDArray[np.uint8],
    outputs: Sequence[str],
    vectors: NDArray[np.float32] | None = None,
    **parameters: Any,
) -> Arrays:
    inputs = [triton.InferInput("PIXEL_VALUES", list(pixels.shape), "UINT8")]
    inputs[0].set_data_from_numpy(pixels)
    if vectors is not None:
        inputs.append(triton.InferInput("PROMPT_VECTORS", list(vectors.shape), "FP32"))
        inputs[1].set_data_from_numpy(vectors)
    requested = [triton.InferRequestedOutput(name) for name in outputs]
    result = client.infer(MODEL, inputs, outputs=requested, parameters=parameters or None)
    return {name: result.as_numpy(name) for name in outputs}


class Caller:
    """Requests of every kind, whose answers must equal those of an idle server."""

    def __init__(self, url: str) -> None:
        self.client = triton.InferenceServerClient(url)
        config = load_config(TINY)
        side, width = config.vision.image_size, config.vision.hidden_size
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (24, side, side, 3), dtype=np.uint8)
        self.vectors = rng.standard_normal((1, 3, width), dtype=np.float32)
        self.expected = ask(self.client, self.pixels, TOWER)
        self.maps = [ask(self.client, self.pixels[i : i + 1], MAPS, self.vectors) for i in range(4)]

    def ask_once(self, draw: random.Random) -> None:
        """Send a request of a kind drawn at random, and check its answer."""
        start = draw.randrange(16)
        rows = slice(start, start + draw.randint(1, 8))
        kinds: list[Callable[[slice], None]] = [self.embed, self.embed, self.all, self.normalized]
        kinds += [self.explain, self.unknown_parameter, self.maps_without_vectors]
        draw.choice(kinds)(rows)

    def embed(self, rows: slice) -> None:
        got = ask(self.client, self.pixels[rows], TOWER[:1])
        np.testing.assert_allclose(got["EMBEDDING"], self.expected["EMBEDDING"][rows], atol=1e-3)

    def all(self, rows: slice) -> None:
        got = ask(self.client, self.pixels[rows], TOWER)
        for name in TOWER:
            np.testing.assert_allclose(got[name], self.expected[name][rows], atol=1e-3)

    def normalized(self, rows: slice) -> None:
        got = ask(self.client, self.pixels[rows], TOWER[:1], normalized=True)["EMBEDDING"]
        expected = self.expected["EMBEDDING"][rows]
        np.testing.assert_allclose(got, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)

    def explain(self, rows: slice) -> None:
        index = rows.start % len(self.maps)
        got = ask(self.client, self.pixels[index : index + 1], MAPS, self.vectors)
        for name, array in self.maps[index].items():
            np.testing.assert_allclose(got[name], array, atol=1e-3)

    def unknown_parameter(self, rows: slice) -> None:
        with pytest.raises(InferenceServerException, match="parameter 'normalize': unknown") as caught:
            ask(self.client, self.pixels[rows], TOWER[:1], normalize=True)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"

    def maps_without_vectors(self, rows: slice) -> None:
        with pytest.raises(InferenceServerException, match="only of requests with the input") as caught:
            ask(self.client, self.pixels[rows], MAPS[:1])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@contextmanager
def load(caller: Caller, in_flight: int) -> Iterator[None]:
    """Keep this number of requests in flight; some may fail."""
    stop = threading.Event()

    def keep_asking(seed: int) -> None:
        draw = random.Random(seed)
        while not stop.is_set():
            with suppress(InferenceServerException, AssertionError):  # refused with another status
                caller.ask_once(draw)

    threads = [threading.Thread(target=keep_asking, args=(seed,)) for seed in range(in_flight)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_for_turns_of_both(server: TritonServer) -> None:
    deadline = time.monotonic() + 60
    seen: set[int] = set()
    while len(seen) < 2:
        assert time.monotonic() < deadline, seen
        now = takers(server)
        assert len(now) <= 1
        seen |= now
        time.sleep(0.002)


def test_two_processes_answer_correctly_and_end_under_load(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        caller = Caller(server.grpc_url)

        def ask_some(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(20):
                caller.ask_once(draw)

        with ThreadPoolExecutor(13) as pool:
            watched = pool.submit(wait_for_turns_of_both, server)
            list(pool.map(ask_some, range(12)))
            watched.result()
        pid = server.pid
        with load(caller, in_flight=12):
            wait_for_turns_of_both(server)
            os.kill(pid, signal.SIGTERM)
            assert server.wait() == 0
        assert not turn_files(pid)


def test_killed_process_gives_its_turn_back(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        caller = Caller(server.grpc_url)
        with load(caller, in_flight=4):  # the new process starts while these are computed
            wait_for_turns_of_both(server)
            before = towers(server)
            assert len(before) == 2
            before[0].kill()
            while "served again after" not in (tmp_path / "log").read_text():
                time.sleep(0.1)
            wait_for_turns_of_both(server)
        for kind in (caller.all, caller.explain, caller.unknown_parameter):
            kind(slice(0, 5))
        pid = server.pid
    assert not turn_files(pid)

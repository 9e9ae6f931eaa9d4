"""Processes of a real server are killed under load: clients wait, and get every answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from images import encode, photo
from siglip_serve_client import Client

from siglip_serve.launcher import TritonServer

PICTURES = [encode(photo(60, 50, number), "JPEG") for number in range(8)]
CALLERS = 3


def model_processes(server: TritonServer, model: str) -> list[psutil.Process]:
    """The running processes of a model."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if any(f"/{model}/" in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_killed_processes_cost_callers_time_but_no_answer(mortal_server: TritonServer) -> None:
    ended = threading.Event()
    answered: Counter[str] = Counter()

    def call(client: Client, url: str) -> None:
        number = 0
        while not ended.is_set():
            number = (number + 1) % len(PICTURES)
            row = client.embed_image(PICTURES[number])
            np.testing.assert_allclose(row, expected[number], rtol=1e-3, atol=1e-4)
            answered[url] += 1

    def let_answer(count: int) -> None:
        wanted = {url: answered[url] + count for url in urls}
        deadline = time.monotonic() + 120
        while any(answered[url] < wanted[url] for url in urls):
            assert time.monotonic() < deadline, "no answers any more"
            assert not any(future.done() for future in calls), [future.exception() for future in calls]
            time.sleep(0.05)

    with ThreadPoolExecutor(2 * CALLERS) as pool:
        urls = [f"grpc://{mortal_server.grpc_url}", f"http://{mortal_server.http_url}"]
        with Client(urls[0]) as over_grpc, Client(urls[1]) as over_http:
            expected = [over_grpc.embed_image(picture) for picture in PICTURES]
            clients = zip((over_grpc, over_http), urls, strict=True)
            calls = [pool.submit(call, client, url) for client, url in clients for _ in range(CALLERS)]
            try:
                let_answer(20)
                for model in ("siglip_vision_process", "siglip_vision_model"):
                    model_processes(mortal_server, model)[0].kill()
                    let_answer(20)
                os.kill(mortal_server.pid, signal.SIGKILL)
                let_answer(20)
            finally:
                ended.set()
            for future in calls:
                future.result(timeout=120)

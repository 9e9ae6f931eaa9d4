"""Loads through locust, one after another, each in its own processes."""

from __future__ import annotations

import asyncio
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from tqdm import tqdm

from siglip_serve_client._operations.requests import Call, Transport
from siglip_serve_client._transports import connect
from siglip_serve_client.commands.bench import LOCUSTFILE, BenchError
from siglip_serve_client.commands.bench.mix import parse_models, pictures
from siglip_serve_client.commands.bench.record import Summary, summarise
from siglip_serve_client.commands.bench.requests import TEXT_MODELS, check_answer, make_call
from siglip_serve_client.commands.options import endpoint

__all__ = ["Plan", "Point", "check_server", "locust_command", "run_point"]

_OPEN_USERS = 16  # they share the rate of the open loop; each has its own connection
_START = 60.0  # seconds in which locust has to start
_END = 1  # seconds of load after the measured time


@dataclass(frozen=True)
class Plan:
    """The settings that all loads share.

    Attributes:
        url: as `Endpoint.parse` reads it. The key is in the environment.
        ca_file: PEM file of the certificates to trust.
        model, mix: as `parse_models` and `parse_sizes` read them.
        images: files and folders, instead of `mix`.
        seconds, warmup, timeout: in seconds. The last one is for one request.
        processes: of locust.
    """

    url: str
    ca_file: Path | None = None
    model: str = "embed_image"
    mix: str = "500x375"
    images: Sequence[str] = ()
    seconds: float = 10.0
    warmup: float = 2.0
    timeout: float = 60.0
    processes: int = 1

    @property
    def sent(self) -> str:
        """The kind of requests, in words."""
        if all(model in TEXT_MODELS for model, _ in parse_models(self.model)):
            return f"{self.model}, new texts"
        return f"{self.model}, pictures {' '.join(self.images) or self.mix}"

    @property
    def where(self) -> str:
        """Target and duration, in words."""
        url = self.url if "://" in self.url else f"grpc://{self.url}"
        return f"to {url}, {self.seconds:g} s each"


@dataclass(frozen=True)
class Point:
    """One load: a number of requests in flight, or in the open loop a number of requests/s."""

    load: float
    is_open: bool = False

    def __str__(self) -> str:
        return f"{self.load:g} requests/s" if self.is_open else f"{self.load:g} in flight"


def check_server(plan: Plan) -> None:
    """Make one request of each model.

    Raises:
        BenchError, SourcesError, OSError: the pictures cannot be read.
        ClientError: no server answers, or an answer is wrong.
    """
    models, sent = parse_models(plan.model), pictures(plan.mix, plan.images)
    calls = [replace(make_call(model, sent[0][0], Random()), timeout=plan.timeout) for model, _ in models]
    asyncio.run(_check_answers(connect(endpoint(plan.url, plan.ca_file), 1), calls))


async def _check_answers(transport: Transport, calls: Sequence[Call]) -> None:
    try:
        for call in calls:
            check_answer(call.model, await transport.infer(call))
    finally:
        await transport.close()


def locust_command(plan: Plan, point: Point, record: Path) -> list[str]:
    """The command line that puts this load on the server and writes records into a folder."""
    users = max(_OPEN_USERS, plan.processes) if point.is_open else int(point.load)
    processes = min(plan.processes, users)
    rate = point.load / users if point.is_open else 0.0
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += ["-u", str(users), "-r", str(users), "-t", f"{math.ceil(plan.warmup + plan.seconds) + _END}s"]
    command += ["--stop-timeout", str(math.ceil(plan.timeout)), "--record", str(record), "--url", plan.url]
    command += ["--model", plan.model, "--mix", plan.mix, "--timeout", f"{plan.timeout:g}"]
    command += ["--rate-per-user", f"{rate:.9g}"]
    command += ["--images", *plan.images] if plan.images else []
    command += ["--ca-file", str(plan.ca_file)] if plan.ca_file else []
    if processes > 1:
        port = str(_free_port())
        command += ["--processes", str(processes), "--master-bind-host", "127.0.0.1"]
        command += ["--master-bind-port", port, "--master-port", port]
    return command


def run_point(plan: Plan, point: Point, output: Path) -> Summary:
    """Put one load on the server. Locust's own output goes to a file in `output`.

    Raises:
        BenchError: if locust fails, or no request was answered in the measured time.
    """
    log = output / f"locust-{'rate-' if point.is_open else ''}{point.load:g}.log"
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as file:
        process = subprocess.Popen(
            locust_command(plan, point, Path(folder)),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(process, plan, str(point))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.returncode not in (0, 1):  # 1: requests failed, which the record tells better
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise BenchError("\n".join([f"locust ended with status {process.returncode}:", *tail]))
        return summarise(Path(folder), plan.warmup, plan.seconds, point.is_open)


def _wait(process: subprocess.Popen[bytes], plan: Plan, name: str) -> None:
    begin = time.monotonic()
    total = plan.warmup + plan.seconds + _END
    limit = total + _START + 2 * plan.timeout
    with tqdm(total=round(total), unit="s", desc=name, disable=None, leave=False) as bar:
        while process.poll() is None:
            passed = time.monotonic() - begin
            if passed > limit:
                raise BenchError(f"locust did not end within {limit:.0f} s")
            bar.update(min(int(passed), bar.total or 0) - bar.n)
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

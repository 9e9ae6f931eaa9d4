"""Hostile requests to every API of a gateway, while honest callers compare their vectors."""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from images import encode, photo
from numpy.typing import NDArray
from paths import ROOT
from siglip_serve_client import Client
from tqdm import tqdm

from siglip_gateway.options import GatewayOptions
from tests.chaos.cases.base import build_world
from tests.chaos.cases.gateway import PATHS, GatewayCase, Ground, case, request
from tests.chaos.cases.gateway_urls import ALLOWED
from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.gateway_hosts import Hosts, hosts
from tests.chaos.processes import HELPER
from tests.chaos.report import percentile
from tests.chaos.server import ChaosError
from tests.chaos.wires import HANG, HttpWire, Outcome, Reply

__all__ = ["problem_of", "run"]

_KEY = "a-key-of-the-fuzzer"
_LATE = 10.0  # seconds for an answer
# Fields of the errors of each API.
_FIELDS: Mapping[str, set[str]] = {
    "openai": {"error", "detail"},
    "cohere": {"id", "message"},
    "weaviate": {"error"},
    "immich": {"detail"},
    "own": {"error"},
}
_API: Mapping[str, str] = {
    **PATHS,
    "/meta": "weaviate",
    "/.well-known/live": "weaviate",
    "/ping": "immich",
    "/metrics": "own",
    "/health": "own",
}


def problem_of(item: GatewayCase, reply: Reply) -> str:
    """Tell what is wrong with the reply to a case, or return ""."""
    if reply.outcome in (Outcome.HANG, Outcome.LOST):
        return str(reply.outcome)
    if reply.seconds > _LATE:
        return f"answered after {reply.seconds:.0f} s"
    if not item.framed:
        return "" if reply.status in ("", "200") or reply.status.startswith("4") else f"status {reply.status}"
    status = int(reply.status)
    if status not in item.allowed:
        return f"status {status}"
    if status < 400:
        return ""
    try:
        found = json.loads(reply.body)
    except ValueError:
        return f"status {status} without JSON"
    api = _API.get(item.path, "openai")
    if not isinstance(found, dict) or set(found) != _FIELDS[api]:
        return f"status {status} in another form than that of {api}"
    return ""


class _Honest:
    """Callers of four APIs whose vectors are known from a quiet gateway."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._right: dict[str, NDArray[np.float32]] = {}
        image = base64.b64encode(encode(photo(160, 120, 80), "JPEG")).decode()
        texts = ["a photo of a dog", "a house"]
        bodies: dict[str, Any] = {
            "/v1/embeddings": {"input": [texts[0], {"image": image}], "encoding_format": "base64"},
            "/embeddings": {"input": texts},
            "/v2/embed": {"texts": texts, "embedding_types": ["float"]},
            "/vectorize": {"texts": texts, "images": [image]},
        }
        self._requests = {
            path: request(path, json.dumps(body).encode(), _KEY) for path, body in bodies.items()
        }
        self.sent = 0
        self.problems: list[str] = []
        self.seconds: list[float] = []

    async def learn(self) -> None:
        """Ask the quiet gateway.

        Raises:
            ChaosError: it does not answer.
        """
        wire = HttpWire(self._address)
        for path, sent in self._requests.items():
            reply = await wire.send(sent, limit=60)
            if reply.status != "200":
                raise ChaosError(f"{path}: {reply.outcome} {reply.status} {reply.message}")
            self._right[path] = _vectors(reply.body)
        await wire.close()

    async def ask(self, done: asyncio.Event, tolerance: float) -> None:
        """Ask all the time until the end."""
        wire = HttpWire(self._address)
        for path in itertools.cycle(self._requests):
            if done.is_set():
                break
            reply = await wire.send(self._requests[path], limit=60)
            self.sent += 1
            self.seconds.append(reply.seconds)
            if reply.status != "200":
                self.problems.append(f"{path}: {reply.outcome} {reply.status} {reply.message[:200]}")
            else:
                apart = float(np.abs(_vectors(reply.body) - self._right[path]).max())
                if not apart <= tolerance:
                    self.problems.append(f"{path}: off by {apart:g}")
            await asyncio.sleep(0.05)
        await wire.close()


def _vectors(body: bytes) -> NDArray[np.float32]:
    found = json.loads(body)
    if "data" in found:
        rows = [entry["embedding"] for entry in found["data"]]
        if isinstance(rows[0], str):
            return np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
        return np.array(rows, np.float32)
    if "embeddings" in found:
        return np.array(found["embeddings"]["float"], np.float32)
    return np.array([*found["textVectors"], *found["imageVectors"]], np.float32)


@asynccontextmanager
async def _gateway(context: Context, site: Site, port: int) -> AsyncIterator[tuple[str, Any]]:
    """A gateway process with keys, small limits and allowed hosts: its address and the process."""
    keys = context.folder / "gateway.keys"
    keys.write_text(f"{_KEY}\n", encoding="ascii")
    width = int(await asyncio.to_thread(_width, site.target.grpc))
    index = context.folder / "index.npz"
    rows = np.random.default_rng(0).normal(size=(50, width)).astype(np.float32)
    names = np.array([f"{number}.jpg" for number in range(len(rows))])
    np.savez(index, paths=names, embeddings=rows, identity=np.array("{}"))
    options = GatewayOptions(
        triton=site.target.grpc,
        api_key_file=str(keys),
        url_hosts=tuple(f"{host}:{port}" for host in ALLOWED),
        max_body=2**21,
        max_inputs=64,
        max_pictures=32,
        max_text=8192,
        upload_timeout=2.0,
        max_download=2**20,
        download_timeout=1.0,
        search=str(index),
    )
    with (context.folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.gateway_serve", options.to_json()],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    if not line:
        raise ChaosError(f"the gateway did not start, see {log.name}")
    try:
        yield f"127.0.0.1:{json.loads(line)['port']}", process
    finally:
        process.stdin.close()
        await asyncio.to_thread(process.wait, 60)


def _width(address: str) -> int:
    with Client(f"grpc://{address}") as client:
        return client.check_health()


class _Attack:
    def __init__(self, context: Context, address: str, ground: Ground) -> None:
        self._context, self._address, self._ground = context, address, ground
        self.statuses: Counter[str] = Counter()
        self.by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        self.problems: Counter[str] = Counter()
        self.total = 0
        self.longest = 0.0

    async def work(self, cases: Iterator[tuple[int, int]], end: float, bar: Any) -> None:
        """Send cases, by seed and number, one after the other."""
        wire = HttpWire(self._address)
        for seed, number in cases:
            if time.monotonic() > end:
                break
            item = case(seed, number, self._ground)
            reply = await wire.send(item.body, item.framed, item.whole, HANG)
            self._note(item, reply)
            bar.update()
        await wire.close()

    def _note(self, item: GatewayCase, reply: Reply) -> None:
        self.total += 1
        self.longest = max(self.longest, reply.seconds)
        status = reply.status or "closed"
        self.statuses[status] += 1
        self.by_kind[item.kind][status] += 1
        problem = problem_of(item, reply)
        if problem:
            self.problems[problem] += 1
            told = f"{item.path} {item.about}: {problem} {reply.body[:200].decode('utf-8', 'replace')}"
            self._context.report.find("gateway", problem, told, item.name)


def _chosen(options: argparse.Namespace) -> Sequence[tuple[int, int]]:
    """Seeds and numbers of the cases: those that are named, or a range."""
    if options.case:
        named = [name.split(":") for name in options.case]
        return [(int(seed), int(number)) for _, seed, number in named]
    return [(options.seed, options.first_case + number) for number in range(options.cases)]


async def run(context: Context) -> None:
    """Run a server and a gateway before it, send the cases, and add lines to the table."""
    options = context.options
    async with context.site("gateway") as site, hosts() as web:
        world = await asyncio.to_thread(build_world, site.canaries.state)
        async with _gateway(context, site, web.port) as (address, process):
            honest = _Honest(address)
            await honest.learn()
            attack = _Attack(context, address, Ground(world, _KEY, web.port))
            cases = _chosen(options)
            begin, done = time.monotonic(), asyncio.Event()
            caller = asyncio.create_task(honest.ask(done, options.tolerance))
            end = begin + options.fuzz_minutes * 60
            with tqdm(total=len(cases), desc="gateway", unit="case", smoothing=0.02) as bar:
                left = iter(cases)
                await asyncio.gather(*(attack.work(left, end, bar) for _ in range(options.in_flight)))
            seconds = time.monotonic() - begin
            done.set()
            await caller
            _tell(context, attack, honest, web, seconds)
            alive = process.poll() is None
            context.report.add("gateway", "the gateway lives", alive, "True", not alive)
        deaths = [death.kind for death in site.target.deaths() if not death.kind.endswith(HELPER)]
        context.report.add("gateway", "deaths of Triton's processes", len(deaths), "0", bool(deaths))
        took = await wait_until_right(site, 60)
        context.report.add("gateway", "the server answers right", took is not None, "True", took is None)
    lines = [f"{kind},{dict(sorted(counts.items()))}" for kind, counts in attack.by_kind.items()]
    (context.folder / "gateway.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tell(context: Context, attack: _Attack, honest: _Honest, web: Hosts, seconds: float) -> None:
    def add(check: str, result: object, expected: str = "", fault: bool = False) -> None:
        context.report.add("gateway", check, result, expected, fault)

    add("cases sent", f"{attack.total} in {seconds:.0f} s, {attack.total / seconds * 60:.0f} per minute")
    add("statuses", ", ".join(f"{status} {count}" for status, count in sorted(attack.statuses.items())))
    failed = sum(attack.problems.values())
    kinds = ", ".join(f"{count} x {problem}" for problem, count in attack.problems.most_common(5))
    add("wrong status or form of an answer", f"{failed} {kinds}".strip(), "0", bool(failed))
    add("longest answer", f"{attack.longest:.1f} s", f"{_LATE:.0f} s", attack.longest > _LATE)
    for sent in web.inside[:6]:
        context.report.find("gateway", "private address read", sent.decode("latin-1"))
    add("connections to private addresses", len(web.inside), "0", bool(web.inside))
    add("requests to allowed hosts", web.outside)
    for problem in honest.problems[:20]:
        context.report.find("gateway", "honest caller", problem)
    add("honest requests beside them", honest.sent)
    add("wrong or failed ones of these", len(honest.problems), "0", bool(honest.problems))
    p50, p99 = (percentile(honest.seconds, share) * 1000 for share in (0.5, 0.99))
    add("their wait: p50, p99", f"{p50:.0f} ms, {p99:.0f} ms")

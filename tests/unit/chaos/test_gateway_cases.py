"""The cases of the gateway, and the verdicts on their replies."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import socket
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from gateways import WIDTH, StandIn
from images import encode, photo

from siglip_gateway.app import create_app
from siglip_gateway.options import GatewayOptions
from tests.chaos.cases.base import World
from tests.chaos.cases.gateway import KINDS, PATHS, GatewayCase, Ground, case, request
from tests.chaos.cases.gateway_urls import ALLOWED
from tests.chaos.gateway import problem_of
from tests.chaos.gateway_hosts import Hosts, hosts
from tests.chaos.gateway_serve import reader_of
from tests.chaos.wires import HttpWire, Outcome, Reply

KEY = "a-key"


@functools.cache
def ground(port: int = 1) -> Ground:
    pictures = {kind: encode(photo(60, 40), kind) for kind in ("PNG", "JPEG", "WEBP")}
    return Ground(World(pictures, {"text": b"hello"}, [], names=sorted(pictures)), KEY, port)


def test_all_kinds_come_and_equal_numbers_make_equal_bytes() -> None:
    def digest() -> str:
        made = [case(5, number, ground()) for number in range(300)]
        assert {item.kind for item in made} == set(KINDS)
        assert {item.path for item in made} >= set(PATHS)
        return hashlib.sha256(b"".join(item.body for item in made)).hexdigest()

    assert digest() == digest()


def test_every_api_of_the_gateway_is_attacked() -> None:
    paths = create_app(GatewayOptions()).openapi()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == set(PATHS)


def reply(status: int, body: object, outcome: Outcome = Outcome.REFUSED, seconds: float = 0.1) -> Reply:
    return Reply(outcome, str(status), "", seconds, json.dumps(body).encode())


ERROR = {"error": {"message": "m"}, "detail": "m"}
ITEM = GatewayCase("", "/v1/embeddings", b"")


@pytest.mark.parametrize(
    ("item", "answer", "problem"),
    [
        (ITEM, reply(400, ERROR), ""),
        (ITEM, reply(200, {}), ""),
        (ITEM, reply(500, ERROR), "status 500"),
        (ITEM, reply(502, ERROR), "status 502"),
        (ITEM, reply(400, {"error": "m"}), "status 400 in another form than that of openai"),
        (ITEM, reply(400, [1]), "status 400 in another form than that of openai"),
        (ITEM, Reply(Outcome.REFUSED, "400", "", 0.1, b"text"), "status 400 without JSON"),
        (ITEM, Reply(Outcome.HANG, "", "", 10.0), "unanswered"),
        (ITEM, Reply(Outcome.LOST, "", "", 0.1), "lost"),
        (ITEM, reply(200, {}, seconds=11), "answered after 11 s"),
        (GatewayCase("", "/v2/embed", b""), reply(400, {"id": "1", "message": "m"}), ""),
        (GatewayCase("", "/predict", b"", frozenset({401})), reply(200, {}), "status 200"),
        (GatewayCase("", "/x", b"", framed=False), Reply(Outcome.REFUSED, "400", "", 0.1, b"text"), ""),
        (GatewayCase("", "/x", b"", framed=False), Reply(Outcome.INTERNAL, "500", "", 0.1), "status 500"),
    ],
)
def test_problems_of_replies(item: GatewayCase, answer: Reply, problem: str) -> None:
    assert problem_of(item, answer) == problem


async def attacked(address: str, web: Hosts, numbers: range) -> tuple[list[str], Counter[str]]:
    wire, problems, statuses = HttpWire(address), [], Counter[str]()
    for number in numbers:
        item = case(3, number, ground(web.port))
        answer = await wire.send(item.body, item.framed, item.whole)
        statuses[answer.status] += 1
        found = problem_of(item, answer)
        # The stand-in has vectors of another width than the cases expect.
        if found and b"dimension" not in answer.body:
            problems.append(f"{item.name} {item.about}: {found} {answer.body[:200]!r}")
    await wire.close()
    return problems, statuses


def test_a_gateway_stands_a_short_attack(tmp_path: Path) -> None:
    """The whole run is `make chaos`. This one has a stand-in for Triton."""
    (tmp_path / "keys").write_text(KEY)
    rows = np.ones((2, WIDTH), np.float32)
    np.savez(tmp_path / "index.npz", paths=np.array(["a", "b"]), embeddings=rows, identity=np.array("{}"))

    async def run() -> None:
        async with hosts() as web:
            options = GatewayOptions(
                api_key_file=str(tmp_path / "keys"),
                search=str(tmp_path / "index.npz"),
                url_hosts=tuple(f"{host}:{web.port}" for host in ALLOWED),
                max_body=2**21,
                max_inputs=64,
                max_download=2**20,
                download_timeout=1.0,
                upload_timeout=2.0,
            )
            bound = socket.create_server(("127.0.0.1", 0))
            config = uvicorn.Config(
                create_app(options, StandIn(), reader_of(options)), access_log=False, log_level="warning"
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, args=([bound],))
            thread.start()
            try:
                address = f"127.0.0.1:{bound.getsockname()[1]}"
                good = {"input": [{"url": f"http://good.test:{web.port}/x.png"}]}
                bad = {"input": [{"url": f"http://late.test:{web.port}/x.png"}]}
                wire = HttpWire(address)
                for body, status in ((good, "200"), (bad, "400")):
                    sent = request("/v1/embeddings", json.dumps(body).encode(), KEY)
                    assert (await wire.send(sent)).status == status
                await wire.close()
                problems, statuses = await attacked(address, web, range(400))
                assert problems == []
                assert {"200", "400", "401", "404", "415", "422", "501"} <= set(statuses)
                assert web.outside > 0
                assert web.inside == []
            finally:
                server.should_exit = True
                await asyncio.to_thread(thread.join)

    asyncio.run(run())

"""Protection of Triton: keys, limits, turns, and callers that give up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from gateways import URI, StandIn, encoded, gateway
from starlette.requests import Request

from siglip_gateway.app import create_app
from siglip_gateway.counters import Counters
from siglip_gateway.options import GatewayOptions, read_keys
from siglip_gateway.protection import Keys, read_body
from siglip_gateway.refusals import Refusal

HEADERS = ["api-key", "x-api-key", "x-cohere-api-key", "x-openai-api-key", "x-weaviate-api-key"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# keys\nfirst\n\nsecond\n")
    return file


def test_every_way_to_send_a_key_is_accepted(key_file: Path) -> None:
    with gateway(api_key_file=str(key_file)) as client:
        for headers in [{name: "second"} for name in HEADERS] + [
            {"authorization": "Bearer first"},
            {"authorization": "bearer second"},
            {"authorization": "BEARER first"},
        ]:
            answer = client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
            assert answer.status_code == 200, headers


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/embeddings", {"error"}), ("/v2/embed", {"id", "message"}), ("/predict", {"detail"})],
)
def test_other_keys_are_refused_before_the_body_is_read(key_file: Path, path: str, fields: set[str]) -> None:
    stand_in = StandIn()
    wrong = ["", "firs", "firstsecond", "# keys", "FIRST"]
    with gateway(stand_in, api_key_file=str(key_file)) as client:
        for headers in [{}, *({"api-key": key} for key in wrong), {"authorization": "Basic first"}]:
            answer = client.post(path, content=b"not json", headers=headers)
            assert answer.status_code == 401, headers
            assert answer.json().keys() == fields
            assert answer.headers["www-authenticate"] == "Bearer"
    assert stand_in.calls == []


def test_probes_need_no_key_and_metrics_do(key_file: Path) -> None:
    with gateway(api_key_file=str(key_file)) as client:
        for path in ("/health", "/ping", "/.well-known/live", "/.well-known/ready"):
            assert client.get(path).is_success, path
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"x-api-key": "first"}).status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_all_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return a == b

    monkeypatch.setattr("siglip_gateway.protection.hmac.compare_digest", compare)
    Keys(["a", "b", "c"]).check({"api-key": "a"})
    assert len(compared) == 3
    assert all(len(digest) == 32 for digest in compared)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none\n\n")
    with pytest.raises(ValueError, match="no key"):
        read_keys(file)
    with pytest.raises(ValueError, match="no key"):
        create_app(GatewayOptions(api_key_file=str(file)))
    assert read_keys(None) == ()


def test_bodies_have_a_limit() -> None:
    stand_in = StandIn()
    with gateway(stand_in, max_body=1000) as client:
        assert client.post("/v1/embeddings", json={"input": "a" * 900}).status_code == 200
        answer = client.post("/v2/embed", json={"texts": ["a" * 2000]})
        assert answer.status_code == 413
        assert answer.json()["message"] == "the body has more than 1000 bytes"
        chunked = client.post("/v1/embeddings", content=iter([b"x" * 600] * 3))
        assert chunked.status_code == 413
        packed = client.post("/v1/embeddings", content=b"x", headers={"content-encoding": "gzip"})
        assert packed.status_code == 415
    # One for the request, and one for the width of the checkpoint.
    assert [call[0] for call in stand_in.calls].count("texts") == 2


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({"max_inputs": 3}, ["a"] * 4, "4 inputs, at most 3"),
        ({"max_pictures": 1}, [URI, "a", URI], "2 pictures, at most 1"),
        ({"max_text": 5}, ["a", "abcdef"], "input[1]: 6 characters, at most 5"),
    ],
)
def test_inputs_have_limits(options: dict[str, Any], inputs: list[str], message: str) -> None:
    with gateway(**options) as client:
        answer = client.post("/v1/embeddings", json={"input": inputs})
        assert client.post("/v1/embeddings", json={"input": inputs[:1]}).status_code == 200
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_slow_body_is_not_waited_for() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(10)
        return {}

    request = Request({"type": "http", "headers": []}, receive)
    with pytest.raises(Refusal) as caught:
        asyncio.run(read_body(request, 100, 0.02))
    assert caught.value.status == 408


async def ask(
    app: FastAPI, body: object, gone: asyncio.Event | None = None
) -> tuple[int, dict[bytes, bytes]]:
    """One request to the application, in the running loop: its status and the headers of the answer."""
    messages: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    found: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        found.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return found[0]["status"], dict(found[0]["headers"])


def in_loop(stand_in: StandIn, test: Callable[[FastAPI], Any], **options: Any) -> None:
    async def run() -> None:
        stand_in.gate = asyncio.Event()
        app = create_app(GatewayOptions(**options), stand_in)
        async with app.router.lifespan_context(app):
            stand_in.gate.set()
            assert (await ask(app, {"input": "a"}))[0] == 200  # from here on the checkpoint is known
            stand_in.gate.clear()
            stand_in.calls.clear()
            stand_in.finished = 0
            await test(app)

    asyncio.run(run())


def test_more_requests_than_may_wait_are_refused() -> None:
    stand_in = StandIn()

    async def test(app: FastAPI) -> None:
        waiting = [asyncio.create_task(ask(app, {"input": "a"})) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert len(stand_in.calls) == 2
        status, headers = await ask(app, {"input": "a"})
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert stand_in.gate is not None
        stand_in.gate.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 5
        assert (await ask(app, {"input": "a"}))[0] == 200

    in_loop(stand_in, test, max_running=2, max_waiting=3)


def test_a_turn_that_does_not_come_is_refused() -> None:
    stand_in = StandIn()

    async def test(app: FastAPI) -> None:
        first = asyncio.create_task(ask(app, {"input": "a"}))
        await asyncio.sleep(0.01)
        status, headers = await ask(app, {"input": "a"})
        assert (status, headers[b"retry-after"]) == (503, b"5")
        assert stand_in.gate is not None
        stand_in.gate.set()
        assert (await first)[0] == 200

    in_loop(stand_in, test, max_running=1, timeout=0.05)


def test_a_caller_that_gives_up_cancels_nothing() -> None:
    stand_in = StandIn()

    async def test(app: FastAPI) -> None:
        tasks = [asyncio.create_task(ask(app, {"input": ["a", URI]})) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert len(stand_in.calls) == 4
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert app.state.service.turns.running == 2  # the turns belong to the work
        assert stand_in.gate is not None
        stand_in.gate.set()
        await asyncio.sleep(0.05)
        assert stand_in.finished == 4
        assert app.state.service.turns.running == 0

    in_loop(stand_in, test, max_running=2)


def test_a_bad_input_does_not_cancel_its_neighbours() -> None:
    stand_in = StandIn()

    async def test(app: FastAPI) -> None:
        assert stand_in.gate is not None
        stand_in.gate.set()
        status, _ = await ask(app, {"input": ["a", {"image": encoded(b"no image")}]})
        assert status == 400
        assert stand_in.finished == 1

    in_loop(stand_in, test)


def test_pages_of_other_origins_are_let_in_by_setting_only() -> None:
    origin = {"origin": "https://a.example"}
    with gateway() as client:
        answer = client.post("/v1/embeddings", json={"input": "a"}, headers=origin)
        assert "access-control-allow-origin" not in answer.headers
    with gateway(cors_origins=("https://a.example",)) as client:
        answer = client.post("/v1/embeddings", json={"input": "a"}, headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = client.get("/ping", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_the_log_has_no_contents(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "siglip_gateway.access")
    with gateway() as client:
        client.post("/v1/embeddings?secret=1", json={"input": "private words"}, headers={"api-key": "my-key"})
    lines = [json.loads(record.message) for record in caplog.records if record.name.startswith("siglip")]
    assert len(lines) == 1
    assert lines[0].keys() == {"time", "client", "method", "path", "status", "ms", "bytes"}
    assert (lines[0]["path"], lines[0]["status"]) == ("/v1/embeddings", 200)
    assert not any(word in caplog.text for word in ("private", "my-key", "secret"))


def test_metrics_count_requests_and_inputs() -> None:
    with gateway() as client:
        client.post("/v1/embeddings", json={"input": ["a", "b", URI]})
        client.post("/v1/embeddings", json={})
        client.get("/unknown/1")
        lines = client.get("/metrics").text.splitlines()
    assert 'siglip_gateway_requests_total{api="openai",status="200"} 1' in lines
    assert 'siglip_gateway_requests_total{api="openai",status="400"} 1' in lines
    assert 'siglip_gateway_requests_total{api="other",status="404"} 1' in lines
    assert 'siglip_gateway_inputs_total{kind="text"} 2' in lines
    assert 'siglip_gateway_inputs_total{kind="image"} 1' in lines
    assert 'siglip_gateway_request_seconds_count{api="openai"} 2' in lines
    assert 'siglip_gateway_request_seconds_bucket{api="openai",le="+Inf"} 2' in lines


def test_workers_share_their_counters(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"siglip_gateway_requests_total{api=\\"own\\",status=\\"200\\"}": 3}')
    counters = Counters(str(tmp_path))
    counters.request("own", 200, 0.1)
    assert 'siglip_gateway_requests_total{api="own",status="200"} 4' in counters.text(0, 0).splitlines()


def test_options_survive_their_way_to_a_worker() -> None:
    options = GatewayOptions(url_hosts=("a", "b"), normalized=False, timeout=2.5, api_key_file="f")
    assert GatewayOptions.from_json(options.to_json()) == options

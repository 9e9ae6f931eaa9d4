"""The launcher's own `GET /health`."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from siglip_serve.launcher import status as module
from siglip_serve.launcher.status import Status, StatusServer


@pytest.fixture
def server() -> Iterator[StatusServer]:
    serving = StatusServer(Status())
    serving.start()
    yield serving
    serving.close()


def ask(server: StatusServer, path: str = "/health", method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.url, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def told(server: StatusServer) -> tuple[int, dict[str, Any]]:
    code, body = ask(server)
    return code, json.loads(body)


def test_tells_a_life_of_a_server(server: StatusServer) -> None:
    status = server.status
    status.attempt("starting")
    code, facts = told(server)
    assert (code, facts["status"], facts["attempts"]) == (503, "starting", 1)
    assert datetime.fromisoformat(facts["since"]).tzinfo is not None
    status.served()
    assert told(server)[0] == 200
    status.model_died("siglip_vision_model")
    status.load(["siglip_vision_model"])
    code, facts = told(server)
    assert (code, facts["status"], facts["loading"]) == (200, "degraded", ["siglip_vision_model"])
    assert (facts["model_deaths"], facts["restarts"]) == (1, 0)
    status.died("tritonserver died (signal 9)")
    status.attempt("restarting")
    status.failed("the disk is gone")
    code, facts = told(server)
    assert (code, facts["status"], facts["failure"]) == (503, "restarting", "the disk is gone")
    assert facts["last_death"].endswith(": tritonserver died (signal 9)")
    assert facts["loading"] == []
    status.served()
    code, facts = told(server)
    assert (code, facts["status"], facts["restarts"], facts["failure"]) == (200, "serving", 1, None)
    status.stopping()
    assert told(server)[0] == 503


def test_since_is_the_time_of_the_last_change(server: StatusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_now", lambda: "later")
    server.status.attempt("starting")
    assert told(server)[1]["since"] != "later"
    server.status.served()
    assert told(server)[1]["since"] == "later"


def test_answers_nothing_but_health(server: StatusServer) -> None:
    assert ask(server, "/")[0] == 404
    assert ask(server, "/health/more")[0] == 404
    assert ask(server, method="POST")[0] == 501
    assert ask(server, method="HEAD") == (503, b"")


def test_holds_a_bounded_number_of_connections(server: StatusServer) -> None:
    host, port = server.url.split(":")
    silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(module._MOST_CALLS)]
    try:
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(server)
    finally:
        for connection in silent:
            connection.close()
    while True:  # the threads of the closed connections end one by one
        try:
            assert ask(server)[0] == 503
            break
        except (http.client.HTTPException, OSError):
            continue


def test_can_be_closed_without_having_been_started() -> None:
    StatusServer(Status()).close()

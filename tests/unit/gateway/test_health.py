"""The gateway's `/health`: a real inference of both towers, shared by callers."""

from __future__ import annotations

import time

import pytest
from gateways import WIDTH, StandIn, gateway
from siglip_serve_client.errors import ClientError, MissingModelError, ServerError, UnreachableError

MISSING = MissingModelError("NOT_FOUND: Request for unknown model: 'x' is not found")


def test_health_makes_one_inference_of_each_tower_per_second() -> None:
    stand_in = StandIn()
    with gateway(stand_in) as client:
        answers = [client.get("/health") for _ in range(5)]
    assert all(answer.json()["status"] == "healthy" for answer in answers)
    assert [call[0] for call in stand_in.calls] == ["health", "texts"]


def test_each_check_embeds_a_text_that_no_cache_holds() -> None:
    stand_in = StandIn()
    with gateway(stand_in) as client:
        seen: list[str] = []
        while len(seen) < 2:  # until a second check is made
            assert client.get("/health").status_code == 200
            seen = [call[-1] for call in stand_in.calls if call[0] == "texts"]
            time.sleep(0.05)
    assert all(seen)
    assert seen[0] != seen[1]


def test_health_tells_what_is_served() -> None:
    with gateway(StandIn(note="knows drawings only; for photographs serve another")) as client:
        assert client.get("/health").json() == {
            "status": "healthy",
            "model": "stand-in",
            "dimensions": WIDTH,
            "towers": {"image": "healthy", "text": "healthy"},
            "drawings_only": True,
            "note": "knows drawings only; for photographs serve another",
        }


@pytest.mark.parametrize(
    ("note", "drawings"),
    [
        ("knows drawn jerseys only; for photographs of players serve another", True),
        ("knows photographs and drawings", False),
        ("was fine-tuned; drawings only in part", False),
        ("", False),
    ],
)
def test_notes_tell_of_drawings(note: str, drawings: bool) -> None:
    with gateway(StandIn(note=note)) as client:
        answer = client.get("/health").json()
    assert answer["drawings_only"] is drawings
    assert answer["note"] == (note or None)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_that_fails_is_named(tower: str) -> None:
    other = {"image": "text", "text": "image"}[tower]
    with gateway(StandIn(broken={tower: ServerError("INTERNAL: broken")})) as client:
        answer = client.get("/health")
        ready = client.get("/.well-known/ready")
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "unhealthy",
        "reason": f"{tower}: the inference server failed: INTERNAL: broken",
        "failed": [tower],
        "towers": {tower: "failed", other: "healthy"},
    }
    assert ready.status_code == 502


def test_a_tower_that_is_not_served_is_no_failure() -> None:
    with gateway(StandIn(broken={"text": MISSING})) as client:
        answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json()["towers"] == {"image": "healthy", "text": "not served"}
    assert answer.json()["dimensions"] == WIDTH


@pytest.mark.parametrize("error", [MISSING, UnreachableError("no server answers")])
def test_a_server_without_towers_is_not_healthy(error: ClientError) -> None:
    with gateway(StandIn(broken={"image": error, "text": error})) as client:
        answer = client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["failed"] == ["image", "text"]

"""The fuzzer against a small server: it names the request that kills, and notices wrong neighbours."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import grpc  # type: ignore[import-untyped]
import numpy as np
from images import encode, photo
from raw_grpc import raw_grpc_server
from tritonclient.grpc import service_pb2

from tests.chaos.canaries import Canaries
from tests.chaos.cases import case
from tests.chaos.cases.base import Case, World
from tests.chaos.context import Site
from tests.chaos.fuzz import Fuzz
from tests.chaos.fuzz_table import tell
from tests.chaos.messages import of_array
from tests.chaos.processes import TRITON, Death
from tests.chaos.report import Report
from tests.chaos.server import Target

CASES = 60
WORLD = World({"jpeg": encode(photo(20, 20), "JPEG")}, {}, [], names=["jpeg"])


class Victim:
    """A server that dies of one message, fails at another, and mixes up some answers of its canary."""

    def __init__(self, deadly: bytes, failing: bytes, mixed_up: range) -> None:
        self._deadly, self._failing, self._mixed_up = deadly, failing, mixed_up
        self._asked = 0
        self.died: list[Death] = []
        self.grpc = self.http = ""
        self.owned, self.gave_up = True, False

    def deaths(self) -> list[Death]:
        return list(self.died)

    def wait_for_death(self, count: int, seconds: float) -> bool:
        time.sleep(seconds / 50)
        return len(self.died) > count

    def infer(self, request: bytes, context: Any) -> bytes:
        if request == b"canary":
            self._asked += 1
            return answer(0.8, 0.6) if self._asked in self._mixed_up else answer(0.6, 0.8)
        if request == self._deadly:
            self.died.append(Death(TRITON, time.monotonic(), (len(self.died),)))
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if request == self._failing:
            context.abort(grpc.StatusCode.INTERNAL, "internal error (TypeError)")
        time.sleep(0.01)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
        return b""


def answer(*values: float) -> bytes:
    made = service_pb2.ModelInferResponse()
    tensor = of_array("EMBEDDING", np.array([values], np.float32))
    made.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    made.raw_output_contents.append(tensor.data)
    return bytes(made.SerializeToString())


async def attack(victim: Victim, report: Report) -> Fuzz:
    canaries = Canaries()
    canaries.learned({"embed": b"canary"}, {"embed": {"EMBEDDING": np.array([[0.6, 0.8]], np.float32)}})
    with raw_grpc_server(victim.infer) as victim.grpc:
        fuzz = Fuzz(Site(cast(Target, victim), canaries), WORLD, report, range(CASES), 1, ["text"])
        await fuzz.run(4, 60)
        fuzz.served.append(time.monotonic())
        await tell(report, fuzz, 1.0)
    return fuzz


def over_grpc() -> list[Case]:
    made = [case("text", 1, number, WORLD) for number in range(CASES)]
    bodies = [one.sent.body for one in made]
    return [one for one in made if one.sent.via == "grpc" and bodies.count(one.sent.body) == 1]


def test_the_request_that_kills_is_found(tmp_path: Path) -> None:
    cases, report = over_grpc(), Report(tmp_path)
    deadly = cases[len(cases) // 2]
    fuzz = asyncio.run(attack(Victim(deadly.sent.body, b"none", range(0)), report))
    assert [(finding.kind, finding.case) for finding in report.findings] == [("death", deadly.name)]
    assert len(fuzz.died) == 1
    assert {row.check for row in report.rows if row.fault} == {"deaths of processes"}


def test_a_failure_and_a_wrong_neighbour_are_found(tmp_path: Path) -> None:
    failing, report = over_grpc()[3], Report(tmp_path)
    fuzz = asyncio.run(attack(Victim(b"none", failing.sent.body, range(2, 3)), report))
    assert [finding.case for finding in report.findings if finding.kind == "INTERNAL"] == [failing.name]
    assert fuzz.wrong == 1
    assert fuzz.tally.total == sum(case("text", 1, n, WORLD).sent.via == "grpc" for n in range(CASES))
    assert {row.check for row in report.rows if row.fault} == {"INTERNAL", "wrong answers to these"}


def test_a_server_without_faults_has_none(tmp_path: Path) -> None:
    report = Report(tmp_path)
    fuzz = asyncio.run(attack(Victim(b"none", b"none", range(0)), report))
    assert fuzz.canaries_sent > 0
    assert report.faults == 0

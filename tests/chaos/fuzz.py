"""Hostile requests of all kinds, many at a time, while honest ones are compared with their right answers."""

from __future__ import annotations

import asyncio
import csv
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from tests.chaos.canaries import requests
from tests.chaos.cases import case, kind_of_number
from tests.chaos.cases.base import Case, World, build_world
from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.fuzz_table import tell
from tests.chaos.messages import INFER, http_bytes
from tests.chaos.processes import HELPER, Death
from tests.chaos.report import Report
from tests.chaos.verdicts import Answered, Tally, suspects
from tests.chaos.wires import GrpcWire, HttpWire, Outcome, Reply

__all__ = ["Fuzz", "run", "send"]

_BACK = 240.0  # seconds for a server to come back
_PAUSE = 0.05  # seconds between canaries of one caller
_INVESTIGATED = 8  # deaths after which the cases under way are sent again one by one
_ALONE = 60.0  # seconds for a case that is sent again alone


async def send(item: Case, grpc: GrpcWire, http: HttpWire, tcp: HttpWire, limit: float = 10.0) -> Reply:
    """Send the bytes of a case."""
    sent = item.sent
    if sent.via == "grpc":
        return await grpc.send(sent.method, sent.body, sent.stream, limit)
    wire, whole = (http, sent.whole) if sent.via == "http" else (tcp, False)
    return await wire.send(sent.body, sent.framed and sent.via == "http", whole, limit)


class Fuzz:
    """One run of the fuzzer.

    Args:
        site: the server.
        world: what cases are made from.
        report: receives findings.
        numbers: of the cases.
        seed: of the cases.
        kinds: of the cases, or none for all.
    """

    def __init__(
        self, site: Site, world: World, report: Report, numbers: range, seed: int, kinds: list[str]
    ) -> None:
        self.site, self.world, self.report = site, world, report
        self.seed, self.kinds = seed, kinds
        self.tally = Tally()
        self.canary_seconds: list[float] = []
        self.wrong = self.canaries_failed = self.canaries_sent = 0
        self.canary_replies: list[Answered] = []
        self.served: list[float] = []
        self.died: list[Death] = []  # without those of cases that were sent again
        self._recent: deque[Answered] = deque(maxlen=600)
        self._left: Iterator[int] = iter(numbers)
        self._open = asyncio.Event()
        self._open.set()
        self._busy = 0
        self._done = False
        self._bar = tqdm(total=len(numbers), desc="fuzz", unit="case", smoothing=0.02)

    async def run(self, in_flight: int, seconds: float) -> None:
        """Send all cases, `in_flight` at a time, for `seconds` at most."""
        async with GrpcWire(self.site.target.grpc) as grpc:
            others = [asyncio.create_task(self._canaries(via)) for via in ("grpc", "http")]
            others.append(asyncio.create_task(self._guard()))
            workers = [asyncio.create_task(self._work(grpc)) for _ in range(in_flight)]
            _, late = await asyncio.wait(workers, timeout=seconds)
            self._done = True
            for task in late:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await asyncio.gather(*others)
        self._bar.close()
        for task in workers:
            if not task.cancelled() and task.exception():
                raise task.exception() or RuntimeError
        if late:
            self.report.find("fuzz", "cut", f"{self.tally.total} cases sent within {seconds:.0f} s")

    async def _work(self, grpc: GrpcWire) -> None:
        target = self.site.target
        http, tcp = HttpWire(target.http), HttpWire(target.grpc)
        for number in self._left:
            kind = kind_of_number(self.seed, number, self.kinds)
            item = case(kind, self.seed, number, self.world)
            if item.sent.via == "http" and not target.http:
                continue
            await self._open.wait()
            self._busy += 1
            try:
                reply = await send(item, grpc, http, tcp)
            finally:
                self._busy -= 1
            answered = Answered(item.name, item.kind, replace(reply, body=b""))
            self.tally.note(answered)
            self._recent.append(answered)
            self._bar.update()
            if reply.outcome is Outcome.LOST:
                await asyncio.sleep(0.3)  # the guard notes the death, or the server comes back
        await http.close()
        await tcp.close()

    async def _canaries(self, via: str) -> None:
        """Ask honest requests, one after the other, all the time."""
        canaries, target = self.site.canaries, self.site.target
        if via == "http" and not target.http:
            return
        http = HttpWire(target.http)
        bodies = {name: http_bytes(request) for name, request in requests(canaries.state).items()}
        async with GrpcWire(target.grpc, 1) as grpc:
            for name in itertools.cycle(canaries.names):
                if self._done:
                    break
                await self._open.wait()
                if via == "grpc":
                    reply = await grpc.send(INFER, canaries.messages[name])
                else:
                    reply = await http.send(bodies[name])
                self._judge_canary(name, via, reply)
                await asyncio.sleep(_PAUSE)
        await http.close()

    def _judge_canary(self, name: str, via: str, reply: Reply) -> None:
        self.canaries_sent += 1
        if reply.outcome is Outcome.ANSWERED:
            self.canary_seconds.append(reply.seconds)
            wrong = self.site.canaries.check(name, reply.body, via)
            if wrong:
                self.wrong += 1
                under_way = ", ".join(answered.name for answered in list(self._recent)[-20:])
                self.report.find("fuzz", "wrong neighbour", f"{wrong}; just before: {under_way}")
        else:
            self.canary_replies.append(Answered(f"{name} over {via}", "canary", reply))

    async def _guard(self) -> None:
        """After a death let the requests end, wait until the server is back, and look for the cause."""
        seen = 0
        while not self._done:
            await asyncio.sleep(0.25)
            deaths = self._deaths()
            if len(deaths) <= seen and not self.site.target.gave_up:
                continue
            self._open.clear()
            deadline = time.monotonic() + 12
            while self._busy and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            await self._come_back()
            for death in self._deaths()[seen:]:
                await self._investigate(death)
            seen = len(self._deaths())
            self._open.set()

    def _deaths(self) -> list[Death]:
        return [death for death in self.site.target.deaths() if not death.kind.endswith(HELPER)]

    async def _come_back(self) -> None:
        took = await wait_until_right(self.site, _BACK)
        if took is None:
            state = "the launcher gave up" if self.site.target.gave_up else f"not served after {_BACK:.0f} s"
            self.report.find("fuzz", "not back", state)
            if not self.site.target.owned:
                raise SystemExit(f"fuzz: {state}")
            await asyncio.to_thread(self.site.target.restart)
            await wait_until_right(self.site, _BACK)
        self.served.append(time.monotonic())

    async def _investigate(self, death: Death) -> None:
        """Send the cases that were under way again, one by one, until the process dies again."""
        names = suspects(death, self._recent)
        self.died.append(death)
        if len(self.died) > _INVESTIGATED:
            self.report.find("fuzz", "death", f"{death.kind}; under way: {', '.join(names[:12])}")
            return
        before = len(self._deaths())
        for name in names:
            await self.again(name)
            died = await asyncio.to_thread(self.site.target.wait_for_death, before, 0.5)
            if died or self.site.target.gave_up:
                self.report.find("fuzz", "death", f"{death.kind} by this request alone", name)
                await self._come_back()
                return
        self.report.find("fuzz", "death", f"{death.kind}; by none of these alone: {', '.join(names[:12])}")

    async def again(self, name: str, limit: float = _ALONE) -> tuple[Case, Reply]:
        """Send the case of a name again, alone."""
        kind, seed, number = name.split(":")
        item = case(kind, int(seed), int(number), self.world)
        http, tcp = HttpWire(self.site.target.http), HttpWire(self.site.target.grpc)
        async with GrpcWire(self.site.target.grpc, 1) as grpc:
            reply = await send(item, grpc, http, tcp, limit)
        await http.close()
        await tcp.close()
        return item, reply


async def run(context: Context) -> None:
    """Run the fuzzer, and add its lines to the table."""
    options = context.options
    async with context.site("fuzz") as site:
        world = await asyncio.to_thread(build_world, site.canaries.state, _width(site))
        if options.case:
            await _run_named(context, site, world)
            return
        numbers = range(options.first_case, options.first_case + options.cases)
        fuzz = Fuzz(site, world, context.report, numbers, options.seed, options.kinds)
        begin = time.monotonic()
        await fuzz.run(options.in_flight, options.fuzz_minutes * 60)
        seconds = time.monotonic() - begin
        await wait_until_right(site, _BACK)
        fuzz.served.append(time.monotonic())
        await tell(context.report, fuzz, seconds)
    with (context.folder / "fuzz.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", *Outcome])
        writer.writerows(
            [kind, *(count[name] for name in Outcome)] for kind, count in fuzz.tally.counts.items()
        )


def _width(site: Site) -> int:
    return int(site.canaries.right["embed_text"]["EMBEDDING"].shape[1])


async def _run_named(context: Context, site: Site, world: World) -> None:
    """Send the named cases one by one, and say how each ends."""
    fuzz = Fuzz(site, world, context.report, range(0), context.options.seed, [])
    for name in context.options.case:
        before = len(site.target.deaths())
        item, reply = await fuzz.again(name)
        died = await asyncio.to_thread(site.target.wait_for_death, before, 2.0)
        bad = died or reply.outcome in {Outcome.LOST, Outcome.INTERNAL, Outcome.HANG}
        told = f"{reply.outcome} {reply.status} after {reply.seconds:.2f} s"
        told += ", a process died" if died else ""
        context.report.add("fuzz", f"{name}: {item.about}", f"{told} {reply.message[:300]}", "", bad)
        if died:
            await wait_until_right(site, _BACK)

"""Kill and stop every kind of process under load, and count what the callers of the clients notice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tqdm import tqdm

from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.processes import HELPER, TRITON
from tests.chaos.report import Report, percentile
from tests.chaos.traffic import Ask, Traffic

__all__ = ["Blow", "blame", "run", "tell"]

_BACK = 180.0
_STOPS = (1.0, 3.0, 10.0, 28.0)  # seconds that a stopped process does not run
_LIMIT = 10.0  # seconds within which tritonserver has to be served again


@dataclass(frozen=True)
class Blow:
    """A signal to a process.

    Attributes:
        kind: of the process.
        how: `kill` or `stop`.
        at: time.monotonic() of the signal.
        end: when all models answered right again.
        back: False if they never did.
        others: kinds of further processes that ended.
    """

    kind: str
    how: str
    at: float
    end: float
    back: bool = True
    others: tuple[str, ...] = ()


def blame(blows: Sequence[Blow], asked: Iterable[Ask]) -> dict[int, list[Ask]]:
    """Give each call to the last blow before its end, by the blow's index; -1 stands for none."""
    found: dict[int, list[Ask]] = {index: [] for index in range(-1, len(blows))}
    for ask in asked:
        index = max((i for i, blow in enumerate(blows) if blow.at <= ask.end), default=-1)
        found[index].append(ask)
    return found


def tell(report: Report, blows: Sequence[Blow], asked: Sequence[Ask], lost: int) -> None:
    """Add a line for each kind of process and signal."""
    blamed = blame(blows, asked)
    for how, kind in sorted({(blow.how, blow.kind) for blow in blows}):
        chosen = [index for index, blow in enumerate(blows) if (blow.how, blow.kind) == (how, kind)]
        asks = [ask for index in chosen for ask in blamed[index]]
        errors, wrong = sum(bool(ask.error) for ask in asks), sum(bool(ask.wrong) for ask in asks)
        back = [blows[index].end - blows[index].at for index in chosen if blows[index].back]
        never = len(chosen) - len(back)
        others = sorted({other for index in chosen for other in blows[index].others})
        text = f"{len(asks)} calls, {errors} errors, {wrong} wrong, longest wait {_longest(asks):.1f} s; "
        text += f"served again after {percentile(back, 0.5):.1f} s, longest {max(back, default=0):.1f} s"
        text += f", {never} times never" if never else ""
        text += f"; ended too: {', '.join(others)}" if others else ""
        late = how == "kill" and kind == TRITON and max(back, default=0) > _LIMIT
        expected = "0 errors, 0 wrong" + (f", back within {_LIMIT:.0f} s" if kind == TRITON else "")
        report.add(
            "kills",
            f"{how} {kind}, {len(chosen)} times",
            text,
            expected,
            bool(errors or wrong or never or late),
        )
    for ask in asked:
        if ask.error or ask.wrong:
            report.find(
                "kills", "wrong" if ask.wrong else "error", f"{ask.client} {ask.name}: {ask.error}{ask.wrong}"
            )
    outside = [ask for ask in blamed[-1] if ask.error or ask.wrong]
    report.add("kills", "errors before the first signal", len(outside), "0", bool(outside))
    report.add("kills", "answers lost", lost, "0", bool(lost))


def _longest(asks: Sequence[Ask]) -> float:
    return max((ask.seconds for ask in asks), default=0.0)


async def run(context: Context) -> None:
    """Kill each kind of process `--kills` times and stop it `--stops` times."""
    options = context.options
    async with context.site("kills") as site:
        if not site.target.members():
            context.report.add(
                "kills", "could not be run", "the server's processes are unknown: --launcher-pid", "", True
            )
            return
        rng = random.Random(f"kills:{options.seed}")
        traffic = Traffic(
            site.target.grpc, site.target.http, site.canaries.state, options.tolerance, options.seed
        )
        await traffic.learn()
        before = site.target.shared_memory()
        plan = _plan(site, options.kills, options.stops, options.kill_kinds)
        blows: list[Blow] = []
        end = time.monotonic() + options.kills_minutes * 60
        async with traffic.running(options.callers):
            for kind, how in tqdm(plan, desc="kills", unit="signal"):
                if time.monotonic() > end:
                    context.report.find("kills", "cut", f"{len(blows)} of {len(plan)} signals sent")
                    break
                await asyncio.sleep(rng.uniform(0.2, 2.0))
                blow = await _strike(site, kind, how, rng, len(blows))
                if blow is None:
                    continue
                blows.append(blow)
                if not blow.back:
                    context.report.find("kills", "not back", f"{how} {kind}: not served within {_BACK:.0f} s")
                    if not site.target.owned:
                        break
                    await asyncio.to_thread(site.target.restart)
                    break
        tell(context.report, blows, traffic.asked, traffic.lost)
        await asyncio.sleep(2)
        after = site.target.shared_memory()
        more = len(after) - len(before)
        text = f"{len(after)} files, {sum(after.values()) / 2**20:.0f} MiB"
        expected = f"{len(before)} files, {sum(before.values()) / 2**20:.0f} MiB as before"
        context.report.add("kills", "in /dev/shm after the last", text, expected, more > 0)


def _plan(site: Site, kills: int, stops: int, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Order the signals so that every kind has its first one early."""
    found = sorted({kind for kind in site.target.members().values() if not kind.endswith(HELPER)})
    chosen = [kind for kind in found if not kinds or kind in kinds]
    plan = []
    for number in range(max(kills, stops)):
        plan += [(kind, "kill") for kind in chosen if number < kills]
        plan += [(kind, "stop") for kind in chosen if number < stops]
    return plan


async def _strike(site: Site, kind: str, how: str, rng: random.Random, number: int) -> Blow | None:
    """Send one signal, and wait until the server is right again."""
    target = site.target
    pids = [pid for pid, other in target.members().items() if other == kind]
    if not pids:
        return None
    pid, before, at = rng.choice(pids), len(target.deaths()), time.monotonic()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    if how == "stop":
        await asyncio.sleep(_STOPS[number % len(_STOPS)])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.5)
    else:
        await asyncio.to_thread(target.wait_for_death, before, 5.0)
    took = await wait_until_right(site, _BACK)
    ended = {death.kind for death in target.deaths()[before:]}
    others = tuple(sorted(ended - {kind} if how == "kill" else ended))
    return Blow(kind, how, at, time.monotonic(), took is not None, others)

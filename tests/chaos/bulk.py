"""Kill the processes of bulk jobs at random, and compare what they leave with an undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.bulk_cluster import RayCluster
from tests.chaos.bulk_job import UNIT, BulkJob, Flaws, compare, make_inputs, states
from tests.chaos.context import Context
from tests.chaos.server import ChaosError

__all__ = ["run"]

_IN_FLIGHT = 3  # units of a worker, at most
_LONGEST = 570.0  # seconds of a job
_PAUSE = (2.0, 12.0)  # seconds between two kills
_ENDED = (0, 1)  # exit statuses; 1: pictures that cannot be decoded
_WORKER, _DECODER = "siglip_serve.bulk.worker_process", "siglip_serve.bulk.decoder"

_Blows = Mapping[str, Callable[[], bool]]  # each returns False if there is nothing to kill


async def run(context: Context) -> None:
    """Run the jobs that `--bulk-on` names."""
    options, folder = context.options, context.folder / "bulk"
    inputs = make_inputs(folder.absolute() / "input", options.pictures, options.seed)
    common = [*inputs, "--checkpoint", options.checkpoint, "--unit-items", str(UNIT), "--device", "cpu"]
    common += ["--threads", "1"]
    if not (folder / "right.done").exists():
        begin = time.monotonic()
        job = _job(folder, "right", common)
        job.start()
        _end(job)
        (folder / "right.done").touch()
        seconds = time.monotonic() - begin
        context.report.add("bulk", "undisturbed", f"{options.pictures} pictures in {seconds:.0f} s")
    for kind in options.bulk_on:
        shutil.rmtree(folder / kind, ignore_errors=True)
        _attack(context, kind, common)


def _job(folder: Path, name: str, common: list[str], *further: str) -> BulkJob:
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    return BulkJob([*common, "-o", str(folder / name), *further], log)


def _end(job: BulkJob) -> None:
    status = job.wait(_LONGEST)
    if status not in _ENDED:
        raise ChaosError(f"the job ended with status {status}, expected 0 or 1; its log is {job.log}")


def _attack(context: Context, kind: str, common: list[str]) -> None:
    """Kill processes of a job as often as asked for, restart its driver, and compare its output."""
    folder, options = context.folder / "bulk", context.options
    chance = random.Random(options.seed)
    begin = time.monotonic()
    if kind == "ray":
        with RayCluster() as cluster:
            further = ("--on", "ray", "--address", cluster.address)
            job = _job(folder, kind, common, *further)
            blows = {**_of_driver(job), "actor": cluster.kill_actor, "raylet": cluster.kill_raylet}
            blows["decoder"] = cluster.kill_decoder
            struck, redone = _strike(job, blows, folder / kind, options.bulk_kills, chance)
            left = job.left_over() + cluster.left_over()
    else:
        job = _job(folder, kind, common)
        blows = {**_of_driver(job), "group": _group(job)}
        blows |= {"worker": _one(job, _WORKER, chance), "decoder": _one(job, _DECODER, chance)}
        struck, redone = _strike(job, blows, folder / kind, options.bulk_kills, chance)
        left = job.left_over()
    seconds = time.monotonic() - begin
    _tell(context, kind, struck, redone, compare(folder / kind, folder / "right"))
    again = job.done_again()
    most = max(again, default=0)
    add = context.report.add
    what = f"{most} at most, {sum(again)} in {len(again)} deaths of workers"
    add("bulk", f"{kind}: units done again after a death", what, f"{_IN_FLIGHT} at most", most > _IN_FLIGHT)
    add("bulk", f"{kind}: processes left", left, "0", left > 0)
    add("bulk", f"{kind}: seconds", f"{seconds:.0f}, {job.starts} starts of the driver")


def _strike(
    job: BulkJob, blows: _Blows, output: Path, kills: int, chance: random.Random
) -> tuple[Counter[str], int]:
    """Run a job to its end under blows. Returns their kinds, and finished files that were written again."""
    struck: Counter[str] = Counter()
    kept: dict[str, tuple[int, int]] = {}
    redone = 0
    job.start()
    end = time.monotonic() + _LONGEST
    while sum(struck.values()) < kills and time.monotonic() < end:
        time.sleep(chance.uniform(*_PAUSE))
        if not job.running():
            if job.wait(1) in _ENDED:
                break  # finished
            job.start()
            continue
        now = states(output)
        redone += sum(now.get(name) != state for name, state in kept.items())
        kept = now
        kind = chance.choice(sorted(blows))
        with suppress(psutil.NoSuchProcess):
            struck[kind] += blows[kind]()
    if not job.running() and job.wait(1) not in _ENDED:
        job.start()
    _end(job)
    now = states(output)
    return struck, redone + sum(now.get(name) != state for name, state in kept.items())


def _of_driver(job: BulkJob) -> dict[str, Callable[[], bool]]:
    def kill() -> bool:
        job.members("")
        if job.process is None or not job.running():
            return False
        job.process.kill()
        job.process.wait()
        return True

    return {"driver": kill}


def _group(job: BulkJob) -> Callable[[], bool]:
    def kill() -> bool:
        job.members("")
        job.kill_group()
        return True

    return kill


def _one(job: BulkJob, words: str, chance: random.Random) -> Callable[[], bool]:
    def kill() -> bool:
        found = job.members(words)
        if found:
            chance.choice(found).kill()
        return bool(found)

    return kill


def _tell(context: Context, kind: str, struck: Counter[str], redone: int, flaws: Flaws) -> None:
    add, pictures = context.report.add, context.options.pictures
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(struck.items()))
    add("bulk", f"{kind}: kills", f"{sum(struck.values())}: {kinds}", f"{context.options.bulk_kills}")
    lost = pictures - flaws.items
    add(
        "bulk",
        f"{kind}: pictures missing, twice",
        f"{lost}, {flaws.twice} of {pictures}",
        "0, 0",
        bool(lost or flaws.twice),
    )
    wrong = [*flaws.missing, *flaws.further, *flaws.different]
    for name in wrong:
        context.report.find("bulk", "file that differs", f"{kind}: {name}")
    add(
        "bulk",
        f"{kind}: files missing, further, different from an undisturbed run's",
        f"{len(flaws.missing)}, {len(flaws.further)}, {len(flaws.different)}",
        "0, 0, 0",
        bool(wrong),
    )
    add("bulk", f"{kind}: finished files written again", redone, "0", redone > 0)

"""Requests full of the costliest pictures, and how long another caller waits beside them."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from benchmarks.crafted_files import craft
from benchmarks.decode_bombs import measure, preprocessor
from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.deadlines import Patient
from tests.chaos.messages import INFER, Infer, grpc_bytes, of_rows
from tests.chaos.report import Report
from tests.chaos.wires import GrpcWire

__all__ = ["costliest", "run", "tell"]

_REQUESTS, _ROWS = 2, 128
_MOST_BYTES = 3 * 2**20  # of a file, so that as many rows fit into a request
_LIMIT = 1000.0  # milliseconds
_REFUSED = 0.01  # of the other caller's requests


def tell(report: Report, kind: str, size: int, patient: Patient, answers: Counter[str]) -> None:
    """Add the lines of one format.

    Args:
        report: receives them.
        kind: the format.
        size: bytes of the picture.
        patient: the other caller.
        answers: of the requests of such pictures, by outcome and status.
    """
    told = ", ".join(f"{count} {answer}" for answer, count in sorted(answers.items()))
    name = f"{_REQUESTS} x {_ROWS} of the costliest {kind}"
    report.add("neighbours", f"{name}, {size} bytes each", told)
    text = f"p99 {patient.p99:.0f} ms, longest {max(patient.seconds, default=0) * 1000:.0f} ms"
    slow = not patient.seconds or patient.p99 > _LIMIT
    report.add(
        "neighbours",
        f"{name}: the other caller, {len(patient.seconds)} answers",
        text,
        f"p99 {_LIMIT:.0f} ms at most",
        slow,
    )
    many = patient.refused > _REFUSED * (len(patient.seconds) + patient.refused)
    report.add("neighbours", f"{name}: its refusals", patient.refused, f"{_REFUSED:.0%} at most", many)
    bad = f"{len(patient.failed)}, {patient.wrong}"
    report.add("neighbours", f"{name}: its failures, wrong answers", bad, "0, 0", bad != "0, 0")


def costliest(kind: str, count: int, seed: int) -> bytes:
    """Find the crafted file that takes the most CPU time, of those that fit into a full request."""
    decode = preprocessor("fast")
    try:
        files = (file for file in craft(kind, count, seed) if len(file) <= _MOST_BYTES)
        return max(files, key=lambda file: measure(decode, file).seconds)
    finally:
        decode.close()


async def run(context: Context) -> None:
    """Send requests full of the costliest file of each format beside a caller of small pictures."""
    options = context.options
    found = {
        kind: await asyncio.to_thread(costliest, kind, options.crafted, options.seed)
        for kind in tqdm(options.formats, desc="neighbours: costliest files", unit="format")
    }
    async with context.site("neighbours") as site:
        for kind, file in tqdm(found.items(), desc="neighbours", unit="format"):
            await _one(context, site, kind, file, options.neighbours_seconds)
            await wait_until_right(site, 120)


async def _one(context: Context, site: Site, kind: str, file: bytes, seconds: float) -> None:
    patient = Patient()
    # In a process of its own: the other caller would wait for hundreds of megabytes in its own event loop.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        loop = asyncio.get_running_loop()
        flood = loop.run_in_executor(pool, send, site.target.grpc, file, seconds)
        end = asyncio.create_task(asyncio.sleep(seconds))
        await patient.ask(site, end)
        answers = await flood
    tell(context.report, kind, len(file), patient, answers)


def send(address: str, file: bytes, seconds: float) -> Counter[str]:
    """Keep requests of 128 times a file in flight. Returns the answers by outcome and status."""
    return asyncio.run(_send(address, grpc_bytes(_full(file)), seconds))


async def _send(address: str, message: bytes, seconds: float) -> Counter[str]:
    answers, end = Counter[str](), time.monotonic() + seconds

    async def repeat() -> None:
        async with GrpcWire(address, 1) as wire:
            while time.monotonic() < end:
                reply = await wire.send(INFER, message, limit=120)
                answers[f"{reply.outcome} {reply.status}".strip()] += 1

    await asyncio.gather(*(repeat() for _ in range(_REQUESTS)))
    return answers


def _full(file: bytes) -> Infer:
    return Infer("embed_image", [of_rows("INPUT_IMAGE", [file] * _ROWS)])

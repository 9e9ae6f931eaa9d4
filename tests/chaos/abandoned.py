"""Requests whose callers have gone: computed for no caller, and in the way of none."""

from __future__ import annotations

import asyncio
import statistics
import urllib.request
from collections.abc import Awaitable, Callable

import grpc  # type: ignore[import-untyped]
from siglip_serve_client import AsyncClient
from siglip_serve_client.errors import ClientError

from tests.chaos.canaries import requests
from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.messages import INFER, grpc_bytes, of_rows
from tests.chaos.report import Report
from tests.chaos.wires import GrpcWire

__all__ = ["decoded", "run", "tell"]

_COUNT = 800
_PATIENCE = 0.2  # seconds
_MOST, _LATER = 5, 0.1  # images computed for no caller, seconds that the next caller waits longer


def decoded(metrics: str) -> float:
    """The number of images that a server has decoded, from the text of its metrics."""
    lines = [line for line in metrics.splitlines() if line.startswith("siglip_serve_images_total")]
    return sum(float(line.split()[-1]) for line in lines)


def tell(report: Report, name: str, gone: int, wait: float, usual: float, computed: float | None) -> None:
    """Add the lines of one kind of caller."""
    report.add("abandoned", f"{name}: callers that gave up", f"{gone} of {_COUNT}")
    late = wait > usual + _LATER
    text = f"{wait * 1000:.0f} ms, usually {usual * 1000:.0f} ms"
    report.add("abandoned", f"{name}: wait of the next caller", text, f"{_LATER:g} s more at most", late)
    if computed is not None:
        many = computed > _MOST
        report.add(
            "abandoned", f"{name}: images decoded for no caller", f"{computed:.0f}", f"{_MOST} at most", many
        )


async def run(context: Context) -> None:
    """Send 800 requests at once of callers that give up after 0.2 s, over each protocol and by the client."""
    from images import encode, photo

    async with context.site("abandoned") as site:
        picture = encode(photo(500, 375, 95), "JPEG", quality=90)
        request = requests()["embed_image jpeg"]
        message = grpc_bytes(type(request)("embed_image", [of_rows("INPUT_IMAGE", [picture])]))
        kinds = {"a gRPC deadline alone": _by_deadline(site, message)}
        kinds["the client over gRPC"] = _by_client(f"grpc://{site.target.grpc}", picture)
        if site.target.http:
            kinds["the client over HTTP"] = _by_client(f"http://{site.target.http}", picture)
        for name, abandon in kinds.items():
            async with GrpcWire(site.target.grpc, 1) as wire:
                waits = [(await wire.send(INFER, message)).seconds for _ in range(20)]
                usual = statistics.median(waits)
                gone = await abandon()
                before = await _decoded(site)
                wait = (await wire.send(INFER, message, limit=60)).seconds
                await asyncio.sleep(2)
                after = await _decoded(site)
            computed = None if before is None or after is None else max(after - before - 1, 0)
            tell(context.report, name, gone, wait, usual, computed)
            await wait_until_right(site, 120)


def _by_deadline(site: Site, message: bytes) -> Callable[[], Awaitable[int]]:
    async def abandon() -> int:
        async with grpc.aio.insecure_channel(site.target.grpc) as channel:
            call = channel.unary_unary(INFER)

            async def one() -> bool:
                try:
                    await call(message, timeout=_PATIENCE)
                except grpc.aio.AioRpcError:
                    return True
                return False

            return sum(await asyncio.gather(*(one() for _ in range(_COUNT))))

    return abandon


def _by_client(url: str, picture: bytes) -> Callable[[], Awaitable[int]]:
    async def abandon() -> int:
        async with AsyncClient(url, concurrency=_COUNT, timeout=_PATIENCE) as client:

            async def one() -> bool:
                try:
                    await client.embed_image(picture)
                except ClientError:
                    return True
                return False

            return sum(await asyncio.gather(*(one() for _ in range(_COUNT))))

    return abandon


async def _decoded(site: Site) -> float | None:
    if not site.target.metrics:
        return None

    def read() -> float:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{site.target.metrics}/metrics", timeout=10) as answer:
            return decoded(answer.read().decode())

    return await asyncio.to_thread(read)

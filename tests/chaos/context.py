"""Options, report and server of a part of the suite."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.canaries import Canaries
from tests.chaos.report import Report
from tests.chaos.server import ChaosError, Recipe, Target
from tests.chaos.wires import GrpcWire

__all__ = ["Context", "Site", "wait_until_right"]


@dataclass(frozen=True)
class Site:
    """A served server whose right answers are known."""

    target: Target
    canaries: Canaries


@dataclass(frozen=True)
class Context:
    """Options and report of a run.

    Attributes:
        options: of the command line.
        report: receives rows and findings.
        recipe: of the servers that parts start.
    """

    options: argparse.Namespace
    report: Report
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Folder of the output."""
        return self.report.folder

    @asynccontextmanager
    async def site(self, name: str) -> AsyncIterator[Site]:
        """Run a server for a part, or take the one of `--url`, and learn its right answers."""
        options = self.options
        given = {
            "grpc": options.url or "",
            "http": options.http_url or "",
            "metrics": options.metrics_url or "",
        }
        recipe = None if options.url else self.recipe
        target = Target(recipe, self.folder / f"{name}.server.log", given, options.launcher_pid)
        await asyncio.to_thread(target.__enter__)
        try:
            canaries = Canaries(options.tolerance)
            async with GrpcWire(target.grpc, 1) as wire:
                await canaries.learn(wire)
            yield Site(target, canaries)
        finally:
            await asyncio.to_thread(target.stop)


async def wait_until_right(site: Site, seconds: float) -> float | None:
    """Wait until all canaries are answered right, and return the seconds that it took; None if never."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        try:
            async with GrpcWire(site.target.grpc, 1) as wire:
                if not await site.canaries.all_right(wire):
                    return time.monotonic() - begin
        except ChaosError:
            pass
        if site.target.gave_up:
            return None
        await asyncio.sleep(0.2)
    return None

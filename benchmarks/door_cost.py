"""CPU time of the gRPC door per call, compared with a process of grpc.aio that passes calls on unseen.

    python -m benchmarks.door_cost --output benchmarks/results/door_cost.csv

A server that answers 3 kB at once stands for Triton. Both ways take the same load in alternating rounds. A
row has the medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import grpc  # type: ignore[import-untyped]
import psutil

from benchmarks.load_clients import infer_request
from benchmarks.records import about, publish
from siglip_serve.launcher.ports import free_ports

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_ANSWER = bytes(3000)
_ANY_SIZE = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_SECONDS = 30.0  # deadline of a call; the door writes what is left of it into the request


def main() -> None:
    """Run the comparison and write the table."""
    options = _parser().parse_args()
    triton, passing, door = free_ports("127.0.0.1", {"triton": 0, "passing": 0, "door": 0})
    command = [sys.executable, "-m", "siglip_gateway.doors", "grpc"]
    command += ["--listen", f"127.0.0.1:{door}", "--triton", f"127.0.0.1:{triton}"]
    rows = []
    with (
        _grpc_process(triton, None),
        _grpc_process(passing, triton) as bare,
        subprocess.Popen(command) as ours,
    ):
        try:
            ways = {"grpc.aio alone": (passing, bare), "door": (door, ours.pid)}
            for size in options.sizes:
                rows += _measure(ways, size, options)
        finally:
            ours.terminate()
    publish(rows, ("grpcio", "uvloop"), options.output)


def _measure(
    ways: dict[str, tuple[int, int]], size: int, options: argparse.Namespace
) -> list[dict[str, str]]:
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way in sorted(ways, reverse=bool(turn % 2)):
            port, pid = ways[way]
            measured = asyncio.run(_ask(port, pid, infer_request("embed_image", [bytes(size)]), options))
            if turn:  # the first is to warm up
                found[way].append(measured)
    rows = []
    for way, rounds in found.items():
        user, system, rate = (median(column) for column in zip(*rounds, strict=True))
        rows.append(
            {
                **about(("grpcio", "uvloop")),
                "way": way,
                "request_bytes": str(size),
                "in_flight": str(options.in_flight),
                "calls": str(options.calls),
                "rounds": str(options.rounds),
                "cpu_ms": f"{median(user + system for user, system, _ in rounds):.3f}",
                "user_ms": f"{user:.3f}",
                "system_ms": f"{system:.3f}",
                "calls_per_second": f"{rate:.0f}",
            }
        )
    return rows


async def _ask(
    port: int, pid: int, request: bytes, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Send calls; return the user and system time of a process in ms per call, and calls per second."""
    left = options.calls
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        infer = channel.unary_unary(_METHOD)
        await infer(request, wait_for_ready=True)

        async def caller() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                if len(await infer(request, timeout=_SECONDS)) != len(_ANSWER):
                    raise ValueError("the answer is not that of the server")

        process, begin = psutil.Process(pid), time.perf_counter()
        before = process.cpu_times()
        await asyncio.gather(*(caller() for _ in range(options.in_flight)))
        after, seconds = process.cpu_times(), time.perf_counter() - begin
    share = 1000 / options.calls
    user, system = after.user - before.user, after.system - before.system
    return user * share, system * share, options.calls / seconds


@contextmanager
def _grpc_process(port: int, triton: int | None) -> Iterator[int]:
    """Run a server of grpc.aio, which asks another one if there is one; yield its process id."""
    process = get_context("spawn").Process(target=_serve, args=(port, triton), daemon=True)
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def _serve(port: int, triton: int | None) -> None:
    async def serve() -> None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{triton}", options=_ANY_SIZE) if triton else None
        infer = channel.unary_unary(_METHOD) if channel else None

        async def answer(request: bytes, _context: Any) -> Any:
            return await infer(request) if infer else _ANSWER

        handler = grpc.unary_unary_rpc_method_handler(answer)
        service, _, method = _METHOD[1:].partition("/")
        handlers = [grpc.method_handlers_generic_handler(service, {method: handler})]
        server = grpc.aio.server(handlers=handlers, options=_ANY_SIZE)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[68_000, 1000], help="bytes of the picture")
    parser.add_argument("--in-flight", type=int, default=64, help="calls at once (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2000, help="per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="CSV to which the rows are added")
    return parser


if __name__ == "__main__":
    main()

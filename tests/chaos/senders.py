"""Load in a process of its own: `python -m tests.chaos.senders OPTIONS`.

The options are one JSON object, and so is the result that is printed.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc  # type: ignore[import-untyped]

from tests.chaos.messages import INFER
from tests.chaos.wires import GrpcWire, Outcome, judge_grpc, judge_http

__all__ = ["command"]

_WAIT = 80.0  # seconds for the answers of an open loop after its end
_CONNECTIONS = 4000


def command(**options: Any) -> list[str]:
    """Make the command line of a sender. `body` is the request's bytes."""
    options["body"] = base64.b64encode(options["body"]).decode()
    return [sys.executable, "-m", "tests.chaos.senders", json.dumps(options)]


def _main() -> None:
    options = json.loads(sys.argv[1])
    options["body"] = base64.b64decode(options["body"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    steady = options["loop"] in {"open", "closed"}
    print(json.dumps(asyncio.run(_asynchronous(options)) if steady else _impatient(options)))


async def _asynchronous(options: dict[str, Any]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    body, seconds = options["body"], options["seconds"]
    if options["via"] == "grpc":
        async with GrpcWire(options["address"], 8) as wire:

            async def ask_grpc() -> None:
                reply = await wire.send(INFER, body, limit=_WAIT)
                counts[reply.outcome] += 1

            return await _loop(ask_grpc, counts, options, seconds)
    connector = aiohttp.TCPConnector(limit=_CONNECTIONS)
    timeout = aiohttp.ClientTimeout(total=_WAIT)
    url, headers = f"http://{options['address']}{options['path']}", options["headers"]
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask_http() -> None:
            counts[await _post(session, url, body, headers)] += 1

        return await _loop(ask_http, counts, options, seconds)


async def _post(session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]) -> str:
    try:
        async with session.post(url, data=body, headers=headers) as answer:
            await answer.read()
            return judge_http(answer.status)
    except aiohttp.ClientConnectorError:
        return Outcome.REFUSED
    except TimeoutError:
        return Outcome.HANG
    except aiohttp.ClientError:
        return Outcome.LOST


async def _loop(
    ask: Callable[[], Awaitable[None]], counts: Counter[str], options: dict[str, Any], seconds: float
) -> dict[str, Any]:
    begin, sent = time.monotonic(), 0
    if options["loop"] == "closed":

        async def again() -> None:
            while time.monotonic() - begin < seconds:
                await ask()

        await asyncio.gather(*(again() for _ in range(options["in_flight"])))
        return {"seconds": time.monotonic() - begin, "counts": counts}
    tasks: set[asyncio.Task[None]] = set()
    while time.monotonic() - begin < seconds:
        due = int((time.monotonic() - begin) * options["rate"])
        for _ in range(min(due - sent, 500)):
            task = asyncio.ensure_future(ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.005)
    sending = time.monotonic() - begin
    if tasks:
        await asyncio.wait(tasks, timeout=_WAIT + 5)
    never = len(tasks)
    for task in tasks:
        task.cancel()
    return {"sent": sent, "seconds": sending, "counts": counts, "never": never}


def _impatient(options: dict[str, Any]) -> dict[str, Any]:
    """Call with deadlines, cancel, or close the connection, in 16 threads."""
    counts: Counter[str] = Counter()
    lock, end = threading.Lock(), time.monotonic() + options["seconds"]
    ask = _gone if options["via"] == "http" else _cancelled if options["loop"] == "cancel" else _late

    def work(number: int) -> None:
        rng = random.Random(number)
        with grpc.insecure_channel(options["address"]) as channel:
            call = channel.unary_unary(INFER)
            while time.monotonic() < end:
                outcome = ask(call, rng, options)
                if outcome == Outcome.LOST:
                    time.sleep(0.05)
                with lock:
                    counts[outcome] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(options["in_flight"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"counts": counts, "seconds": options["seconds"]}


def _late(call: Any, rng: random.Random, options: dict[str, Any]) -> str:
    try:
        call(options["body"], timeout=rng.choice(options["delays"]))
    except grpc.RpcError as error:
        status = str(error.code().name)
        return "too late" if status == "DEADLINE_EXCEEDED" else judge_grpc(status, str(error.details()))
    return Outcome.ANSWERED


def _cancelled(call: Any, rng: random.Random, options: dict[str, Any]) -> str:
    future = call.future(options["body"])
    time.sleep(rng.choice(options["delays"]))
    future.cancel()
    return "cancelled"


def _gone(_: Any, rng: random.Random, options: dict[str, Any]) -> str:
    connection = http.client.HTTPConnection(options["address"], timeout=10)
    try:
        connection.request("POST", options["path"], options["body"], options["headers"])
        time.sleep(rng.choice(options["delays"]))
    except OSError:
        return Outcome.LOST
    finally:
        connection.close()
    return "left"


if __name__ == "__main__":
    _main()

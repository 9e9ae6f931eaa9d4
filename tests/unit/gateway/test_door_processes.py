"""The processes of both doors: their address, their end, and the port that several of them share."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc  # type: ignore[import-untyped]
import psutil
import pytest
from programs import free_port
from recording_triton import METHOD, RecordingTriton

COMMAND = [sys.executable, "-m", "siglip_gateway.doors"]


@asynccontextmanager
async def door(kind: str, port: int, triton: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that listens; it is killed if it is still there at the end."""
    listen, behind = f"--listen=127.0.0.1:{port}", f"--triton=127.0.0.1:{triton}"
    process = await asyncio.create_subprocess_exec(
        *COMMAND, kind, listen, behind, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            while not listeners(process.pid, port):
                assert process.returncode is None, await process.communicate()
                await asyncio.sleep(0.02)
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def listeners(pid: int, port: int) -> bool:
    return any(found.laddr.port == port for found in psutil.Process(pid).net_connections("tcp"))


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_says_in_one_line_that_the_address_is_taken(kind: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        done = subprocess.run(
            [*COMMAND, kind, "--listen", listen, "--triton", "127.0.0.1:1"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{kind} door: ")
    assert listen.split(":")[1] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_processes_share_a_port_and_end_with_status_0(kind: str) -> None:
    async def test() -> None:
        port = free_port()
        async with door(kind, port, 1) as first, door(kind, port, 1) as second:
            for process in (first, second):
                socket.create_connection(("127.0.0.1", port)).close()
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(10):
                    assert await process.wait() == 0
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))

    asyncio.run(test())


@pytest.mark.parametrize("given_up", [False, True])
def test_completes_calls_in_flight_after_sigterm(given_up: bool) -> None:
    async def test() -> None:
        triton, port = RecordingTriton(), free_port()
        await triton.start()
        async with (
            door("grpc", port, triton.port) as process,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            call = channel.unary_unary(METHOD)(b"")
            async with asyncio.timeout(10):
                while not triton.messages:
                    await asyncio.sleep(0.01)
            if given_up:
                call.cancel()
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert process.returncode is None
            triton.gate.set()
            if not given_up:
                assert await call == b""
            async with asyncio.timeout(10):
                assert await process.wait() == 0
        assert (triton.cancelled, triton.answered) == (0, 1)
        await triton.stop()

    asyncio.run(test())

"""A gateway under attack, in a process of its own: `python -m tests.chaos.gateway_serve OPTIONS`.

It is the real one, with a name server of its own: names of `NAMES` have the addresses that are told there.
The address `OUTSIDE` of this machine passes for a public one, so that allowed hosts are read without a
network. It prints its port as soon as it listens, and ends with the end of standard input or with SIGTERM.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

import aiohttp
import uvicorn
from aiohttp.abc import AbstractResolver, ResolveResult

from siglip_gateway.app import create_app
from siglip_gateway.options import GatewayOptions
from siglip_gateway.urls import UrlReader, is_public

__all__ = ["NAMES", "OUTSIDE", "main", "reader_of"]

OUTSIDE = "127.0.0.2"
# Addresses of a name, one list per question. Names of rebinding change between a public and a private one.
NAMES: Mapping[str, Sequence[Sequence[str]]] = {
    "good.test": [[OUTSIDE]],
    "a.good.test": [[OUTSIDE]],
    "rebind.test": [[OUTSIDE], ["127.0.0.1"]],
    "late.test": [["127.0.0.1"], [OUTSIDE]],
    "mixed.test": [[OUTSIDE, "127.0.0.1"]],
    "inside.test": [["127.0.0.1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "six.test": [["::1"]],
    "metadata.test": [["169.254.169.254"]],
    "none.test": [[]],
}


class _Names(AbstractResolver):
    def __init__(self) -> None:
        self._system: aiohttp.ThreadedResolver | None = None  # it belongs to the loop of the gateway
        self._answers: dict[str, Iterator[Sequence[str]]] = {
            name: itertools.cycle(answers) for name, answers in NAMES.items()
        }

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a name, and those that the system knows for any other name or number."""
        if host not in self._answers:
            self._system = self._system or aiohttp.ThreadedResolver()
            return await self._system.resolve(host, port, family)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in next(self._answers[host])
        ]

    async def close(self) -> None:
        """Close nothing: the system's resolver holds nothing."""


def reader_of(options: GatewayOptions) -> UrlReader:
    """The reader of pictures, with names of its own."""
    return UrlReader(
        options.url_hosts,
        options.max_download,
        options.download_timeout,
        allowed=lambda address: address == OUTSIDE or is_public(address),
        resolver=_Names(),
    )


def main() -> None:
    """Serve until the end."""
    options = GatewayOptions.from_json(sys.argv[1])
    bound = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(
        create_app(options, urls=reader_of(options)),
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)

    def end() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end, daemon=True).start()
    print(json.dumps({"port": bound.getsockname()[1]}), flush=True)
    server.run([bound])


if __name__ == "__main__":
    main()

"""Pictures from URLs: only allowed hosts at public addresses, and what they may answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from gateways import PNG, StandIn, gateway

from siglip_gateway.inputs import Link
from siglip_gateway.refusals import Refusal
from siglip_gateway.urls import UrlReader, is_public

PRIVATE = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1", "240.0.0.1", "192.0.2.1"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
    *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:db8::1", "", "name", "127.1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


class Names(AbstractResolver):
    """Resolves every name to the given addresses, in their order, one list per question."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers, self.asked = list(answers), 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in found
        ]

    async def close(self) -> None:
        """Close nothing."""


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A web server on this machine: its port."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def fetched(reader: UrlReader, url: str) -> bytes:
    try:
        (file,) = await reader.read_all([Link("input[0]", url)])
        return file.data
    finally:
        await reader.close()


def answer_of(handler: Handler, url: str = "http://pictures.example:{port}/a.png", **options: Any) -> bytes:
    """The picture that a gateway reads from a server whose address passes for a public one."""

    async def run() -> bytes:
        async with serving(handler) as port:
            reader = UrlReader(
                [f"pictures.example:{port}"],
                options.get("most", 10_000),
                options.get("timeout", 5.0),
                allowed=lambda address: address == "127.0.0.1",
                resolver=Names(["127.0.0.1"]),
            )
            return await fetched(reader, url.format(port=port))

    return asyncio.run(run())


async def picture(_request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(body=PNG, content_type="image/png")


def test_a_picture_of_an_allowed_host_is_read() -> None:
    assert answer_of(picture) == PNG


@pytest.mark.parametrize(
    ("hosts", "url"),
    [
        (["a.example"], "http://b.example/x"),
        (["a.example"], "http://a.example.evil/x"),
        (["a.example"], "http://evil/a.example"),
        (["a.example"], "http://evil#a.example"),
        (["a.example"], "http://evil?a.example"),
        (["a.example"], "http://evil\\@a.example/x"),
        (["a.example"], "http://a.example\\@evil/x"),
        (["a.example"], "http://user@a.example/x"),
        (["a.example"], "http://a.example:evil@b.example/x"),
        (["a.example"], "http://a.example:22/x"),
        (["a.example:8000"], "http://a.example/x"),
        (["*.a.example"], "http://a.example/x"),
        (["*.a.example"], "http://xa.example/x"),
        (["a.example"], "http://[::1]/x"),
        (["a.example"], "http://127.0.0.1/x"),
        (["a.example"], "http://2130706433/x"),
        (["a.example"], "http:///x"),
        (["a.example"], "http://[bad/x"),
        (["a.example"], "http://a.example:99999999/x"),
        ([], "http://a.example/x"),
        (["127.0.0.1"], "http://127.0.0.1/x"),
        (["[::1]", "::1"], "http://[::1]/x"),
        (["2130706433"], "http://2130706433/x"),
        (["127.1"], "http://127.1/x"),
        (["169.254.169.254"], "http://169.254.169.254/latest/meta-data"),
    ],
)
def test_other_urls_are_refused_without_a_connection(hosts: list[str], url: str) -> None:
    names = Names(["8.8.8.8"])

    async def run() -> None:
        await fetched(UrlReader(hosts, 1000, 5.0, resolver=names), url)

    with pytest.raises(Refusal) as caught:
        asyncio.run(run())
    assert caught.value.status == 400
    assert caught.value.message.startswith("input[0]: ")
    assert names.asked == 0


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:10.0.0.1"]])
def test_a_name_with_a_private_address_is_refused(addresses: list[str]) -> None:
    connected = False

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        nonlocal connected
        connected = True
        return web.Response(body=PNG)

    async def run() -> None:
        async with serving(handler) as port:
            names = Names(addresses)
            reader = UrlReader([f"a.example:{port}"], 1000, 5.0, resolver=names)
            await fetched(reader, f"http://a.example:{port}/x")

    with pytest.raises(Refusal, match=r"a\.example has an address that is not public"):
        asyncio.run(run())
    assert not connected


def test_a_name_is_resolved_once() -> None:
    """The second answer of a name server must not count, when the first was the one that was checked."""
    names = Names(["127.0.0.1"], ["127.0.0.2"])

    async def run() -> bytes:
        async with serving(picture) as port:
            allowed = {"127.0.0.1"}
            reader = UrlReader([f"a.example:{port}"], 1000, 5.0, allowed=allowed.__contains__, resolver=names)
            return await fetched(reader, f"http://a.example:{port}/x")

    assert asyncio.run(run()) == PNG
    assert names.asked == 1


@pytest.mark.parametrize(
    "target",
    [
        "http://evil.example/x",
        "http://127.0.0.1/x",
        "//evil.example/x",
        "file:///etc/passwd",
        "ftp://pictures.example/",
    ],
)
def test_redirects_off_the_list_are_refused(target: str) -> None:
    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=302, headers={"location": target})

    with pytest.raises(Refusal, match=r"not allowed|expected an http"):
        answer_of(handler)


def test_redirects_on_the_list_are_followed_a_few_times() -> None:
    async def once(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/b.png":
            return await picture(request)
        return web.Response(status=301, headers={"location": "/b.png"})

    async def forever(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=307, headers={"location": f"{request.path}a"})

    assert answer_of(once) == PNG
    with pytest.raises(Refusal, match="redirects more than 3 times"):
        answer_of(forever)


def test_large_slow_and_failing_answers_are_refused() -> None:
    async def large(request: web.BaseRequest) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(1000):
            await answer.write(b"x" * 1000)
        return answer

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(100):
            await answer.write(b"x")
            await asyncio.sleep(0.05)
        return answer

    async def missing(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=404)

    with pytest.raises(Refusal, match="more than 10000 bytes"):
        answer_of(large)
    with pytest.raises(Refusal, match=r"did not answer within 0\.3 s"):
        answer_of(slow, timeout=0.3)
    with pytest.raises(Refusal, match="status 404"):
        answer_of(missing)
    with pytest.raises(Refusal, match="cannot be read"):
        asyncio.run(
            fetched(
                UrlReader(["a.example:9"], 9, 5.0, allowed=lambda _: True, resolver=Names(["127.0.0.1"])),
                "http://a.example:9/",
            )
        )


def test_compressed_answers_are_not_inflated() -> None:
    async def packed(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"packed", headers={"content-encoding": "gzip"})

    assert answer_of(packed) == b"packed"


def test_urls_are_off_by_default() -> None:
    stand_in = StandIn()
    with gateway(stand_in) as client:
        answer = client.post("/v1/embeddings", json={"input": ["a", {"url": "http://127.0.0.1:1/x"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("input[1]: URLs are not fetched here")
    # The one text is that of the look at the checkpoint, and not one of the caller.
    assert [call[1] for call in stand_in.calls if call[0] == "texts"] == [1]
    assert not [call for call in stand_in.calls if call[-1] == "a"]

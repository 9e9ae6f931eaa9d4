"""Pictures from http and https URLs, from allowed hosts at public addresses only."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from siglip_gateway.inputs import File, Link
from siglip_gateway.refusals import Refusal

__all__ = ["UrlReader", "is_public"]

_REDIRECTS = 3
_AT_A_TIME = 8  # pictures of one request
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Tell an address of the public internet from one of this machine, a local network or a special range."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast and not found.is_reserved


class _NotAllowedError(OSError):
    """A host has an address to which no connection is made."""


class _CheckedResolver(AbstractResolver):
    """Resolves names to public addresses. The connection goes to the address that was checked."""

    def __init__(self, resolver: AbstractResolver, allowed: Callable[[str], bool]) -> None:
        self._resolver, self._allowed = resolver, allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a host.

        Raises:
            OSError: the host is unknown, or one of its addresses is not public.
        """
        found = await self._resolver.resolve(host, port, family)
        if not found:
            raise OSError(f"{host} has no address")
        if not all(self._allowed(entry["host"]) for entry in found):
            raise _NotAllowedError(f"{host} has an address that is not public")
        return found

    async def close(self) -> None:
        """Close the resolver below."""
        await self._resolver.close()


class UrlReader:
    """Fetches pictures.

    Args:
        hosts: allowed hosts, as `host`, `host:port` or `*.domain`. Without a port, 80 and 443 are allowed.
        most: bytes of a picture.
        timeout: seconds for one picture.
        allowed: tells if an address may be connected to.
        resolver: finds the addresses of hosts, or None for the system's.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        most: int,
        timeout: float,
        *,
        allowed: Callable[[str], bool] = is_public,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._hosts = {host.lower().rstrip(".") for host in hosts}
        self._most, self._timeout = most, timeout
        self._allowed, self._resolver = allowed, resolver
        self._session: aiohttp.ClientSession | None = None

    async def read_all(self, links: Sequence[Link]) -> list[File]:
        """The files at URLs, in their order.

        Raises:
            Refusal: 400, a URL is not allowed or cannot be read. The message begins with its place.
        """
        free = asyncio.Semaphore(_AT_A_TIME)

        async def one(link: Link) -> File:
            async with free:
                return await self._read(link)

        for link in links:  # before anything is fetched
            self._check(link.where, link.url)
        return list(await asyncio.gather(*map(one, links)))

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _read(self, link: Link) -> File:
        try:
            async with asyncio.timeout(self._timeout):
                return File(link.where, await self._fetch(link.where, link.url))
        except TimeoutError:
            problem = f"the URL did not answer within {self._timeout:g} s"
        except (aiohttp.ClientError, OSError) as error:
            cause: Any = getattr(error, "os_error", error)
            refused = cause if isinstance(cause, _NotAllowedError) else error.__cause__
            problem = str(refused) if isinstance(refused, _NotAllowedError) else "the URL cannot be read"
        except ValueError:
            problem = "the URL is malformed"
        raise _refusal(link.where, problem)

    async def _fetch(self, where: str, url: str) -> bytes:
        session = self._connected()
        target = self._check(where, url)
        for _ in range(_REDIRECTS + 1):
            async with session.get(target, allow_redirects=False) as answer:
                if answer.status in {301, 302, 303, 307, 308} and "location" in answer.headers:
                    target = self._check(where, str(target.join(URL(answer.headers["location"]))))
                    continue
                if answer.status != 200:
                    raise _refusal(where, f"the URL answers with the status {answer.status}")
                return await self._body(where, answer)
        raise _refusal(where, f"the URL redirects more than {_REDIRECTS} times")

    async def _body(self, where: str, answer: aiohttp.ClientResponse) -> bytes:
        parts, size = [], 0
        async for chunk in answer.content.iter_chunked(2**16):
            size += len(chunk)
            if size > self._most:
                raise _refusal(where, f"the URL answers with more than {self._most} bytes")
            parts.append(chunk)
        return b"".join(parts)

    def _check(self, where: str, url: str) -> URL:
        """The URL, parsed by the library that also fetches it.

        Raises:
            Refusal: it is not in the allow-list, or has an address in place of a name that is not public.
        """
        if not self._hosts:
            raise _refusal(
                where, "URLs are not fetched here; send the picture as a data URI or as base64 text"
            )
        try:
            parts = URL(url)
            host, port = (parts.host or "").lower().rstrip("."), parts.port
        except ValueError:
            raise _refusal(where, "the URL is malformed") from None
        if parts.scheme not in {"http", "https"} or not host:
            raise _refusal(where, "expected an http or https URL")
        if parts.user is not None or parts.password is not None:
            raise _refusal(where, "a URL with a user name is not fetched")
        if not self._listed(host, port):
            raise _refusal(where, f"the host {host}:{port} is not allowed")
        # The library asks no resolver for an address, nor for what it takes for one.
        if (":" in host or host.replace(".", "").isdigit()) and not self._allowed(host):
            raise _refusal(where, f"{host} is not a public address")
        return parts

    def _listed(self, host: str, port: int | None) -> bool:
        names = {host} | {f"*.{host.split('.', n)[-1]}" for n in range(1, host.count(".") + 1)}
        if port in (None, 80, 443) and names & self._hosts:
            return True
        return bool({f"{name}:{port}" for name in names} & self._hosts)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = _CheckedResolver(self._resolver or aiohttp.ThreadedResolver(), self._allowed)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, limit=64, ttl_dns_cache=10),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"accept": "image/*", "accept-encoding": "identity"},
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def _refusal(where: str, problem: str) -> Refusal:
    return Refusal(400, f"{where}: {problem}", param=where, code="invalid_image_url")

"""URLs of pictures: those that a gateway must not read, and a few that it may."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["ALLOWED", "redirects", "url"]

# All spellings of this machine and of the metadata service of clouds. {port} is that of both small servers.
_INSIDE: Sequence[str] = (
    *("127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.1", "017700000001"),
    *("0177.0.0.1", "0x7f.0x0.0x0.0x1", "127.000.000.001", "127.0.0.1.", "127.255.255.254", "localhost"),
    *(
        "LOCALHOST",
        "localhost.",
        "localhost.localdomain",
        "ip6-localhost",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
    ),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
    *("[fe80::1%25lo]", "[::1%25lo]", "[::ffff:0:127.0.0.1]", "①②⑦.⓪.⓪.①", "127。0。0。1", "１２７.0.0.1"),
    *("169.254.169.254", "0xa9fea9fe", "2852039166", "0251.0376.0251.0376", "[::ffff:169.254.169.254]"),
    *(
        "[fd00:ec2::254]",
        "metadata.google.internal",
        "10.0.0.1",
        "192.168.0.1",
        "172.16.0.1",
        "100.100.100.200",
    ),
    *("inside.test", "mapped.test", "six.test", "metadata.test", "mixed.test", "none.test", "rebind.test"),
    *("late.test", "other.test", "good.test.evil.test", "evilgood.test", "127.0.0.1.good.test"),
)
# What the operator has allowed by mistake or on purpose: none of it makes a private address public.
ALLOWED: Sequence[str] = (
    *("good.test", "*.good.test", "rebind.test", "late.test", "mixed.test", "inside.test", "mapped.test"),
    *(
        "six.test",
        "metadata.test",
        "none.test",
        "localhost",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
    ),
    *("017700000001", "::1", "[::1]", "::ffff:127.0.0.1", "169.254.169.254", "0", "0.0.0.0", "0x7f.1"),
)
_SHAPES: Sequence[str] = (
    *(
        "http://{host}:{port}/x.png",
        "http://{host}:{port}",
        "https://{host}:{port}/x",
        "HTTP://{host}:{port}/",
    ),
    *("http://good.test:{port}@{host}:{port}/", "http://{host}:{port}#@good.test:{port}/", "http://{host}/x"),
    *("http://{host}:{port}/?http://good.test/", "http://good.test\\@{host}:{port}/", "http:/{host}:{port}/"),
    *(
        "http://{host}:{port}\\@good.test/",
        "http:///{host}:{port}/",
        "http://{host}:{port}/%00",
        " http://{host}",
    ),
    *(
        "http://{host}:{port}/\r\nHost: good.test\r\n\r\n",
        "http://{host}%2egood.test:{port}/",
        "http://:{port}/",
    ),
    *("http://good.test:{port}/..//{host}", "http://{host}:22/", "http://{host}:0/", "http://{host}:99999/"),
    *(
        "http://{host}:-1/",
        "http://{host}%00.good.test:{port}/",
        "http://{host}\t:{port}/",
        "//{host}:{port}/x",
    ),
)
_OTHER: Sequence[str] = (
    *("file:///etc/passwd", "file://localhost/etc/passwd", "ftp://good.test/x", "gopher://127.0.0.1:6379/_x"),
    *(
        "dict://127.0.0.1:11211/",
        "ldap://127.0.0.1/",
        "jar:http://127.0.0.1!/",
        "javascript:alert(1)",
        "http://",
    ),
    *(
        "https://[",
        "http://[::1",
        "http://" + "a" * 70_000 + ".test/",
        "http://" + "a." * 200 + "test/",
        "http:",
    ),
    *(
        "http://xn--/",
        "http://\u202egood.test/",
        "http://good.test:{port}/\ud7ff",
        "data:text/html;base64,PGI+",
    ),
)
_PATHS: Sequence[str] = (
    *("x.png", "page", "large", "slow", "empty", "missing", "gzip", "redirect/{n}", "forever", "cut"),
)


def redirects(port: int) -> Sequence[str]:
    """Targets of the redirects that the allowed host gives."""
    hosts = [host for host in _INSIDE if host.isascii()]
    found = [f"http://{host}:{port}/x.png" for host in hosts]
    found += [
        "file:///etc/passwd",
        f"//127.0.0.1:{port}/",
        f"https://127.0.0.1:{port}/",
        "http://[",
        "",
        "/x.png",
    ]
    return found


def url(rng: random.Random, port: int) -> tuple[str, str, bool]:
    """A URL: some words about it, its text, and whether it names a picture that may be read."""
    roll = rng.random()
    if roll < 0.1:
        path = rng.choice(_PATHS).format(n=rng.randrange(len(redirects(port))))
        host = rng.choice(("good.test", "a.good.test", "GOOD.test", "good.test."))
        return f"{host}/{path}", f"http://{host}:{port}/{path}", True
    if roll < 0.2:
        return "another scheme", rng.choice(_OTHER).replace("{port}", str(port)), False
    host = rng.choice(_INSIDE)
    # A name that changes its address may be read while it has the public one.
    changing = host in ("rebind.test", "late.test")
    return host, rng.choice(_SHAPES).format(host=host, port=port), changing

"""The address of a server, with its scheme, key and certificates."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["Endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """The address of a server and how to connect to it.

    Attributes:
        address: host:port.
        http: HTTP instead of gRPC.
        tls: the connection is encrypted.
        api_key: the key that a proxy in front of the server asks for.
        ca_file: certificates that are trusted instead of the system's.
    """

    address: str
    http: bool
    tls: bool
    api_key: str | None = None
    ca_file: Path | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None, ca_file: Path | str | None) -> Endpoint:
        """Read `host:port` (gRPC), or a URL of the scheme grpc, grpcs, http or https.

        Raises:
            ValueError: anything else.
        """
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        wrong = f"url: {url!r}, expected host:port, or grpc://, grpcs://, http:// or https:// before it"
        if (
            parts.scheme not in {"grpc", "grpcs", "http", "https"}
            or parts.path.strip("/")
            or not parts.hostname
        ):
            raise ValueError(wrong)
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(wrong) from error
        default = {"http": 80, "https": 443}.get(parts.scheme)
        if port is None and default is None:
            raise ValueError(wrong)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        tls = parts.scheme in {"grpcs", "https"}
        return cls(
            f"{host}:{port or default}",
            parts.scheme.startswith("http"),
            tls,
            api_key,
            Path(ca_file) if ca_file is not None else None,
        )

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def base(self) -> str:
        """The part of an HTTP URL before the path."""
        return f"{'https' if self.tls else 'http'}://{self.address}"

    def context(self) -> ssl.SSLContext | None:
        """The certificates that HTTP trusts, or None without TLS."""
        return ssl.create_default_context(cafile=self.ca_file) if self.tls else None

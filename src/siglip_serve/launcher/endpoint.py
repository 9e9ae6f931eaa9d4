"""Calls of the launcher to the HTTP endpoint of its own server."""

from __future__ import annotations

import http.client
import io
import secrets
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from urllib.error import HTTPError

from PIL import Image

from siglip_serve.errors import ServerStartError

__all__ = ["Endpoint"]

_KEY_HEADER = "siglip-serve-key"
# Proxies of the environment are not meant for addresses of this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Endpoint:
    """The HTTP endpoint of one server, and the key to its closed APIs.

    Args:
        url: `host:port`.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._key = secrets.token_urlsafe(24)

    def closed(self, apis: Sequence[str]) -> str:
        """Write the value of Triton's options that open `apis` to the holder of the key only."""
        return f"{','.join(apis)}:{_KEY_HEADER}={self._key}"

    def is_ready(self) -> bool:
        """Ask the server for its readiness; False also while nothing answers."""
        try:
            self._call("/v2/health/ready")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def refuses(self) -> bool:
        """Find out if nothing listens on the port."""
        host, _, port = self._url.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    def embed_image(self) -> None:
        """Make one real inference with the model `embed_image`.

        Raises:
            ServerStartError: it failed, for the reason in the message.
        """
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), (90, 120, 60)).save(picture, "PNG")
        self._embed("embed_image", picture.getvalue())

    def embed_text(self) -> None:
        """Make one real inference with the model `embed_text`.

        Raises:
            ServerStartError: it failed, for the reason in the message.
        """
        self._embed("embed_text", b"a dog")

    def _embed(self, model: str, data: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
        try:
            self._call(f"/v2/models/{model}/infer", data, headers, timeout=300)
        except (OSError, http.client.HTTPException) as error:
            reason = error.read().decode(errors="replace") if isinstance(error, HTTPError) else str(error)
            raise ServerStartError(f"an inference of {model} failed: {reason}") from error

    def load(self, model: str) -> None:
        """Load a model, or load it again if its files have changed.

        Raises:
            OSError, http.client.HTTPException: the server did not load it.
        """
        self._call(f"/v2/repository/models/{model}/load", b"{}", {_KEY_HEADER: self._key}, timeout=300)

    def _call(
        self,
        path: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5,
    ) -> bytes:
        request = urllib.request.Request(f"http://{self._url}{path}", data, dict(headers or {}))
        with _OPENER.open(request, timeout=timeout) as response:
            return bytes(response.read())

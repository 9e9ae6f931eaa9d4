"""A real front of docker/front before a server: nginx as an ordinary process, on a free port of the loopback."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from programs import free_port, program
from wire import ROOT

__all__ = ["Front"]

_SCRIPTS = ROOT / "docker" / "front"


class Front:
    """A context manager.

    Attributes:
        key: of the client `tester`.
        ca_file: the certificate that clients have to trust.
        url: `host:port`, of HTTP and gRPC.
        log: what nginx wrote, its access log included.
    """

    def __init__(self, folder: Path, http: str, grpc: str, **settings: str) -> None:
        path = f"{Path(program('nginx')).parent}{os.pathsep}{os.environ['PATH']}"
        program("openssl")
        self.port = free_port()
        self.url = f"127.0.0.1:{self.port}"
        self.keys = folder / "keys"
        self.ca_file = folder / "certificate.pem"
        self.log = folder / "front.log"
        self._environment = {
            **os.environ,
            "PATH": path,
            "FRONT_RUN": str(folder / "run"),
            "FRONT_LISTEN": self.url,
            "FRONT_HTTP": http,
            "FRONT_GRPC": grpc,
            "FRONT_KEYS": str(self.keys),
            "FRONT_CERTIFICATE": str(self.ca_file),
            "FRONT_CERTIFICATE_KEY": str(folder / "certificate_key.pem"),
            "FRONT_WORKERS": "1",
            **settings,
        }
        self._run(_SCRIPTS / "make_certificate.sh", folder)
        self.key = self.add_key("tester")

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [_SCRIPTS / "start.sh"], env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                status, _ = self.get("/healthz", key=None)
            except OSError:
                status = 0
            if status == 200:
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(self.log.read_text(encoding="utf-8"))
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=20)

    def add_key(self, name: str) -> str:
        """A new key, which counts from the next start or reload."""
        return self._run(_SCRIPTS / "make_key.sh", name, self.keys).strip()

    def reload(self) -> None:
        """Take changed keys."""
        self._run(_SCRIPTS / "start.sh", "reload")

    def get(self, path: str, key: str | None = "", method: str = "GET") -> tuple[int, bytes]:
        """Status and body of a request without a body."""
        return self.send(path, None, {}, key, method)

    def send(
        self,
        path: str,
        body: bytes | Iterable[bytes] | None,
        headers: Mapping[str, str],
        key: str | None = "",
        method: str = "POST",
    ) -> tuple[int, bytes]:
        """Status and body of a request; the right key unless another one or None is given."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)
        given = {} if key is None else {"Authorization": f"Bearer {key or self.key}"}
        try:
            chunked = body is not None and not isinstance(body, bytes)
            try:
                connection.request(method, path, body, {**given, **headers}, encode_chunked=chunked)
            except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
                pass  # the answer came before the body was read
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _run(self, *command: str | Path) -> str:
        return subprocess.run(
            [*map(str, command)], env=self._environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout

"""The reverse proxy of `docker/front`, run before a server of the tests."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT
from programs import PROGRAM_PATH, free_port, program

__all__ = ["FRONT", "Front", "run_front"]

FRONT = ROOT / "docker" / "front"


@dataclass(frozen=True)
class Front:
    """A running front and one of its valid keys."""

    port: int
    key: str
    certificate: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def post(
        self, path: str, body: bytes | None, headers: Mapping[str, str], key: str | None = None
    ) -> tuple[int, bytes]:
        """Return status and body. The valid key is sent unless another is given; "" sends none."""
        used = self.key if key is None else key
        headers = {**headers, **({"Authorization": f"Bearer {used}"} if used else {})}
        request = urllib.request.Request(f"https://{self.address}{path}", body, dict(headers))
        context = ssl.create_default_context(cafile=self.certificate)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


@contextmanager
def run_front(
    http_url: str, grpc_url: str, folder: Path, gateway_url: str = "127.0.0.1:9", **settings: str
) -> Iterator[Front]:
    """Run the front before a server; the test is skipped where nginx or openssl is missing.

    Args:
        http_url, grpc_url: the server's, host:port.
        gateway_url: the gateway's, host:port. By default there is none.
        folder: for keys, certificates and the log.
        **settings: of the front, as `FRONT_RATE="1"`.
    """
    for name in ("nginx", "openssl"):
        program(name)
    subprocess.run(["sh", FRONT / "make_certificate.sh", folder], check=True, capture_output=True)
    made = subprocess.run(
        ["sh", FRONT / "make_key.sh", "tests", folder / "keys"], check=True, capture_output=True, text=True
    )
    port = free_port()
    environment = {
        **os.environ,
        "PATH": PROGRAM_PATH,
        "FRONT_RUN": str(folder / "run"),
        "FRONT_LISTEN": f"127.0.0.1:{port}",
        "FRONT_HTTP": http_url,
        "FRONT_GRPC": grpc_url,
        "FRONT_GATEWAY": gateway_url,
        "FRONT_KEYS": str(folder / "keys"),
        "FRONT_CERTIFICATE": str(folder / "certificate.pem"),
        "FRONT_CERTIFICATE_KEY": str(folder / "certificate_key.pem"),
        "FRONT_WORKERS": "1",
        **settings,
    }
    checked = subprocess.run(
        ["sh", FRONT / "start.sh", "check"], env=environment, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["sh", FRONT / "start.sh"], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Front(port, made.stdout.strip(), folder / "certificate.pem")
        assert process.poll() is None, (folder / "log").read_text()
        assert made.stdout.strip() not in (folder / "log").read_text()
    finally:
        process.terminate()
        process.wait(60)

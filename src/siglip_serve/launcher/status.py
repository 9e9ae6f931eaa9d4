"""State of a server, which the launcher tells over HTTP: `GET /health`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

__all__ = ["Status", "StatusServer"]

State = Literal["starting", "serving", "degraded", "restarting", "stopping"]

_SERVED = ("serving", "degraded")
_MOST_CALLS = 32  # at the same time
_PATIENCE = 5.0  # seconds for a caller to send its request


class Status:
    """State and history of a server, as its launcher knows them. Any thread may read and change it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: State = "starting"
        self._since = _now()
        self._loading: list[str] = []
        self._counts = {"restarts": 0, "model_deaths": 0, "attempts": 0}
        self._last_death: str | None = None
        self._failure: str | None = None

    def attempt(self, state: Literal["starting", "restarting"]) -> None:
        """Count an attempt to start the server, since it last served."""
        with self._lock:
            self._counts["attempts"] += 1
            self._change(state)

    def failed(self, reason: str) -> None:
        """Keep the reason why an attempt failed, until the server is served."""
        with self._lock:
            self._failure = reason

    def served(self) -> None:
        """Take note that the server answers."""
        with self._lock:
            self._counts["restarts"] += self._state == "restarting"
            self._counts["attempts"] = 0
            self._failure = None
            self._change("serving")

    def died(self, how: str) -> None:
        """Take note that `tritonserver` died."""
        with self._lock:
            self._last_death = f"{_now()}: {how}"
            self._loading = []
            self._change("restarting")

    def model_died(self, model: str) -> None:
        """Count a model process that died."""
        with self._lock:
            self._counts["model_deaths"] += 1
            self._last_death = f"{_now()}: a process of {model}"

    def load(self, models: Iterable[str]) -> None:
        """Name the models that are being loaded again; none: all are served."""
        with self._lock:
            self._loading = sorted(models)
            if self._state in _SERVED:
                self._change("degraded" if self._loading else "serving")

    def stopping(self) -> None:
        """Take note that the server was asked to end."""
        with self._lock:
            self._change("stopping")

    def describe(self) -> tuple[bool, dict[str, Any]]:
        """Tell if the server answers, and what is known about it, for JSON."""
        with self._lock:
            facts: dict[str, Any] = {"status": self._state, "since": self._since, **self._counts}
            facts |= {"loading": self._loading, "last_death": self._last_death, "failure": self._failure}
            return self._state in _SERVED, facts

    def _change(self, state: State) -> None:
        if state != self._state:
            self._state, self._since = state, _now()


class StatusServer(ThreadingHTTPServer):
    """Answers `GET` and `HEAD /health` on a free port of 127.0.0.1, once it was started.

    Its threads end with the process. The answer is the JSON of `Status.describe`, with 200 while the server
    answers and 503 otherwise.

    Args:
        status: what is told.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = _MOST_CALLS

    def __init__(self, status: Status) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self._free = threading.BoundedSemaphore(_MOST_CALLS)
        self._thread = threading.Thread(target=self.serve_forever, name="siglip-serve-status", daemon=True)

    @property
    def url(self) -> str:
        """Address of the server, `host:port`."""
        return f"127.0.0.1:{self.server_port}"

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and close the port."""
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or close the connection while too many are open."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, then let another caller in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a caller that hung up."""


class _Handler(BaseHTTPRequestHandler):
    server: StatusServer
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.path != "/health":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        served, facts = self.server.status.describe()
        body = json.dumps(facts).encode()
        self.send_response(HTTPStatus.OK if served else HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Write no line per call."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""A small machine learning service in the shape of Immich's own, for faces and text recognition."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["ImmichUpstream", "immich_upstream"]


class ImmichUpstream(ThreadingHTTPServer):
    """Answers `POST /predict` with the size of the picture that it got.

    Attributes:
        tasks: names of the tasks that were asked, in order.
        status: of the answers.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tasks: list[str] = []
        self.status = 200

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ImmichUpstream

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        parts = _parts(self.headers["content-type"], body)
        (task,) = json.loads(parts["entries"])
        self.server.tasks.append(task)
        answer: dict[str, Any] = {"imageHeight": 1, "imageWidth": len(parts.get("image", b""))}
        if task == "ocr":
            answer["ocr"] = {"text": ["words"], "box": [0.0] * 8, "boxScore": [0.9], "textScore": [0.9]}
        else:
            answer[task] = [
                {"boundingBox": {"x1": 0, "y1": 0, "x2": 2, "y2": 2}, "embedding": "[1]", "score": 1}
            ]
        data = json.dumps(answer if self.server.status == 200 else {"detail": "it failed"}).encode()
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep the output of the tests short."""


def _parts(kind: str, body: bytes) -> dict[str, bytes]:
    message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    found = {}
    for part in message.get_payload():
        if isinstance(part, str):
            raise TypeError("the form is not multipart")
        name = part.get_param("name", header="content-disposition")
        found[str(name)] = bytes(part.get_payload(decode=True) or b"")
    return found


@contextmanager
def immich_upstream() -> Iterator[ImmichUpstream]:
    """Run the service."""
    with ImmichUpstream() as upstream:
        thread = threading.Thread(target=upstream.serve_forever, daemon=True)
        thread.start()
        try:
            yield upstream
        finally:
            upstream.shutdown()
            thread.join()

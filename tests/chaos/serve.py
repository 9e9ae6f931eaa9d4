"""A server in a process of its own, as a user starts one: `python -m tests.chaos.serve OPTIONS`.

The options are one JSON object. The addresses are printed as one line of JSON as soon as the server answers.
The server ends with SIGTERM, with the end of standard input, or when its launcher gives up.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from siglip_serve.errors import SiglipServeError
from siglip_serve.launcher import ServeOptions, TritonServer

__all__: list[str] = []


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _end(*_: object) -> None:
    raise SystemExit(0)


def main() -> None:
    """Start the server and wait for its end."""
    given = json.loads(sys.argv[1])
    options = ServeOptions(
        Path(given["models_folder"]),
        given["checkpoint"],
        device="cpu",
        models=tuple(given["models"]),
        settings=given["settings"],
        log_file=Path(given["log"]),
        start_timeout=given["start_timeout"],
    )
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    try:
        with TritonServer(options) as server:
            addresses = {"grpc": server.grpc_url, "http": server.http_url, "metrics": ""}
            addresses["metrics"] = f"{server.address}:{server.metrics_port}"
            print(json.dumps(addresses), flush=True)
            sys.exit(server.wait())
    except SiglipServeError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

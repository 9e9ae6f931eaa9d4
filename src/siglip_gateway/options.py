"""Settings of the gateway. They travel to its worker processes as JSON in the environment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ENVIRONMENT", "GatewayOptions", "read_keys"]

ENVIRONMENT = "SIGLIP_GATEWAY_OPTIONS"


@dataclass(frozen=True)
class GatewayOptions:
    """Everything that a gateway can be told.

    Attributes:
        triton: host:port of Triton's gRPC, or a URL as `AsyncClient` takes it.
        api_key_file: file with one key per line. Without it every caller is let in.
        url_hosts: hosts from which pictures may be fetched, as `host`, `host:port` or `*.domain`. None is
            allowed by default.
        immich_upstream: URL of Immich's own machine learning service, for tasks other than CLIP.
        cors_origins: origins of pages that may call the gateway.
        normalized: vectors have the length 1, unless a request says otherwise.
        max_body: bytes of a request.
        max_inputs: texts and pictures of a request.
        max_pictures: pictures of a request.
        max_crops: crops, or boxes, of a request about teams.
        max_text: characters of a text.
        max_running: requests that are worked on at a time, per worker.
        max_waiting: requests that wait for their turn, per worker. More are refused with 429.
        timeout: seconds that a request may wait, and seconds that Triton may take.
        upload_timeout: seconds that a body may take to arrive.
        max_download: bytes of a picture that is fetched from a URL.
        download_timeout: seconds that fetching a picture may take.
        access_log: write a line per request to standard error.
        search: output of `siglip-serve embed` that is searched, or None.
        search_images: folder whose pictures may be shown, or None.
        search_base: folder in which the names of the index are paths, or None for the working directory.
        metrics_folder: folder in which worker processes share their counters, or None for one process.
    """

    triton: str = "127.0.0.1:8001"
    api_key_file: str | None = None
    url_hosts: tuple[str, ...] = ()
    immich_upstream: str | None = None
    cors_origins: tuple[str, ...] = ()
    normalized: bool = True
    max_body: int = 64 * 2**20
    max_inputs: int = 2048
    max_pictures: int = 256
    max_crops: int = 4096
    max_text: int = 32_768
    max_running: int = 64
    max_waiting: int = 512
    timeout: float = 60.0
    upload_timeout: float = 60.0
    max_download: int = 32 * 2**20
    download_timeout: float = 10.0
    search: str | None = None
    search_images: str | None = None
    search_base: str | None = None
    metrics_folder: str | None = None
    access_log: bool = False

    def to_json(self) -> str:
        """The options as text for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GatewayOptions:
        """The options that `to_json` wrote."""
        found = json.loads(text)
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**{**found, **lists})


def read_keys(file: str | Path | None) -> tuple[str, ...]:
    """The keys in a file, one per line. Empty lines and lines that begin with # are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has no key, which would let every caller in.
    """
    if file is None:
        return ()
    lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{file}: no key, expected one per line")
    return keys

"""Clients in the shape of Weaviate's and Immich's servers, written from what these send and expect."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urljoin

import httpx
import numpy as np
from numpy.typing import NDArray

__all__ = ["Immich", "ImmichError", "Weaviate", "WeaviateError"]


class WeaviateError(Exception):
    """An error of the module multi2vec-clip, as Weaviate logs it."""


class Weaviate:
    """The module multi2vec-clip of Weaviate.

    It sends no content type, `null` for an absent list, and `<`, `>` and `&` as escapes. It reads the body as
    JSON, with a text as `error`, before it looks at the status.

    Args:
        url: of the inference service, to which paths are appended.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(trust_env=False, timeout=60)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def wait_for_startup(self, seconds: float, interval: float = 0.1) -> int:
        """Ask `ready` until it agrees within half a second; return how often it was asked.

        Raises:
            WeaviateError: it did not.
        """
        end, problem = time.monotonic() + seconds, ""
        for asked in range(1, 10_000):
            try:
                answer = self._http.get(f"{self._url}/.well-known/ready", timeout=0.5)
                if answer.status_code < 300:
                    return asked
                problem = f"not ready: status {answer.status_code}"
            except httpx.HTTPError as error:
                problem = type(error).__name__
            if time.monotonic() > end:
                break
            time.sleep(interval)
        raise WeaviateError(problem)

    def meta(self) -> dict[str, Any]:
        """The model as `GET /v1/meta` of Weaviate shows it.

        Raises:
            WeaviateError: the answer is no JSON object.
        """
        return self._object(self._http.get(f"{self._url}/meta"))

    def vectorize(
        self, texts: Sequence[str] | None, images: Sequence[str] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The vectors of texts and of images, which are base64.

        Raises:
            WeaviateError: the service refuses or fails.
        """
        body = json.dumps({"texts": texts, "images": images}, ensure_ascii=False)
        for character in "<>&":
            body = body.replace(character, f"\\u{ord(character):04x}")
        answer = self._http.post(f"{self._url}/vectorize", content=body.encode())
        found = self._object(answer)
        problem = found.get("error", "")
        if not isinstance(problem, str):
            raise WeaviateError(f"unmarshal response body: error is {type(problem).__name__}")
        if answer.status_code > 399:
            raise WeaviateError(f"fail with status {answer.status_code}: {problem}")
        return _float32(found["textVectors"]), _float32(found["imageVectors"])

    def _object(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            found = answer.json()
        except ValueError as error:
            raise WeaviateError(f"unmarshal response body: {error}") from error
        if not isinstance(found, dict):
            raise WeaviateError("unmarshal response body: not an object")
        return found


class ImmichError(Exception):
    """No machine learning server answered."""


class Immich:
    """The part of Immich's server that asks machine learning servers.

    All tasks go to the same URLs, healthy ones first. A server is unhealthy after any answer but a good one,
    until it answers a ping or a request.

    Args:
        urls: of machine learning servers. Only their origin counts.
        ping_timeout: seconds for the answer to a ping.
    """

    def __init__(self, urls: Sequence[str], ping_timeout: float = 2.0) -> None:
        self._urls, self._ping_timeout = list(urls), ping_timeout
        self._http = httpx.Client(trust_env=False, timeout=60)
        self.healthy: dict[str, bool] = {}
        self.warnings: list[str] = []

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def tick(self) -> None:
        """Ping all servers, as Immich does every 30 seconds."""
        for url in self._urls:
            try:
                answer = self._http.get(urljoin(url, "/ping"), timeout=self._ping_timeout)
                self.healthy[url] = answer.is_success
            except httpx.HTTPError:
                self.healthy[url] = False

    def encode_image(self, data: bytes, model: str) -> str:
        """The vector of a picture, as text for the database."""
        entries = {"clip": {"visual": {"modelName": model}}}
        return str(self._predict(entries, image=data)["clip"])

    def encode_text(self, text: str, model: str, language: str | None = None) -> str:
        """The vector of a text, as text for the database."""
        options = {} if language is None else {"language": language}
        entries = {"clip": {"textual": {"modelName": model, "options": options}}}
        return str(self._predict(entries, text=text)["clip"])

    def detect_faces(self, data: bytes, model: str, least: float) -> dict[str, Any]:
        """The faces in a picture, and its size."""
        detection = {"modelName": model, "options": {"minScore": least}}
        entries = {"facial-recognition": {"detection": detection, "recognition": {"modelName": model}}}
        found = self._predict(entries, image=data)
        return {
            "faces": found["facial-recognition"],
            "height": found["imageHeight"],
            "width": found["imageWidth"],
        }

    def ocr(self, data: bytes, model: str) -> dict[str, Any]:
        """The words in a picture."""
        options = {"minScore": 0.5, "maxResolution": 736}
        entries = {
            "ocr": {
                "detection": {"modelName": model, "options": options},
                "recognition": {"modelName": model, "options": {"minScore": 0.8}},
            }
        }
        return dict(self._predict(entries, image=data)["ocr"])

    def _predict(
        self, entries: Mapping[str, Any], image: bytes | None = None, text: str | None = None
    ) -> dict[str, Any]:
        form: dict[str, Any] = {"entries": (None, json.dumps(entries, separators=(",", ":")))}
        if image is not None:
            form["image"] = ("blob", image, "application/octet-stream")
        if text is not None:
            form["text"] = (None, text)
        for url in sorted(self._urls, key=lambda url: not self.healthy.get(url, False)):
            try:
                answer = self._http.post(urljoin(url, "/predict"), files=form)
                if answer.is_success:
                    self.healthy[url] = True
                    return dict(answer.json())
                self.warnings.append(f"{url} failed with status {answer.status_code}")
            except httpx.HTTPError as error:
                self.warnings.append(f"{url} failed: {error}")
            self.healthy[url] = False
        raise ImmichError(f"{json.dumps(entries)} failed for all URLs")


def _float32(rows: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)

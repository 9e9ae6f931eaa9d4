"""The APIs of embedding servers: how each is asked for vectors, over plain HTTP."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from validate.conformance.inputs import Picture
from validate.errors import RefusedError, ServerError

__all__ = ["APIS", "Api", "Endpoint", "UnreachableError"]

Api = Literal["openai", "infinity", "vllm", "weaviate", "kserve", "immich"]
APIS: tuple[Api, ...] = get_args(Api)
Floats = NDArray[np.float32]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for servers under test
_PATHS = {"openai": "/v1/embeddings", "infinity": "/embeddings", "vllm": "/v1/embeddings"}
_PATHS |= {"weaviate": "/vectorize", "immich": "/predict"}
_MOST_OF_A_MESSAGE = 200


class UnreachableError(ServerError):
    """No server answers at the URL, so there is nothing to judge."""


@dataclass(frozen=True)
class Endpoint:
    """A server, asked in one API.

    Attributes:
        url: without the path of the API, unless it ends with it.
        model: name that requests carry.
        timeout: seconds per request.
        headers: further headers, such as a key.
        extra: further fields of a JSON request.
    """

    url: str
    api: Api
    model: str = "any"
    timeout: float = 60.0
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batches(self) -> Mapping[str, bool]:
        """Tell if a request may hold several texts, and several pictures."""
        return {"text": self.api != "immich", "picture": self.api not in ("immich", "vllm")}

    def texts(self, texts: Sequence[str]) -> Floats:
        """Ask for the vectors [N, D] of texts in one request.

        Raises:
            RefusedError: the server refuses the request with a status of 4xx.
            ServerError: it cannot be reached, fails, or answers something else than vectors.
        """
        if self.api == "weaviate":
            return self._vectors({"texts": list(texts), "images": []}, len(texts), _weaviate("textVectors"))
        if self.api == "kserve":
            return self._triton("embed_text", "INPUT_TEXT", texts, {"truncation": True})
        if self.api == "immich":
            return self._immich("textual", {"text": (texts[0].encode(), "")})
        more = {"modality": "text"} if self.api == "infinity" else {}
        return self._vectors({"input": list(texts), "model": self.model, **more}, len(texts), _openai)

    def pictures(self, pictures: Sequence[Picture]) -> Floats:
        """Ask for the vectors [N, D] of pictures in one request. Raises as `texts` does."""
        encoded = [base64.b64encode(picture.data).decode("ascii") for picture in pictures]
        if self.api == "weaviate":
            return self._vectors({"texts": [], "images": encoded}, len(pictures), _weaviate("imageVectors"))
        if self.api == "kserve":
            return self._triton("embed_image", "INPUT_IMAGE", encoded, {"base64_encoded": True})
        if self.api == "immich":
            return self._immich("visual", {"image": (pictures[0].data, "picture")})
        pairs = zip(pictures, encoded, strict=True)
        uris = [f"data:{picture.kind};base64,{text}" for picture, text in pairs]
        if self.api == "vllm":
            parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
            body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}]}
        else:
            body = {"input": uris} | ({"modality": "image"} if self.api == "infinity" else {})
        return self._vectors({"model": self.model, **body}, len(pictures), _openai)

    def _vectors(
        self, body: Mapping[str, Any], count: int, read: Callable[[Any], Any], path: str = ""
    ) -> Floats:
        data = json.dumps({**body, **self.extra}).encode()
        return _rows(self._post(path or _PATHS[self.api], data, "application/json"), count, read)

    def _triton(self, model: str, name: str, values: Sequence[str], parameters: Mapping[str, Any]) -> Floats:
        tensor = {"name": name, "shape": [len(values), 1], "datatype": "BYTES", "data": list(values)}
        body = {"inputs": [tensor], "parameters": parameters}
        return self._vectors(body, len(values), _kserve, f"/v2/models/{model}/infer")

    def _immich(self, task: str, parts: Mapping[str, tuple[bytes, str]]) -> Floats:
        entries = json.dumps({"clip": {task: {"modelName": self.model, "options": {}}}}).encode()
        boundary = uuid.uuid4().hex
        body = b""
        for name, (data, file) in {"entries": (entries, ""), **parts}.items():
            named = f'; filename="{file}"\r\nContent-Type: application/octet-stream' if file else ""
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
            body += head.encode() + data + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        answer = self._post(_PATHS["immich"], body, f"multipart/form-data; boundary={boundary}")
        return _rows(answer, 1, lambda found: [json.loads(found["clip"])])

    def _post(self, path: str, body: bytes, kind: str) -> bytes:
        url = self.url if self.url.endswith(path) else self.url.rstrip("/") + path
        request = urllib.request.Request(url, body, {**self.headers, "Content-Type": kind})
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as error:
            told = " ".join(error.read().decode("utf-8", "replace").split())[:_MOST_OF_A_MESSAGE]
            refused = RefusedError if 400 <= error.code < 500 else ServerError
            raise refused(f"HTTP {error.code}: {told}") from error
        except TimeoutError as error:
            raise ServerError(f"{url}: no answer within {self.timeout:g} s (--timeout)") from error
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"{url}: cannot be reached ({error})") from error


def _rows(answer: bytes, count: int, read: Callable[[Any], Any]) -> Floats:
    try:
        rows = np.array(read(json.loads(answer)), dtype=np.float32)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        told = answer[:_MOST_OF_A_MESSAGE].decode("utf-8", "replace")
        raise ServerError(f"the answer has no vectors ({error!r}): {told}") from error
    if rows.ndim != 2 or len(rows) != count:
        raise ServerError(f"sent {count} inputs, got vectors of the shape {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise ServerError("the vectors have values that are not finite")
    return rows


def _openai(found: Any) -> Any:
    entries = sorted(found["data"], key=lambda entry: entry.get("index", 0))
    return [entry["embedding"] for entry in entries]


def _weaviate(name: str) -> Callable[[Any], Any]:
    return lambda found: found[name]


def _kserve(found: Any) -> Any:
    (output,) = [output for output in found["outputs"] if output["name"] == "EMBEDDING"]
    return np.array(output["data"], dtype=np.float32).reshape(output["shape"])

"""Embedding APIs in JSON: their requests, made once, and what their answers hold."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.load_clients import HttpClient, JsonForm, Target

__all__ = ["JSON_CLIENTS", "JsonClient", "image_request", "rows_of", "text_request"]

_PATHS: Mapping[JsonForm, str] = {
    "openai": "/v1/embeddings",
    "weaviate": "/vectorize",
    "triton_json": "/v2/models/{model}/infer",
}


class JsonClient(HttpClient):
    """POST of JSON that was made before. The rows of an answer are read as one long row."""

    headers = "Content-Type: application/json\r\n"
    form: JsonForm

    def embedding(self, body: bytes) -> NDArray[np.float32] | None:
        try:
            return rows_of(self.form, body).ravel()
        except (ValueError, KeyError, IndexError, TypeError):
            return None


def _client(chosen: JsonForm) -> Callable[[Target, Sequence[bytes]], JsonClient]:
    return type(f"{chosen}_client", (JsonClient,), {"form": chosen})


JSON_CLIENTS = {form: _client(form) for form in get_args(JsonForm)}


def path_of(form: JsonForm, model: str = "") -> str:
    """The path of a form; `model` is Triton's."""
    return _PATHS[form].format(model=model)


def image_request(form: JsonForm, pictures: Sequence[bytes]) -> bytes:
    """The body of a request for the vectors of JPEG files, of length 1 where the form can ask for it."""
    texts = [base64.b64encode(picture).decode("ascii") for picture in pictures]
    if form == "openai":
        uris = [f"data:image/jpeg;base64,{text}" for text in texts]
        # `modality` tells infinity that these are pictures. Others do not look at it or do not need it.
        return _json({"input": uris, "model": "any", "encoding_format": "base64", "modality": "image"})
    if form == "weaviate":
        return _json({"texts": [], "images": texts})
    return _triton("INPUT_IMAGE", texts, base64_encoded=True)


def text_request(form: JsonForm, texts: Sequence[str]) -> bytes:
    """The body of a request for the vectors of texts."""
    if form == "openai":
        return _json({"input": list(texts), "model": "any", "encoding_format": "base64"})
    if form == "weaviate":
        return _json({"texts": list(texts), "images": []})
    return _triton("INPUT_TEXT", texts)


def rows_of(form: JsonForm, body: bytes) -> NDArray[np.float32]:
    """The vectors [N, D] of an answer.

    Raises:
        ValueError, KeyError, IndexError, TypeError: it holds something else.
    """
    found = json.loads(body)
    if form == "openai":
        values = [entry["embedding"] for entry in found["data"]]
        if values and isinstance(values[0], str):
            return np.stack([np.frombuffer(base64.b64decode(value), "<f4") for value in values])
        return np.array(values, dtype=np.float32)
    if form == "weaviate":
        return np.array(found["textVectors"] or found["imageVectors"], dtype=np.float32)
    (output,) = [output for output in found["outputs"] if output["name"] == "EMBEDDING"]
    return np.array(output["data"], dtype=np.float32).reshape(output["shape"])


def _triton(name: str, values: Sequence[str], **parameters: bool) -> bytes:
    tensor = {"name": name, "shape": [len(values), 1], "datatype": "BYTES", "data": list(values)}
    return _json({"inputs": [tensor], "parameters": {"normalized": True, **parameters}})


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()

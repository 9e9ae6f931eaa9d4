"""OpenAI's embeddings API, and the dialects that others made of it.

One parser reads the union: OpenAI's texts, the chat messages of vLLM, the `modality` of infinity, the mixed
strings of NV-CLIP, the objects of Jina, SGLang and LlamaIndex, and the bare base64 of LiteLLM. Texts and
pictures may be mixed, and keep their order.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from siglip_serve_client.compact import COMPACT, ENDIANNESS, FLOATS, as_base64, compact
from starlette.requests import Request
from starlette.responses import Response

from siglip_gateway.apis.fields import boolean, chosen, whole, wrong
from siglip_gateway.inputs import Input, Text
from siglip_gateway.pictures import looks_like_a_picture, picture_of
from siglip_gateway.refusals import Refusal
from siglip_gateway.service import Dialect, Service, json_object, json_response

__all__ = [
    "OPENAI",
    "EmbeddingsRequest",
    "embeddings",
    "error_object",
    "models",
    "parse",
    "part_of_content",
]

_FORMATS = ("float", "base64", "float16", *COMPACT)
# Names of the field that says how vectors are written: OpenAI's, LlamaIndex's, Jina's.
_FORMAT_FIELDS = ("encoding_format", "encoding_type", "embedding_type")
_PICTURE_FIELDS = ("image", "bytes", "url", "image_url")
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def error_object(refusal: Refusal) -> Mapping[str, Any]:
    """An error in OpenAI's form."""
    kind = _TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def _error(refusal: Refusal) -> Mapping[str, Any]:
    # Jina's clients look for the message in `detail`, and those of OpenAI at nothing but `error`.
    return {**error_object(refusal), "detail": refusal.message}


OPENAI = Dialect("openai", _error)


@dataclass(frozen=True)
class EmbeddingsRequest:
    """A request in any of the dialects.

    Attributes:
        encoding: how vectors are written: float, base64, int8, uint8, binary or ubinary.
        dtype, endianness: values and order of bytes of base64, as `as_base64` takes them.
        normalized: scale vectors to length 1, or None as the gateway's options say.
        truncation: cut texts that are too long.
        dimensions: the width that the caller asks for, or None.
    """

    inputs: list[Input]
    encoding: str = "float"
    normalized: bool | None = None
    truncation: bool = False
    dimensions: int | None = None
    dtype: str = "float32"
    endianness: str = "little"


async def embeddings(service: Service, _request: Request, body: bytes) -> Response:
    """Answer `POST /v1/embeddings`."""
    asked = parse(json_object(body))
    checkpoint = await service.backend.checkpoint()
    service.dimensions.check(asked.dimensions, "dimensions", checkpoint)
    vectors = await service.embed(
        asked.inputs,
        normalized=asked.normalized,
        truncation=asked.truncation,
        dimensions=asked.dimensions,
    )
    if asked.encoding == "float":
        rows: Any = vectors
    elif asked.encoding == "base64":
        rows = as_base64(vectors, asked.dtype, asked.endianness)
    else:
        rows = compact(vectors, asked.encoding)
    texts = sum(isinstance(item, Text) for item in asked.inputs)
    return json_response(
        {
            "object": "list",
            "id": f"embd-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": checkpoint.name,
            "data": [
                {"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)
            ],
            # Tokens are not counted here, so none are claimed.
            "usage": {
                "prompt_tokens": 0,
                "total_tokens": 0,
                "texts": texts,
                "images": len(asked.inputs) - texts,
            },
        }
    )


async def models(service: Service, _request: Request, _body: bytes) -> Response:
    """Answer `GET /v1/models`: the one checkpoint that Triton serves."""
    checkpoint = await service.backend.checkpoint()
    entry = {
        "id": checkpoint.name,
        "object": "model",
        "created": 0,
        "owned_by": "siglip-serve",
        "dimensions": checkpoint.width,
        "projected_dimensions": service.dimensions.most,
        "note": checkpoint.note or None,
    }
    return json_response({"object": "list", "data": [entry]})


def parse(body: Mapping[str, Any]) -> EmbeddingsRequest:
    """Read a request in any of the dialects. The name of the model is not looked at.

    Raises:
        Refusal: 400. The message names the field and the index of the input.
    """
    if ("input" in body) == ("messages" in body):
        raise Refusal(400, "expected either input or messages", param="input", code="missing_input")
    encoding, dtype, endianness = _encoding(body)
    inputs = _inputs(body) if "input" in body else list(_of_messages(body["messages"]))
    if not inputs:
        raise Refusal(400, "there is nothing to embed: the input is empty", param="input", code="empty_input")
    return EmbeddingsRequest(
        inputs,
        encoding,
        boolean(body, "normalized"),
        _truncation(body),
        whole(body, "dimensions"),
        dtype,
        endianness,
    )


def _encoding(body: Mapping[str, Any]) -> tuple[str, str, str]:
    """How vectors are written: the format, and the values and the order of bytes of base64.

    `embed_dtype` and `endianness` are vLLM's, and change base64 alone there too. The format float16 is base64
    of float16.
    """
    encoding, field = "float", "encoding_format"
    for name in _FORMAT_FIELDS:
        if body.get(name) is not None:
            encoding, field = chosen(body[name], name, _FORMATS), name
    dtype, endianness = body.get("embed_dtype"), body.get("endianness")
    if dtype is not None:
        chosen(dtype, "embed_dtype", FLOATS)
    if endianness is not None:
        chosen(endianness, "endianness", ENDIANNESS)
    if encoding != "float16":
        return encoding, dtype or "float32", endianness or "little"
    if dtype not in (None, "float16"):
        raise Refusal(
            400,
            f"embed_dtype: {dtype!r}, but {field} is 'float16'",
            param="embed_dtype",
            code="invalid_value",
        )
    return "base64", "float16", endianness or "little"


def _inputs(body: Mapping[str, Any]) -> list[Input]:
    modality = body.get("modality")
    if modality is not None:
        modality = chosen(modality, "modality", ("text", "image"))
    value = body["input"]
    if not isinstance(value, list):
        return [_input(value, "input", modality)]
    if value and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise _tokens("input")
    return [_input(item, f"input[{index}]", modality) for index, item in enumerate(value)]


def _input(value: object, where: str, modality: str | None) -> Input:
    if isinstance(value, str):
        is_picture = looks_like_a_picture(value) if modality is None else modality == "image"
        return picture_of(value, where) if is_picture else Text(where, value)
    if isinstance(value, Mapping):
        return _of_object(value, where)
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        raise _tokens(where)
    raise wrong(where, value, "a text, a picture or an object with text or image")


def _of_object(value: Mapping[str, Any], where: str) -> Input:
    given = [name for name in _PICTURE_FIELDS if value.get(name) not in (None, "")]
    text = value.get("text")
    if given and text not in (None, ""):
        raise Refusal(
            400,
            f"{where}: a text and a picture in one object; they have one vector each, so send two objects",
            param=where,
        )
    if len(given) > 1:
        raise Refusal(400, f"{where}: {' and '.join(given)} in one object, expected one picture", param=where)
    if given:
        return _picture(value[given[0]], f"{where}.{given[0]}", where)
    if isinstance(text, str):
        return Text(where, text)
    expected = "an object with text, image, bytes, url or image_url"
    raise Refusal(
        400,
        f"{where}: an object with {', '.join(value)[:200] or 'nothing'}, expected {expected}",
        param=where,
    )


def _picture(value: object, path: str, where: str) -> Input:
    if isinstance(value, Mapping):  # {"url": ...}, as in chat messages, or {"bytes": ...}
        inner = value.get("url", value.get("bytes"))
        if inner is None:
            raise wrong(path, value, "an object with url")
        value = inner
    if not isinstance(value, str):
        raise wrong(path, value, "a data URI, base64 text or a URL")
    return picture_of(value, where)


def _of_messages(messages: object) -> Iterator[Input]:
    """Each part of chat messages, in order. Empty texts, which some clients add to pictures, are left out."""
    if not isinstance(messages, list):
        raise wrong("messages", messages, "a list")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise wrong(where, message, "an object with role and content")
        content = message.get("content")
        if isinstance(content, str):
            yield Text(where, content)
            continue
        if not isinstance(content, list):
            raise wrong(f"{where}.content", content, "a text or a list")
        for number, part in enumerate(content):
            place = f"{where}.content[{number}]"
            if isinstance(part, Mapping) and part.get("text") == "" and len(content) > 1:
                continue
            yield part_of_content(part, place)


def part_of_content(part: object, where: str) -> Input:
    """The text or picture that a part of a message's `content` holds.

    Raises:
        Refusal: 400, it holds neither.
    """
    if not isinstance(part, Mapping):
        raise wrong(where, part, "an object with type")
    return _of_object(part, where)


def _truncation(body: Mapping[str, Any]) -> bool:
    """Read the names by which the dialects ask for texts to be cut: Jina's, NVIDIA's and vLLM's."""
    truncate = body.get("truncate")
    if isinstance(truncate, str):
        return chosen(truncate.upper(), "truncate", ("NONE", "END")) == "END"
    tokens = whole(body, "truncate_prompt_tokens")
    if tokens not in (None, -1):
        raise Refusal(
            400,
            f"truncate_prompt_tokens: {tokens}, expected -1, the length of the model's context",
            param="truncate_prompt_tokens",
        )
    return bool(boolean(body, "truncate")) or bool(boolean(body, "truncation")) or tokens == -1


def _tokens(where: str) -> Refusal:
    return Refusal(
        400,
        f"{where}: token numbers, which belong to another model's vocabulary; send texts. LangChain's "
        "OpenAIEmbeddings does so with check_embedding_ctx_length=False",
        param=where,
        code="tokens_not_accepted",
    )

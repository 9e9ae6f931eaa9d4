"""Cases of the gateway: bodies, pictures, forms, headers, keys, URLs and requests that are wrong."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from images import mutations
from malformed_json import mutated

from tests.chaos.cases.base import World, chance, edge, picture, small_photo
from tests.chaos.cases.gateway_urls import url

__all__ = ["KINDS", "PATHS", "GatewayCase", "Ground", "case"]

# The API of each path, by the names of its errors' fields.
PATHS: Mapping[str, str] = {
    "/v1/embeddings": "openai",
    "/embeddings": "openai",
    "/v2/embed": "cohere",
    "/vectorize": "weaviate",
    "/predict": "immich",
    "/classify": "own",
    "/explain": "own",
    "/teams": "own",
    "/search": "own",
}
_JSON_PATHS = tuple(path for path in PATHS if path != "/predict")
_KEY_HEADERS = ("api-key", "x-api-key", "x-cohere-api-key", "x-openai-api-key", "x-jinaai-api-key")
_FINE = frozenset({200, 204})
_CALLERS = frozenset({400, 404, 405, 408, 411, 413, 414, 415, 422, 431})


@dataclass(frozen=True)
class Ground:
    """The gateway under attack, as far as cases need to know it."""

    world: World
    key: str
    port: int
    body_limit: int = 2**21


@dataclass(frozen=True)
class GatewayCase:
    """A request, and what may answer it.

    Attributes:
        about: a few words for a person.
        path: of the request, which decides the form of errors.
        body: the bytes of the whole request.
        allowed: statuses.
        framed: it can be read as HTTP, so that it has to be answered in the form of its API.
        whole: False if the gateway has to wait for more bytes.
        name: `gateway:seed:number`.
        kind: of the generator.
    """

    about: str
    path: str
    body: bytes
    allowed: frozenset[int] = _FINE | _CALLERS
    framed: bool = True
    whole: bool = True
    name: str = ""
    kind: str = ""


_Maker: TypeAlias = Callable[[random.Random, Ground], GatewayCase]


def case(seed: int, number: int, ground: Ground) -> GatewayCase:
    """Make a case. Equal arguments make equal bytes."""
    rng = random.Random(f"gateway:{seed}:{number}")
    kind = rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
    made = KINDS[kind][1](rng, ground)
    return GatewayCase(**{**vars(made), "name": f"gateway:{seed}:{number}", "kind": kind})


def request(
    path: str, body: bytes, key: str, headers: Mapping[str, str] | None = None, method: str = "POST"
) -> bytes:
    """A request over HTTP. `key` is "" for none."""
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway"]
    given = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
    if key:
        given.setdefault("Authorization", f"Bearer {key}")
    lines += [f"{name}: {value}" for name, value in given.items()]
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body


def _uri(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _seeds(path: str, image: str) -> Sequence[dict[str, Any]]:
    """Right bodies of a path."""
    url_part = {"type": "image_url", "image_url": {"url": image}}
    text_part = {"type": "text", "text": "a dog"}
    if path in ("/v1/embeddings", "/embeddings"):
        return (
            {"model": "m", "input": ["a dog", image, {"image": image}, {"text": "b"}]},
            {"input": "a dog", "encoding_format": "base64", "dimensions": 128, "user": "u"},
            {"messages": [{"role": "user", "content": [url_part, text_part]}], "truncate_prompt_tokens": -1},
            {"input": [{"bytes": image}, {"url": image}], "encoding_type": "binary", "normalized": False},
            {"input": [image], "modality": "image", "truncate": True},
        )
    if path == "/v2/embed":
        kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
        return (
            {"model": "m", "input_type": "image", "images": [image], "embedding_types": kinds},
            {"texts": ["a", "b"], "truncate": "END", "output_dimension": 128},
            {"inputs": [{"content": [url_part]}, {"content": [text_part]}], "max_tokens": 5},
        )
    if path == "/vectorize":
        return ({"texts": ["a", "b"], "images": [image]}, {"texts": None, "images": [image]})
    if path == "/explain":
        return (
            {"image": image, "prompts": ["a", "b"], "templates": ["a {}"], "size": [3, 4], "overlays": True},
            {"image": image, "prompts": ["a"], "mode": "absolute", "normalize": "none", "opacity": 0.5},
            {"image": image, "prompts": ["a"], "background": ["c"], "encoding_format": "base64"},
        )
    if path == "/teams":
        return (
            {"crops": [image] * 8, "track_ids": [*range(8)], "anchors": [-1] * 7 + [0], "k": 2},
            {"image": image, "boxes": [[0, 0, 20, 40], [20, 0, 40.5, 40]], "state": "AAAA"},
        )
    if path == "/search":
        return ({"input": "a dog", "k": 5}, {"input": {"image": image}, "k": 100, "truncate": True})
    return ({"image": image, "labels": ["a", "b"], "templates": ["a {}"], "softmax": True},)


def _json(rng: random.Random, ground: Ground) -> GatewayCase:
    path = rng.choice(_JSON_PATHS)
    body: Any = rng.choice(_seeds(path, _uri(small_photo())))
    for _ in range(rng.randrange(0, 4)):
        body = mutated(body, rng) if body else {}
    if chance(rng, 0.1):
        body = rng.choice(([], None, 3, "a", [body], {"input": body}, True))
    return _of(path, json.dumps(body).encode(), ground, "a body with wrong places")


def _number(rng: random.Random) -> str:
    huge = (
        "1e999",
        "-1e999",
        "1" + "0" * 5000,
        "0." + "0" * 5000 + "1",
        "NaN",
        "Infinity",
        "-0",
        "1e-400",
        "01",
    )
    return rng.choice((str(edge(rng)), str(edge(rng) * 10**30), rng.choice(huge)))


def _text(rng: random.Random) -> str:
    """A string as it stands in JSON."""
    chosen = rng.choice(
        (
            *(
                "\\ud800",
                "\\udc00\\ud800",
                "\\u0000",
                "\\uFFFE",
                "\u202e\u0000a",
                "\\x41",
                "\\",
                "\u2028",
                "\ufeff",
            ),
            *("a" * 40_000, "\U0001f469\u200d" * 3000, "\u0300" * 5000, "http://", "data:image/png;base64,"),
            *("data:" + "," * 5000, "iVBORw0KGgo" * 30, "/9j/" * 5000, "{}" * 100, "%s%n", "'; --", " ", ""),
        )
    )
    return f'"{chosen}"'


def _values(rng: random.Random, ground: Ground) -> GatewayCase:
    """Numbers, texts, nesting and doubled names, which a JSON library would not write."""
    path = rng.choice(_JSON_PATHS)
    body = rng.choice(_seeds(path, _uri(small_photo())))
    name = rng.choice([*body, "input", "texts", "images", "dimensions", "truncate", "normalized"])
    depth = rng.choice((1, 10, 1000, 100_000))
    value = rng.choice(
        (
            _number(rng),
            _text(rng),
            "[" * depth + "]" * depth,
            '{"a":' * depth + "1" + "}" * depth,
            f"[{','.join([_text(rng)] * rng.choice((1, 65, 3000)))}]",
            f"[{','.join([_number(rng)] * 50)}]",
            f'{{"{name}":{_text(rng)},"{name}":{_number(rng)}}}',
        )
    )
    rest = json.dumps(body)[1:]
    data = f'{{"{name}":{value},{rest}' if chance(rng, 0.5) else f'{rest[:-1]},"{name}":{value}}}'
    if not data.startswith("{"):
        data = "{" + data
    return _of(path, data.encode("utf-8", "surrogatepass"), ground, f"{name}: {value[:40]}")


def _bytes(rng: random.Random, ground: Ground) -> GatewayCase:
    """A right body whose bytes are cut, changed or of another encoding."""
    path = rng.choice(_JSON_PATHS)
    text = json.dumps(rng.choice(_seeds(path, _uri(small_photo()))), ensure_ascii=False)
    text = text.replace("a dog", "ein Hünd \u20ac")
    encoding = rng.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7", "cp037", "utf-8"))
    data = text.encode(encoding, "replace")
    if encoding == "utf-8":
        at = rng.randrange(len(data))
        data = rng.choice(
            (
                data[:at],
                data[:at] + rng.randbytes(3) + data[at + 3 :],
                data + data,
                b"\0" + data,
                data + b"\0" * 9,
            )
        )
    return _of(path, data, ground, f"{encoding}, {len(data)} bytes")


def _base64(rng: random.Random, data: bytes) -> str:
    """Base64 in any spelling, right or wrong."""
    text = base64.b64encode(data).decode()
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            text,
            text,
            _uri(data),
            _uri(data, rng.choice(("png", "x-unknown", "svg+xml", "heic", "a" * 300))),
            base64.urlsafe_b64encode(data).decode().rstrip("="),
            text[:at] + rng.choice(("=", "*", " ", "\n", "\0", "ü", "====", "\ud7ff")) + text[at:],
            text[:at],
            f"data:;base64,{text}",
            f"data:image/jpeg;charset=x;base64,{text}",
            f"data:image/jpeg,{text}",
        )
    )


def _pictures(rng: random.Random, ground: Ground) -> GatewayCase:
    """Right, changed and broken image files in every API."""
    found = []
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        _, data = picture(rng, ground.world)
        if chance(rng, 0.6):
            data = mutations(data, rng)
        if chance(rng, 0.2):
            data = rng.choice(list(ground.world.broken.values()))
        found.append(_base64(rng, data))
    path = rng.choice(_JSON_PATHS)
    bodies: Mapping[str, Any] = {
        "/v1/embeddings": {"input": [{"image": image} for image in found]},
        "/embeddings": {"input": found, "modality": "image"},
        "/v2/embed": {"images": found},
        "/vectorize": {"texts": ["a"], "images": found},
        "/classify": {"image": found[0], "labels": ["a", "b"]},
        "/explain": {"image": found[0], "prompts": ["a", "b"]},
        "/teams": {"crops": found * 4},
        "/search": {"input": [{"image": found[0]}]},
    }
    return _of(path, json.dumps(bodies[path]).encode(), ground, f"{len(found)} pictures")


def _form(rng: random.Random, ground: Ground) -> GatewayCase:
    """Forms of Immich, with changed bytes, parts, names and tasks."""
    tasks: Sequence[Any] = (
        {"clip": {"visual": {"modelName": "m"}}},
        {"clip": {"textual": {"modelName": "m", "options": {"language": "de"}}}},
        {"facial-recognition": {"detection": {"modelName": "m"}}},
        {"clip": {"visual": {}}, "ocr": {}},
        {"ocr": 3},
    )
    entries = json.dumps(mutated(rng.choice(tasks), rng) if chance(rng, 0.5) else rng.choice(tasks))
    data = mutations(picture(rng, ground.world)[1], rng) if chance(rng, 0.5) else small_photo()
    parts = [
        b'Content-Disposition: form-data; name="entries"\r\n\r\n' + entries.encode(),
        b'Content-Disposition: form-data; name="image"; filename="blob"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + data,
        b'Content-Disposition: form-data; name="text"\r\n\r\n' + rng.choice((b"a dog", b"\xff\xfe", b"")),
        b'Content-Disposition: form-data; name="image"\r\n\r\ntext in place of a file',
        b'Content-Disposition: form-data; filename="../../etc/passwd"\r\n\r\nx',
        b"Content-Disposition: form-data; name=" + b"a" * rng.choice((1, 9000)) + b"\r\n\r\nx",
    ]
    chosen = parts[:3] if chance(rng, 0.5) else rng.choices(parts, k=rng.choice((1, 3, 40)))
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in chosen) + b"--b--\r\n"
    for _ in range(rng.choice((0, 0, 1, 3))):
        at = rng.randrange(len(body))
        body = body[:at] + rng.randbytes(rng.randrange(3)) + body[at + rng.randrange(3) :]
    kinds: tuple[str, ...] = (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=c",
    )
    kinds += (f"multipart/form-data; boundary={'b' * 300}", "multipart/mixed; boundary=b", "text/plain")
    kinds += ("application/x-www-form-urlencoded", "application/json", 'multipart/form-data; boundary="b')
    kind = "multipart/form-data; boundary=b" if chance(rng, 0.8) else rng.choice(kinds)
    sent = request("/predict", body, ground.key, {"Content-Type": kind})
    return GatewayCase(f"a form of {len(chosen)} parts", "/predict", sent, _FINE | _CALLERS | {501})


def _urls(rng: random.Random, ground: Ground) -> GatewayCase:
    """URLs that must not be read, among them some that may."""
    about, text, _ = url(rng, ground.port)
    path = rng.choice(tuple(path for path in _JSON_PATHS if path != "/embeddings"))
    bodies: Mapping[str, Sequence[Any]] = {
        "/v1/embeddings": (
            {"input": [text]},
            {"input": [{"url": text}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}}]}]},
        ),
        "/v2/embed": ({"images": [text]},),
        "/vectorize": ({"images": ["x", text][rng.randrange(2) :]},),
        "/classify": ({"image": text, "labels": ["a"]},),
        "/explain": ({"image": text, "prompts": ["a"]},),
        "/teams": ({"crops": [text] * 2}, {"image": text, "boxes": [[0, 0, 9, 9]]}),
        "/search": ({"input": [{"url": text}]},),
    }
    body = json.dumps(rng.choice(bodies[path])).encode()
    return GatewayCase(f"URL {about}", path, request(path, body, ground.key), frozenset({200, 400}))


def _keys(rng: random.Random, ground: Ground) -> GatewayCase:
    """No key, or a wrong one."""
    path = rng.choice((*PATHS, "/v1/models", "/meta", "/metrics"))
    method = "GET" if path in ("/v1/models", "/meta", "/metrics") else "POST"
    key = ground.key
    wrong = (
        "",
        " ",
        key[:-1],
        key + "x",
        key.upper(),
        f"{key},{key}",
        "ü" * 20,
        "a" * 9000,
        "null",
        "'",
        "Bearer",
    )
    value = rng.choice(wrong)
    headers = rng.choice(
        (
            {},
            {"Authorization": value},
            {"Authorization": f"Bearer {value}"},
            {"Authorization": f"Basic {key}"},
            {"Authorization": f"Bearer{key}"},
            {rng.choice(_KEY_HEADERS): value},
            {"Cookie": f"api-key={key}"},
            {"x-forwarded-for": "127.0.0.1", "x-original-url": "/ping"},
        )
    )
    body = b"" if method == "GET" else b'{"input": "a", "texts": ["a"]}'
    target = path if chance(rng, 0.7) else f"{path}?api-key={key}&key={key}"
    sent = request(target, body, "", headers, method)
    return GatewayCase(f"key {headers}"[:60], path, sent, frozenset({401}))


def _headers(rng: random.Random, ground: Ground) -> GatewayCase:
    """Headers that say something else of the body, and keys in every place."""
    path = rng.choice(_JSON_PATHS)
    body = json.dumps(rng.choice(_seeds(path, _uri(small_photo())))).encode()
    coding = rng.choice(("gzip", "deflate", "br", "zstd", "x", "gzip, gzip"))
    choice = rng.randrange(5)
    if choice == 0:
        packed = gzip.compress(body, mtime=0)
        sent = request(path, packed, ground.key, {"Content-Encoding": coding})
        return GatewayCase(f"Content-Encoding {coding}", path, sent, frozenset({415}))
    if choice == 1:
        large = b'{"input": "' + b"a" * (ground.body_limit + rng.randrange(1, 2**20)) + b'"}'
        return GatewayCase("a large body", path, request(path, large, ground.key), frozenset({413}))
    if choice == 2:
        name = rng.choice(_KEY_HEADERS)
        path, body = rng.choice(_JSON_PATHS[:4]), b'{"input": "a", "texts": ["a"]}'
        sent = request(
            path, body, "", {name: ground.key, "Accept": "text/html", "Content-Type": "text/plain"}
        )
        return GatewayCase(f"the key as {name}", path, sent, _FINE)
    if choice == 3:
        extra = {f"X-{number}": "a" * 50 for number in range(rng.choice((1, 100, 900)))}
        sent = request(path, body, ground.key, extra)
        return GatewayCase(f"{len(extra)} headers", path, sent, _FINE | frozenset({400, 431}))
    kind = rng.choice(("", "application/xml", "multipart/form-data; boundary=b", "/", "a" * 5000, "ü"))
    sent = request(path, body, ground.key, {"Content-Type": kind, "Expect": "100-continue"})
    return GatewayCase(f"Content-Type {kind[:20]!r}", path, sent, _FINE | _CALLERS)


def _paths(rng: random.Random, ground: Ground) -> GatewayCase:
    """Other paths and methods."""
    path = rng.choice(
        (
            *(*PATHS, "/v1/models", "/meta", "/ping", "/metrics", "/health", "/.well-known/live"),
            *(
                "/nothing",
                "/v1",
                "/v1/embeddings/x",
                "/v2/models/embed_image/infer",
                "/%00",
                "/%2e%2e/etc/passwd",
            ),
            *(
                "/../../etc/passwd",
                "/v1//embeddings",
                "/V1/EMBEDDINGS",
                "/.git/config",
                "/" + "a" * 9000,
                "/%ff%fe",
            ),
        )
    )
    method = rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"))
    sent = request(path, b"" if method == "GET" else b"{}", ground.key, {}, method)
    # The parser of HTTP knows no such method, and answers before any API does.
    known = method != "BREW"
    return GatewayCase(f"{method} {path[:40]}", path, sent, _FINE | _CALLERS, framed=known)


def _broken(rng: random.Random, ground: Ground) -> GatewayCase:
    """Requests that cannot be read as HTTP, or that never end."""
    path = rng.choice(tuple(PATHS))
    whole = request(path, b'{"input": "a"}', ground.key)
    lines = (b"", b"POST", b"POST  HTTP/1.1", b"\0\0", b"GET / HTTP/9.9", b"x" * 70_000, b"PRI * HTTP/2.0")
    bad: tuple[str, ...] = (
        "Content-Length: -1",
        "Content-Length: 1e3",
        "Content-Length: " + "1" * 40,
        "Transfer-Encoding: x",
    )
    bad += ("Transfer-Encoding: chunked\r\nContent-Length: 3", "X: " + "x" * 70_000, "X\0: a", " folded", "X")
    chunk = rng.choice((b"-1", b"x", b"ffffffffffffffff", b"0x2", b"2;" + b"a" * 5000, b"2"))
    head = whole.partition(b"\r\n\r\n")[0]
    chunked = head.replace(b"Content-Length: 14", b"Transfer-Encoding: chunked")
    made = rng.choice(
        (
            rng.choice(lines) + whole[whole.index(b"\r\n") :],
            head + b"\r\n" + rng.choice(bad).encode() + b'\r\n\r\n{"input": "a"}',
            whole.replace(b"Content-Length: 14", b"Content-Length: %d" % rng.choice((15, 10**6, 2**31))),
            chunked + b"\r\n\r\n" + chunk + b"\r\n{}\r\n0\r\n\r\n",
            whole[: rng.randrange(1, len(whole))],
            rng.randbytes(rng.choice((1, 100, 5000))),
        )
    )
    return GatewayCase("broken framing", path, made, framed=False, whole=False)


def _of(path: str, body: bytes, ground: Ground, about: str) -> GatewayCase:
    return GatewayCase(about, path, request(path, body, ground.key))


KINDS: Mapping[str, tuple[int, _Maker]] = {
    "json": (200, _json),
    "values": (150, _values),
    "bytes": (80, _bytes),
    "pictures": (180, _pictures),
    "forms": (120, _form),
    "urls": (120, _urls),
    "keys": (50, _keys),
    "headers": (40, _headers),
    "paths": (30, _paths),
    "broken": (30, _broken),
}

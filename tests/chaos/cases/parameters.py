"""Cases of parameters: names, types and values on requests, inputs and outputs, and further fields."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tritonclient.grpc import service_pb2

from tests.chaos.cases.base import Sent, World, chance, edge, small_photo
from tests.chaos.messages import Infer, grpc_bytes, http_parts, http_request, of_rows

__all__ = ["NAMES", "good_requests", "parameters"]

NAMES: tuple[str, ...] = (
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
    "binary_data",
    "binary_data_output",
)
NAMES += (
    "classification",
    "shared_memory_region",
    "shared_memory_offset",
    "shared_memory_byte_size",
    "headers",
)
NAMES += ("triton_enable_empty_final_response", "triton_final_response", "binary_data_size", "content_type")
NAMES += (
    "normalized",
    "base64_encoded",
    "embed_model",
    "truncation",
    "softmax",
    "color_order",
    "unknown",
    "",
)
_TEXTS = (
    "",
    "x",
    "1",
    "true",
    "siglip_vision",
    "embed_image",
    "siglip_text",
    "9" * 400,
    "größer\n",
    "../x",
    "RGB",
)


def good_requests(world: World) -> dict[str, Infer]:
    """Make an answerable request for every public model."""
    image = of_rows("INPUT_IMAGE", [small_photo()])
    text, labels = of_rows("INPUT_TEXT", [b"a dog"]), of_rows("LABELS", [b"dog", b"cat"], [2])
    crops = of_rows("CROPS", list(world.crops[:8]), [8])
    found = [Infer(model, [image]) for model in ("embed_image", "siglip_vision", "siglip_vision_features")]
    found += [Infer(model, [text]) for model in ("embed_text", "siglip_text")]
    found.append(Infer("classify_image", [image, labels]))
    found.append(Infer("explain_image", [image, of_rows("PROMPTS", [b"dog"], [1])]))
    found.append(Infer("fit_teams", [crops]))
    found.append(Infer("classify_teams", [crops, of_rows("STATE", [world.state], [1])]))
    found += [Infer("siglip_vision_process", [image]), Infer("siglip_text_tokenize", [text])]
    return {request.model: request for request in found}


def parameters(rng: random.Random, world: World) -> tuple[str, Sent]:
    """Make a good request and give it one to four parameters or fields that it does not need."""
    requests = good_requests(world)
    # The teams are costly, so they are asked less often.
    weights = [1 if name.endswith("teams") else 6 for name in requests]
    model = rng.choices(list(requests), weights)[0]
    if chance(rng, 0.5):
        message = service_pb2.ModelInferRequest.FromString(grpc_bytes(requests[model]))
        done = [_edit_message(rng, message) for _ in range(rng.choice((1, 1, 2, 4)))]
        return f"{model}: {'; '.join(done)}", Sent(
            "grpc", bytes(message.SerializeToString(deterministic=True))
        )
    about, data = http_parts(requests[model])
    done = [_edit_json(rng, about) for _ in range(rng.choice((1, 1, 2, 4)))]
    text = json.dumps(about).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), **_headers(rng)}
    path = f"/v2/models/{model}{rng.choice(('', '', '', '/versions/1', '/versions/2'))}/infer"
    return f"{model}: {'; '.join(done)}", Sent("http", http_request(path, text + data, headers))


def _edit_message(rng: random.Random, message: Any) -> str:
    name = rng.choice(NAMES)
    kinds: Mapping[str, Callable[[], Any]] = {
        "bool_param": lambda: chance(rng, 0.5),
        "int64_param": lambda: max(min(edge(rng), 2**63 - 1), -(2**63)),
        "uint64_param": lambda: abs(edge(rng)) % 2**64,
        "double_param": lambda: rng.choice((0.0, 0.5, -1.0, 1e308, float("nan"), float("inf"))),
        "string_param": lambda: rng.choice(_TEXTS),
    }
    kind = rng.choice(list(kinds))
    value = kinds[kind]()
    match rng.randrange(8):
        case 0:
            setattr(message.inputs[0].parameters[name], kind, value)
            return f"input parameter {name!r} {kind} {str(value)[:40]!r}"
        case 1:
            wanted = message.outputs.add(name=rng.choice(("EMBEDDING", "STATE", "LABELS", "NONE", "")))
            setattr(wanted.parameters[name], kind, value)
            return f"output {wanted.name!r} with {name!r} {kind} {str(value)[:40]!r}"
        case 2:
            field = rng.choice(("id", "model_version"))
            setattr(message, field, rng.choice(_TEXTS))
            return f"{field} {getattr(message, field)[:40]!r}"
        case 3:
            message.parameters[name].Clear()
            return f"parameter {name!r} without a value"
        case _:
            setattr(message.parameters[name], kind, value)
            return f"parameter {name!r} {kind} {str(value)[:40]!r}"


def _edit_json(rng: random.Random, about: dict[str, Any]) -> str:
    name = rng.choice(NAMES)
    values: Sequence[Any] = (
        True,
        False,
        None,
        edge(rng),
        0.5,
        1e308,
        rng.choice(_TEXTS),
        [1],
        {"a": 1},
        [],
        {},
    )
    value = rng.choice(values)
    match rng.randrange(6):
        case 0:
            about["inputs"][0]["parameters"][name] = value
            return f"input parameter {name!r} {str(value)[:40]!r}"
        case 1:
            wanted = {"name": rng.choice(("EMBEDDING", "STATE", "NONE", "")), "parameters": {name: value}}
            given = about.get("outputs")
            about["outputs"] = [*given, wanted] if isinstance(given, list) else [wanted]
            return f"output {wanted['name']!r} with {name!r} {str(value)[:40]!r}"
        case 2:
            field = rng.choice(("id", "parameters", "outputs", "unknown"))
            about[field] = value
            return f"{field} {str(value)[:40]!r}"
        case _:
            given = about.get("parameters")
            if not isinstance(given, dict):
                given = about["parameters"] = {}
            given[name] = value
            return f"parameter {name!r} {str(value)[:40]!r}"


def _headers(rng: random.Random) -> dict[str, str]:
    if not chance(rng, 0.2):
        return {}
    names = (
        "normalized",
        "base64_encoded",
        "embed_model",
        "truncation",
        "color_order",
        "Accept-Encoding",
        "traceparent",
    )
    return {
        rng.choice(names): rng.choice((*_TEXTS[:6], "gzip", "00-0-0-0", "deflate", "ü")).replace("\n", "")
    }

"""Every field of the protocol reaches every public model, and the server lives.

Models whose requests are costly get a seventh of the changes, in which each name and each value occurs.
`make chaos` draws further ones for all models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeAlias

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
import tritonclient.http as triton_http
from images import encode, photo
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor
from wire import ROOT, post

from siglip_serve.launcher import TritonServer

Inputs: TypeAlias = Mapping[str, NDArray[Any]]
Message: TypeAlias = Any  # a ModelInferRequest, of which mypy knows nothing
Edit: TypeAlias = Callable[[Message], object]

PUBLIC = (
    "embed_image",
    "embed_text",
    "classify_image",
    "explain_image",
    "fit_teams",
    "classify_teams",
    "siglip_vision",
    "siglip_vision_features",
    "siglip_text",
)
COSTLY = {"explain_image", "fit_teams", "classify_teams"}
# No multiple of it is the number of names or values, so that every seventh pair has each of them.
SHARE = 7
# Triton reads most of these itself. The last ones are a parameter of this server, and unknown names.
NAMES = (
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
    "binary_data",
    "binary_data_output",
    "classification",
    "triton_enable_empty_final_response",
    "triton_unknown",
    "normalized",
    "unknown",
    "",
    "größer\n",
)
GRPC_VALUES: tuple[tuple[str, Any], ...] = (
    ("bool_param", True),
    ("int64_param", 0),
    ("int64_param", 1),
    ("int64_param", -1),
    ("int64_param", 2**63 - 1),
    ("uint64_param", 2**64 - 1),
    ("double_param", 0.5),
    ("string_param", ""),
    ("string_param", "x"),
    ("string_param", "1" * 300),
)
HTTP_VALUES: tuple[Any, ...] = (
    True,
    0,
    1,
    -1,
    2**63 - 1,
    2**64 - 1,
    0.5,
    "",
    "x",
    "1" * 300,
    None,
    [1],
    {"a": 1},
)
SEQUENCES: tuple[dict[str, Any], ...] = tuple(
    {"sequence_id": identity, "sequence_start": start, "sequence_end": end, "priority": 1, "timeout": 10**9}
    for identity, start, end in product(("x", "1", 1, 2**40), (True, False), (True, False))
)

# A request that may wait a microsecond ends with UNAVAILABLE or 503, and an unknown version with NOT_FOUND.
STATUSES = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "UNAVAILABLE",
    "UNIMPLEMENTED",
    "200",
    "400",
    "501",
    "503",
}


def texts(*rows: bytes, columns: bool = True) -> NDArray[Any]:
    array = np.array(rows, dtype=np.object_)
    return array.reshape(-1, 1) if columns else array


@pytest.fixture(scope="module")
def inputs(server: TritonServer) -> dict[str, Inputs]:
    """Inputs of each public model that it answers."""
    picture = {"INPUT_IMAGE": texts(encode(photo(80, 60), "JPEG"))}
    labels = texts(b"a dog", b"a cat", columns=False)
    crops = {"CROPS": texts(*(encode(photo(24 + n, 60), "JPEG") for n in range(8)), columns=False)}
    found: dict[str, Inputs] = {
        "embed_text": {"INPUT_TEXT": texts(b"a dog")},
        "siglip_text": {"INPUT_TEXT": texts(b"a dog")},
        "embed_image": picture,
        "siglip_vision": picture,
        "siglip_vision_features": picture,
        "classify_image": picture | {"LABELS": labels},
        "explain_image": picture | {"PROMPTS": labels},
        "fit_teams": crops,
    }
    answer = stub(server).ModelInfer(message("fit_teams", crops), timeout=60)
    state = answer.raw_output_contents[[output.name for output in answer.outputs].index("STATE")][4:]
    return found | {"classify_teams": crops | {"STATE": texts(state, columns=False)}}


def stub(server: TritonServer) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(server.grpc_url))


def message(model: str, inputs: Inputs) -> Message:
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype="BYTES", shape=array.shape)
        request.raw_input_contents.append(serialize_byte_tensor(array).item())
    return request


def add_parameter(kind: str, value: Any, name: str, place: str, request: Message) -> None:
    """Give the request, its first input or an output a parameter, with `kind` "" one of no type."""
    given = service_pb2.InferParameter(**({kind: value} if kind else {}))
    if place == "request":
        request.parameters[name].CopyFrom(given)
    elif place == "input":
        request.inputs[0].parameters[name].CopyFrom(given)
    else:
        request.outputs.add(name="EMBEDDING").parameters[name].CopyFrom(given)


def add_sequence(sequence: Mapping[str, Any], request: Message) -> None:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param"}
    for name, value in sequence.items():
        add_parameter(kinds[type(value)], value, name, "request", request)


def set_field(name: str, value: str, request: Message) -> None:
    setattr(request, name, value)


def grpc_edits() -> Iterator[Edit]:
    """Changes of a message, each of one field or one group of fields."""
    for name, (kind, value) in product(NAMES, GRPC_VALUES):
        yield partial(add_parameter, kind, value, name, "request")
    for name in NAMES:
        yield partial(add_parameter, "string_param", "x", name, "input")
        yield partial(add_parameter, "bool_param", True, name, "input")
        yield partial(add_parameter, "", None, name, "request")
        yield partial(add_parameter, "int64_param", 1, name, "output")
    for sequence in SEQUENCES:
        yield partial(add_sequence, sequence)
    for name, text in product(("id", "model_version"), ("x", "1", "-1", "7", "9" * 300, "größer\n")):
        yield partial(set_field, name, text)


def chosen(edits: Iterator[Edit], model: str) -> Iterator[Edit]:
    """Choose the changes that a model gets."""
    return islice(edits, 0, None, SHARE if model in COSTLY else 1)


def by_grpc(server: TritonServer, model: str, inputs: Inputs) -> Counter[str]:
    """Send a request with each edit; return how often each status came."""
    sender = stub(server)

    def ask(edit: Edit) -> str:
        request = message(model, inputs)
        edit(request)
        try:
            sender.ModelInfer(request, timeout=60)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(ask, chosen(grpc_edits(), model)))


def update(place: str, fields: Mapping[str, Any], request: Message) -> None:
    """Add fields to the JSON of a request, or to the parameters of the request or its first input."""
    places = {
        "top": request,
        "request": request.get("parameters"),
        "input": request["inputs"][0]["parameters"],
    }
    places[place].update(fields)


def http_edits() -> Iterator[Edit]:
    """Changes of the JSON of a request, each of one field or one group of fields."""
    for name, value in product(NAMES, HTTP_VALUES):
        yield partial(update, "request", {name: value})
    for name, value in product(NAMES, ("x", True, [1])):
        yield partial(update, "input", {name: value})
    for sequence in SEQUENCES:
        yield partial(update, "request", sequence)
    for value in HTTP_VALUES:
        for name in ("id", "parameters", "unknown"):
            yield partial(update, "top", {name: value})
        yield partial(update, "top", {"outputs": [{"name": "EMBEDDING", "parameters": {"x": value}}]})


def by_http(server: TritonServer, model: str, inputs: Inputs) -> Counter[str]:
    """Send a request with each edit; return how often each status came."""
    tensors = []
    for name, array in inputs.items():
        tensors.append(triton_http.InferInput(name, list(array.shape), "BYTES"))
        tensors[-1].set_data_from_numpy(array)
    whole, size = triton_http.InferenceServerClient.generate_request_body(tensors)
    url = f"http://{server.http_url}/v2/models/{model}/infer"

    def ask(edit: Edit) -> str:
        head = json.loads(whole[:size])
        head.setdefault("parameters", {})
        edit(head)
        text = json.dumps(head).encode()
        length = {"Inference-Header-Content-Length": str(len(text))}
        return str(post(url, text + whole[size:], length)[0])

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(ask, chosen(http_edits(), model)))


@pytest.mark.parametrize("send", [by_grpc, by_http])
@pytest.mark.parametrize("model", PUBLIC)
def test_no_field_of_a_request_ends_the_server(
    model: str,
    send: Callable[[TritonServer, str, Inputs], Counter[str]],
    server: TritonServer,
    inputs: dict[str, Inputs],
) -> None:
    pid = server.pid
    statuses = send(server, model, inputs[model])
    assert server.pid == pid
    stub(server).ModelInfer(message(model, inputs[model]), timeout=60)
    assert set(statuses) <= STATUSES
    least = 50 // SHARE if model in COSTLY else 50
    assert statuses["OK"] + statuses["200"] > least
    assert statuses["INVALID_ARGUMENT"] + statuses["400"] > least


def test_every_ensemble_is_public() -> None:
    ensembles = {
        path.parent.name
        for path in Path(ROOT / "model_repository").glob("*/config.pbtxt")
        if 'platform: "ensemble"' in path.read_text(encoding="utf-8")
    }
    assert ensembles == set(PUBLIC)

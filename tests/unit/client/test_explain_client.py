"""`Client.explain` without a server: what it sends, makes of an answer, and refuses itself."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from siglip_serve_client import AsyncClient, Client, Explanation, ServerError
from siglip_serve_client._operations.explain import ask_explanation
from siglip_serve_client._operations.link import Link
from siglip_serve_client._operations.requests import Call

ARRAYS = ["HEATMAPS", "SCORES", "UNATTRIBUTED", "PATCH_MAPS"]


class Answered:
    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays = arrays

    def as_numpy(self, name: str) -> Any:
        return self.arrays.get(name)


class Recording:
    """A transport that keeps the calls and answers each with the same arrays."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays, self.calls = arrays, list[Call]()

    async def infer(self, call: Call) -> Answered:
        self.calls.append(call)
        return Answered(self.arrays)


def explanation_of(arrays: dict[str, Any], prompts: Any = ("dog",), **options: Any) -> Explanation:
    return asyncio.run(ask_explanation(Link(Recording(arrays), 5.0), b"JPEG", prompts, options))  # type: ignore[arg-type]


def call_of(prompts: Any, **options: Any) -> Call:
    """The one request that an explanation takes."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, "PNG")
    transport = Recording({**dict.fromkeys(ARRAYS, np.zeros(1)), "OVERLAY": np.array([file.getvalue()])})
    asyncio.run(ask_explanation(Link(transport, 5.0), b"JPEG", prompts, options))  # type: ignore[arg-type]
    (call,) = transport.calls
    return call


def test_a_plain_request_has_prompts_and_asks_for_no_pictures() -> None:
    call = call_of(["a dog", "größer"])
    assert (call.model, call.parameters, list(call.outputs)) == ("explain_image", {}, ARRAYS)
    image, prompts = call.inputs
    assert (image.name, image.shape) == ("INPUT_IMAGE", (1, 1))
    assert (prompts.name, prompts.datatype, prompts.shape) == ("PROMPTS", "BYTES", (2,))
    assert prompts.array is not None
    assert prompts.array.tolist() == [b"a dog", "größer".encode()]


def test_every_option_is_an_input() -> None:
    call = call_of(
        ("dog",),
        templates=["a {}", "{}"],
        background=["sky"],
        mode="relative",
        normalize="joint",
        size=(30, 40),
        overlays=True,
        colormap="cividis",
        opacity=0.25,
    )
    assert list(call.outputs) == [*ARRAYS, "OVERLAY"]
    sent = {tensor.name: tensor for tensor in call.inputs[2:]}
    values = {name: tensor.array.tolist() for name, tensor in sent.items() if tensor.array is not None}
    assert values == {
        "TEMPLATE": [b"a {}", b"{}"],
        "BACKGROUND": [b"sky"],
        "MODE": [b"relative"],
        "NORMALIZE": [b"joint"],
        "SIZE": [30, 40],
        "COLORMAP": [b"cividis"],
        "OPACITY": [0.25],
    }
    assert (sent["SIZE"].datatype, sent["OPACITY"].datatype) == ("INT32", "FP32")


def test_an_answer_becomes_an_explanation() -> None:
    arrays: dict[str, Any] = {name: np.full((1, 2, 2), number) for number, name in enumerate(ARRAYS)}
    found = explanation_of(arrays)
    assert found.prompts == ("dog",)
    assert found.overlays == ()
    assert found.heatmaps is arrays["HEATMAPS"]
    assert found.scores is arrays["SCORES"]
    assert found.unattributed is arrays["UNATTRIBUTED"]
    assert found.patch_maps is arrays["PATCH_MAPS"]
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(file, "PNG")
    (overlay,) = explanation_of({**arrays, "OVERLAY": np.array([file.getvalue()])}, overlays=True).overlays
    assert (overlay.size, overlay.getpixel((0, 0))) == ((3, 2), (9, 8, 7))


def test_an_output_that_is_missing_is_named() -> None:
    with pytest.raises(ServerError, match="no output HEATMAPS"):
        explanation_of({})


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("dog", {}, TypeError, "prompts: one str, expected several texts"),
        (["dog", 3], {}, TypeError, r"prompts\[1\]: int, expected str"),
        (["dog"], {"templates": "{}"}, TypeError, "templates: one str"),
        (["dog"], {"background": b"sky"}, TypeError, "background: one bytes"),
        (["dog"], {"mode": None}, TypeError, r"mode\[0\]: NoneType, expected str"),
        (["dog"], {"overlay": True}, TypeError, r"explain\(\) has no argument 'overlay'"),
        (["dog"], {"size": 5}, ValueError, "size: 5, expected height and width"),
        (["dog"], {"size": (5, -1)}, ValueError, "size: "),
        (["dog"], {"size": (5.0, 5.0)}, ValueError, "size: "),
        (["dog"], {"opacity": "half"}, ValueError, "half"),
    ],
)
def test_refuses_bad_arguments_before_a_request(
    prompts: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with Client("127.0.0.1:9") as client, pytest.raises(error, match=message):
        client.explain(b"JPEG", prompts, **options)


def test_both_clients_say_the_same() -> None:
    assert Client.explain.__annotations__ == AsyncClient.explain.__annotations__

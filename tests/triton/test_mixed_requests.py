"""Requests that come after others are answered as if they had come alone; parameters come as headers."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from images import encode, photo
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException
from wire import GrpcCaller, post_image, raw_embedding

from siglip_serve.launcher import TritonServer

PHOTO = encode(photo(120, 90), "JPEG")


@pytest.fixture(scope="module")
def caller(server: TritonServer) -> GrpcCaller:
    return GrpcCaller(server.grpc_url)


def ask(
    caller: GrpcCaller,
    model: str,
    inputs: dict[str, NDArray[Any]],
    outputs: Sequence[str],
    **parameters: Any,
) -> dict[str, NDArray[Any]]:
    """The named outputs of one request."""
    kinds = {"O": "BYTES", "u": "UINT8", "f": "FP32", "i": "INT32"}
    tensors = []
    for name, array in inputs.items():
        tensors.append(caller.module.InferInput(name, list(array.shape), kinds[array.dtype.kind]))
        tensors[-1].set_data_from_numpy(array)
    asked = [caller.module.InferRequestedOutput(name) for name in outputs]
    result = caller.client.infer(model, tensors, outputs=asked, parameters=parameters or None)
    return {name: result.as_numpy(name) for name in outputs}


def refusal(call: Callable[[], Any]) -> str:
    """The message with which a request is refused as invalid."""
    with pytest.raises(InferenceServerException) as refused:
        call()
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    return str(refused.value.message())


def texts(*values: str) -> dict[str, NDArray[Any]]:
    return {"INPUT_TEXT": np.array([value.encode() for value in values], np.object_).reshape(-1, 1)}


@pytest.mark.parametrize("value", ["false", "False", "FALSE"])
def test_a_header_that_says_false_is_no(server: TritonServer, value: str) -> None:
    plain = raw_embedding(post_image(server.http_url, PHOTO)[1])
    unit = raw_embedding(post_image(server.http_url, PHOTO, {"normalized": value})[1])
    assert abs(np.linalg.norm(plain) - 1) > 0.1
    np.testing.assert_allclose(unit, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", ["true", "True", "TRUE"])
def test_a_header_that_says_true_is_yes(server: TritonServer, value: str) -> None:
    unit = raw_embedding(post_image(server.http_url, PHOTO, {"normalized": value})[1])
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", ["1", "yes", "falsely"])
def test_refuses_a_header_that_says_neither(server: TritonServer, value: str) -> None:
    status, body = post_image(server.http_url, PHOTO, {"normalized": value})
    assert status == 400
    message = f"parameter 'normalized': got {value!r}, expected true or false"
    assert message in json.loads(body)["error"]


def test_remembers_no_text_that_was_cut(caller: GrpcCaller) -> None:
    text = "a dog on a sofa " * 30
    assert len(text) < 1024
    cut = ask(caller, "embed_text", texts(text), ["EMBEDDING"], truncation=True)["EMBEDDING"]
    assert np.isfinite(cut).all()
    assert "INPUT_TEXT[0]: the text has" in refusal(
        lambda: ask(caller, "embed_text", texts(text), ["EMBEDDING"])
    )
    again = ask(caller, "embed_text", texts(text), ["EMBEDDING"], truncation=True)["EMBEDDING"]
    np.testing.assert_allclose(again, cut, rtol=1e-5, atol=1e-6)


def test_texts_known_and_new_come_back_in_their_places(caller: GrpcCaller) -> None:
    words = [f"a drawing of thing number {number}" for number in range(12)]
    alone = np.concatenate(
        [ask(caller, "embed_text", texts(word), ["EMBEDDING"])["EMBEDDING"] for word in words]
    )
    mixed = [words[3], "something new", words[0], words[3], "something new", *words[5:]]
    got = ask(caller, "embed_text", texts(*mixed), ["EMBEDDING"])["EMBEDDING"]
    np.testing.assert_allclose(
        got[[0, 2, 3, *range(5, 12)]], alone[[3, 0, 3, *range(5, 12)]], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(got[1], got[4], rtol=1e-6)
    assert np.abs(got[1] - alone).max(axis=1).min() > 1e-3


def with_region(state: bytes, region: str) -> bytes:
    """A state as a server of another jersey region would have made it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(state)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "stamp.npy":
                stamp = json.loads(np.load(io.BytesIO(content)).tobytes())
                member = io.BytesIO()
                changed = json.dumps({**stamp, "region": region}, sort_keys=True).encode()
                np.save(member, np.frombuffer(changed, np.uint8))
                content = member.getvalue()
            new.writestr(name, content)
    return buffer.getvalue()


def test_refuses_a_state_of_another_jersey_region(caller: GrpcCaller) -> None:
    crops = [encode(photo(60, 90, seed), "PNG") for seed in range(16)]
    inputs = {"CROPS": np.array(crops, np.object_)}
    state = bytes(ask(caller, "fit_teams", inputs, ["STATE"])["STATE"][0])
    with np.load(io.BytesIO(state)) as members:
        stamp = json.loads(members["stamp"].tobytes())
    assert set(stamp) == {"version", "encoder", "pooling", "region", "color_order"}
    assert stamp["region"] == "0.25,0.2,0.75,0.5"
    other = np.array([with_region(state, "0,0,1,1")], np.object_)
    message = refusal(lambda: ask(caller, "classify_teams", {**inputs, "STATE": other}, ["LABELS"]))
    assert "STATE: made with region '0,0,1,1', this server has '0.25,0.2,0.75,0.5': fit the teams" in message
    refit = refusal(lambda: ask(caller, "fit_teams", {**inputs, "PREV_STATE": other}, ["LABELS"]))
    assert "PREV_STATE: made with region '0,0,1,1', this server has '0.25,0.2,0.75,0.5'" in refit

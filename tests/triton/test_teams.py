"""`fit_teams`, `classify_teams` and their steps on a real server."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from images import encode
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from siglip_serve.launcher import TritonServer

Arrays = dict[str, NDArray[Any]]
SHIRTS = ((200, 30, 40), (240, 240, 240), (230, 210, 60), (20, 30, 60))


def player(shirt: tuple[int, int, int], seed: int, height: int = 96) -> NDArray[np.uint8]:
    """A figure on grass: uint8 [height, height / 2, 3]."""
    rng = np.random.default_rng(seed)
    crop = np.full((height, height // 2, 3), (60, 140, 60), dtype=np.float64)
    crop[height // 20 : height // 6, height // 5 : height * 3 // 10] = (210, 170, 140)
    crop[height // 6 : height // 2, height // 8 : height * 3 // 8] = shirt
    crop[height // 2 : height * 9 // 10, height // 6 : height // 3] = (30, 30, 40)
    crop = crop + rng.normal(0, 6, crop.shape)
    return np.asarray(crop.clip(0, 255), dtype=np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    return encode(Image.fromarray(pixels), "PNG")


def players(count: int, shirts: tuple[int, int] = (0, 1), seed: int = 0) -> list[bytes]:
    """Crops of two teams, alternating."""
    return [png(player(SHIRTS[shirts[i % 2]], 1000 * seed + i)) for i in range(count)]


def strings(values: list[bytes]) -> NDArray[Any]:
    return np.array([*values, None], dtype=np.object_)[:-1]  # stays an array of objects when it is empty


class Caller:
    """Calls of any model over gRPC."""

    module: Any = triton_grpc

    def __init__(self, server: TritonServer) -> None:
        self.client = self.module.InferenceServerClient(self.url(server))

    @staticmethod
    def url(server: TritonServer) -> str:
        return server.grpc_url

    def __call__(self, model: str, inputs: Mapping[str, Any], parameters: Any = None) -> Arrays:
        tensors = []
        for name, array in inputs.items():
            kind = "BYTES" if array.dtype == np.object_ else np_to_triton_dtype(array.dtype)
            tensors.append(self.module.InferInput(name, list(array.shape), kind))
            tensors[-1].set_data_from_numpy(array)
        result = self.client.infer(model, tensors, parameters=parameters)
        answer = result.get_response()
        named = answer["outputs"] if isinstance(answer, dict) else answer.outputs
        names = [output["name"] if isinstance(output, dict) else output.name for output in named]
        return {name: result.as_numpy(name) for name in names}

    def fit(self, crops: list[bytes], **hints: Any) -> Arrays:
        return self("fit_teams", {"CROPS": strings(crops), **hints})

    def classify(self, crops: list[bytes], state: bytes) -> Arrays:
        return self("classify_teams", {"CROPS": strings(crops), "STATE": strings([state])})


class HttpCaller(Caller):
    """Calls of any model over HTTP."""

    module: Any = triton_http

    @staticmethod
    def url(server: TritonServer) -> str:
        return server.http_url


@pytest.fixture(scope="module")
def caller(server: TritonServer) -> Caller:
    return Caller(server)


@pytest.fixture(scope="module")
def state(caller: Caller) -> bytes:
    """A state fitted to `players(40)`."""
    return bytes(caller.fit(players(40))["STATE"][0])


@pytest.mark.parametrize("kind", [Caller, HttpCaller])
def test_finds_two_teams_and_recognises_them(server: TritonServer, kind: type[Caller]) -> None:
    caller = kind(server)
    fitted = caller.fit(players(40))
    truth = np.arange(40) % 2
    labels = fitted["LABELS"]
    assert (labels == truth).all() or (labels == 1 - truth).all()
    assert labels.dtype == np.int32
    assert list(fitted["STATUS"]) == [b"OK"]
    said = caller.classify(players(22, seed=7), fitted["STATE"][0])
    assert (said["LABELS"] == labels[:22]).all()
    assert said["MARGIN"].min() > 0.3
    assert not said["REGION_FALLBACK"].any()
    assert said["COORDINATES"].shape == (22, 2)


def test_ids_do_not_depend_on_the_order(caller: Caller) -> None:
    crops = players(40)
    labels = caller.fit(crops)["LABELS"]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        assert (caller.fit([crops[i] for i in order])["LABELS"] == labels[order]).all()


def test_anchors_set_ids_and_refits_keep_them(caller: Caller) -> None:
    crops = players(40)
    truth = np.arange(40, dtype=np.int32) % 2
    for wanted in (truth, 1 - truth):
        anchors = np.where(np.arange(40) < 6, wanted, -1).astype(np.int32)
        state = strings([caller.fit(crops, ANCHOR=anchors)["STATE"][0]])
        for seed in range(3):
            refit = caller.fit(players(40, seed=seed + 1), PREV_STATE=state)
            assert (refit["LABELS"] == wanted).all()
            state = strings([refit["STATE"][0]])


def test_tracks_are_joined_and_only_players_get_teams(caller: Caller) -> None:
    crops = [*players(40), *(png(player(SHIRTS[2], i)) for i in range(4))]
    roles = strings([b"player"] * 38 + [b""] * 2 + [b"referee"] * 2 + [b"goalkeeper"] * 2)
    tracks = np.concatenate([np.arange(40) % 10, [20, 20, 21, 21]]).astype(np.int64)
    fitted = caller.fit(crops, ROLE=roles, TRACK_ID=tracks, K=np.array([2], np.int32))
    assert (fitted["LABELS"][40:] == -1).all()
    assert (fitted["LABELS"][:40] == fitted["LABELS"][np.arange(40) % 2]).all()


def test_frames_with_boxes_equal_their_crops(caller: Caller, state: bytes) -> None:
    figures = [player(SHIRTS[i % 2], i) for i in range(6)]
    frame = np.full((200, 400, 3), 90, np.uint8)
    boxes = np.array([[60 * i + 5, 50, 60 * i + 53, 146] for i in range(6)], np.float32)
    for box, figure in zip(boxes.astype(int), figures, strict=True):
        frame[box[1] : box[3], box[0] : box[2]] = figure
    expected = caller.classify([png(figure) for figure in figures], state)
    rest = {"BOXES": boxes, "STATE": strings([state])}
    ways = [
        caller("classify_teams", {"FRAME": strings([png(frame)]), **rest}),
        caller("classify_teams", {"RAW_FRAME": frame, **rest}, {"color_order": "RGB"}),
        caller("classify_teams", {"RAW_FRAME": frame[:, :, ::-1].copy(), **rest}, {"color_order": "BGR"}),
    ]
    for way in ways:
        for name, array in expected.items():
            assert np.allclose(way[name], array, atol=1e-4), name


def test_accepts_a_request_without_crops(caller: Caller, state: bytes) -> None:
    said = caller.classify([], state)
    assert said["LABELS"].dtype == np.int32
    assert said["LABELS"].shape == (0,)
    assert said["COORDINATES"].shape == (0, 2)


def test_flags_a_crop_of_one_row(caller: Caller, state: bytes) -> None:
    crops = [png(np.full((1, 8, 3), 90, np.uint8)), *players(2)]
    assert list(caller.classify(crops, state)["REGION_FALLBACK"]) == [True, False, False]


def test_equal_crops_are_degenerate(caller: Caller) -> None:
    fitted = caller.fit(players(1) * 20)
    assert list(fitted["STATUS"]) == [b"DEGENERATE"]
    assert (fitted["LABELS"] == -1).all()
    assert fitted["STATE"][0] == b""


def test_fits_hundreds_of_crops(caller: Caller) -> None:
    crops = players(40) * 15
    labels = caller.fit(crops)["LABELS"]
    assert (labels.reshape(15, 40) == labels[:40]).all()


def test_many_requests_at_once_do_not_mix_their_matches(server: TritonServer) -> None:
    """Sixteen clients send other crops with each request; each answer equals that of the request alone.

    The requests take the states of 8 matches. A margin is a number of its own for each crop and state.
    """
    pairs = [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)]
    caller = Caller(server)
    states = [bytes(caller.fit(players(12, pairs[n % 5], seed=n))["STATE"][0]) for n in range(8)]
    matches = [(players(8 + n % 5, pairs[n % 5], seed=n), states[n % 8]) for n in range(48)]
    alone = [caller.classify(crops, state) for crops, state in matches]
    callers = [Caller(server) for _ in range(16)]

    def ask(number: int) -> Arrays:
        return callers[number % 16].classify(*matches[number])

    order = np.random.default_rng(0).permutation(48).tolist()
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, order))
    for number, said in zip(order, together, strict=True):
        np.testing.assert_array_equal(said["LABELS"], alone[number]["LABELS"])
        np.testing.assert_allclose(said["MARGIN"], alone[number]["MARGIN"], atol=1e-4)


CROPS = players(12)
FRAME = np.zeros((20, 30, 3), np.uint8)
BOXES = np.array([[1, 1, 9, 9]], np.float32)
MALFORMED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, "got none"),
    "crops and a frame": ({"CROPS": strings(CROPS), "FRAME": strings(CROPS[:1])}, {}, "got CROPS and FRAME"),
    "crops and boxes": ({"CROPS": strings(CROPS), "BOXES": BOXES}, {}, "BOXES: got them with CROPS"),
    "a broken crop": ({"CROPS": strings([*CROPS, b"x"])}, {}, "CROPS[12]: not a decodable image"),
    "an empty crop": ({"CROPS": strings([CROPS[0], b""])}, {}, "CROPS[1]: empty"),
    "a frame without boxes": ({"FRAME": strings(CROPS[:1])}, {}, "BOXES: missing"),
    "a broken frame": ({"FRAME": strings([b"x"]), "BOXES": BOXES}, {}, "FRAME[0]: not a decodable image"),
    "a box outside": ({"FRAME": strings(CROPS[:1]), "BOXES": BOXES + 500}, {}, "BOXES[0]: got 501"),
    "a box turned round": ({"FRAME": strings(CROPS[:1]), "BOXES": BOXES[:, ::-1].copy()}, {}, "BOXES[0]: "),
    "no colour order": ({"RAW_FRAME": FRAME, "BOXES": BOXES}, {}, "'color_order': expected RGB or BGR"),
    "another colour order": ({"RAW_FRAME": FRAME, "BOXES": BOXES}, {"color_order": "RBG"}, "got 'RBG'"),
    "colour order of files": ({"CROPS": strings(CROPS)}, {"color_order": "BGR"}, "files and grey frames"),
    "two channels": (
        {"RAW_FRAME": FRAME[:, :, :2].copy(), "BOXES": BOXES},
        {"color_order": "RGB"},
        "RAW_FRAME: ",
    ),
    "seven crops": ({"CROPS": strings(CROPS[:7])}, {}, "7 usable crops of players, expected at least 8"),
    "no crops and no roles": ({"CROPS": strings([]), "ROLE": strings([])}, {}, "0 usable crops of players"),
    "one team": ({"CROPS": strings(CROPS), "K": np.array([1], np.int32)}, {}, "K: got 1, expected 2 to 8"),
    "short tracks": ({"CROPS": strings(CROPS), "TRACK_ID": np.arange(5)}, {}, "TRACK_ID: got int64 [5]"),
    "an unknown role": ({"CROPS": strings(CROPS), "ROLE": strings([b"fan"] * 12)}, {}, "ROLE[0]: got 'fan'"),
    "an anchor outside": (
        {"CROPS": strings(CROPS), "ANCHOR": np.full(12, 2, np.int32)},
        {},
        "ANCHOR[0]: got 2, expected -1 (unknown) to 1",
    ),
    "a broken state": ({"CROPS": strings(CROPS), "PREV_STATE": strings([b"PK"])}, {}, "PREV_STATE: 2 bytes"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refuses_a_malformed_request(caller: Caller, name: str) -> None:
    inputs, parameters, message = MALFORMED[name]
    with pytest.raises(InferenceServerException, match=re.escape(message)) as refused:
        caller("fit_teams", inputs, parameters)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caller.fit(CROPS)["LABELS"].shape == (12,)


def test_refuses_broken_states(caller: Caller, state: bytes) -> None:
    other = state.replace(b'"mean"', b'"head"')  # of equal length, so that only the checksum differs
    for broken in (b"", b"x", state[:-30], state[100:], other, bytes(2**21)):
        with pytest.raises(InferenceServerException, match="STATE: ") as refused:
            caller.classify(CROPS, broken)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caller.classify(CROPS, state)["LABELS"].shape == (12,)


def test_refuses_embeddings_and_states_that_would_overflow(caller: Caller, state: bytes) -> None:
    pixels = caller("jersey_process", {"CROPS": strings(CROPS)})["PIXEL_VALUES"]
    embeddings = np.array(caller("siglip_base_model", {"PIXEL_VALUES": pixels})["MEAN_EMBEDDING"])
    embeddings[7, 2] = 1e38
    with zipfile.ZipFile(io.BytesIO(state)) as old:
        members = {name: old.read(name) for name in old.namelist()}
    origin = members["origin.npy"]
    members["origin.npy"] = origin[:-4] + np.float32(1e38).tobytes()
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as new:
        for name, member in members.items():
            new.writestr(name, member)
    last = np.load(io.BytesIO(origin)).size - 1
    for model, inputs, message in (
        ("team_predict", {"EMBEDDING": embeddings, "STATE": strings([state])}, "EMBEDDING[7]: holds 1e+38"),
        ("team_fit", {"EMBEDDING": embeddings}, "EMBEDDING[7]: holds 1e+38"),
        (
            "team_predict",
            {"EMBEDDING": embeddings[:7].copy(), "STATE": strings([huge.getvalue()])},
            f"STATE: origin[{last}] is 1e+38",
        ),
        (
            "fit_teams",
            {"CROPS": strings(CROPS), "PREV_STATE": strings([huge.getvalue()])},
            f"PREV_STATE: origin[{last}] is 1e+38",
        ),
    ):
        with pytest.raises(InferenceServerException, match=re.escape(message)) as refused:
            caller(model, inputs)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_team_predict_takes_embeddings(caller: Caller, state: bytes) -> None:
    pixels = caller("jersey_process", {"CROPS": strings(CROPS)})["PIXEL_VALUES"]
    embeddings = caller("siglip_base_model", {"PIXEL_VALUES": pixels})["MEAN_EMBEDDING"]
    embeddings = np.array(embeddings)
    embeddings[3] = np.nan
    said = caller("team_predict", {"EMBEDDING": embeddings, "STATE": strings([state])})
    expected = caller.classify(CROPS, state)["LABELS"]
    assert said["LABELS"][3] == -1
    assert (np.delete(said["LABELS"], 3) == np.delete(expected, 3)).all()
    none = caller("team_predict", {"EMBEDDING": embeddings[:0], "STATE": strings([state])})
    assert none["LABELS"].shape == (0,)
    with pytest.raises(InferenceServerException, match=r"EMBEDDING: got float32 \[12, 5\]"):
        caller("team_predict", {"EMBEDDING": embeddings[:, :5].copy(), "STATE": strings([state])})

"""Teams of players, from the client's side: its calls, and frames in shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from images import encode
from PIL import Image
from players import BOXES, COUNT, CROPS, FRAME, HEIGHT, TEAMS, TRACKS, WIDTH, purity
from siglip_serve_client import (
    Client,
    DeadlineError,
    InvalidInputError,
    SharedMemoryError,
    TeamFit,
    Teams,
    UnavailableError,
)
from tritonclient.utils import InferenceServerException

from siglip_serve.launcher import TritonServer

NOBODY = "127.0.0.1:9"


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as connected:
        yield connected


@pytest.fixture(scope="module")
def fitted(client: Client) -> TeamFit:
    return client.fit_teams(crops=CROPS, track_ids=TRACKS)


def assert_same(got: Teams, expected: Teams) -> None:
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.margin, expected.margin, atol=1e-4)
    np.testing.assert_allclose(got.coordinates, expected.coordinates, atol=1e-4)
    np.testing.assert_array_equal(got.region_fallback, expected.region_fallback)


def test_a_fit_finds_the_teams(fitted: TeamFit) -> None:
    assert purity(fitted.labels) == 1
    assert fitted.status == ("OK",)
    assert len(fitted) == COUNT
    assert fitted.state.startswith(b"PK")
    assert fitted.labels.dtype == np.int32
    assert fitted.region_fallback.dtype == np.bool_
    for numbers in (fitted.margin, fitted.outlier_score, fitted.coordinates):
        assert numbers.dtype == np.float32
    assert fitted.coordinates.shape == (COUNT, 2)
    assert not fitted.region_fallback.any()
    assert fitted.labels.flags.writeable


def test_crops_of_every_kind_are_the_same(client: Client, fitted: TeamFit, tmp_path: Path) -> None:
    (tmp_path / "crop.png").write_bytes(encode(CROPS[0], "PNG"))
    arrays = [np.asarray(crop) for crop in CROPS]
    opaque = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    expected = client.classify_teams(crops=[encode(crop, "PNG") for crop in CROPS], state=fitted.state)
    for crops, options in (
        (CROPS, {}),
        ([tmp_path / "crop.png", *CROPS[1:]], {}),
        (arrays, {"color_order": "RGB"}),
        ([array[:, :, ::-1] for array in arrays], {"color_order": "BGR"}),
        ([np.dstack([array[:, :, ::-1], opaque // 2]) for array in arrays], {"color_order": "BGR"}),
        (np.stack(arrays), {"color_order": "RGB"}),
    ):
        assert_same(client.classify_teams(crops=crops, state=fitted.state, **options), expected)  # type: ignore[arg-type]
    assert purity(expected.labels) == 1


def test_frames_of_every_kind_are_the_same(client: Client, fitted: TeamFit, tmp_path: Path) -> None:
    picture = Image.fromarray(FRAME)
    file = encode(picture, "PNG")
    (tmp_path / "frame.png").write_bytes(file)
    expected = client.classify_teams(crops=CROPS, state=fitted.state)
    see_through = np.dstack([FRAME, np.zeros((HEIGHT, WIDTH * COUNT, 1), np.uint8)])
    for frame, options in (
        (file, {}),
        (tmp_path / "frame.png", {}),
        (picture, {}),
        (FRAME, {"color_order": "RGB"}),
        (FRAME[:, :, ::-1], {"color_order": "BGR"}),
        (see_through, {"color_order": "RGB"}),
    ):
        got = client.classify_teams(frame=frame, boxes=BOXES.tolist(), state=fitted.state, **options)  # type: ignore[arg-type]
        assert_same(got, expected)


def test_grey_pictures_need_no_order(client: Client, fitted: TeamFit) -> None:
    grey = np.asarray(Image.fromarray(FRAME).convert("L"))
    expected = client.classify_teams(
        crops=[np.ascontiguousarray(grey[:, left : left + WIDTH]) for left in (0, WIDTH)], state=fitted.state
    )
    for frame in (grey, grey[:, :, None]):
        got = client.classify_teams(frame=frame, boxes=BOXES[:2], state=fitted.state)
        assert_same(got, expected)


def test_transparency_is_white(client: Client, fitted: TeamFit) -> None:
    clear = CROPS[0].copy()
    clear.putalpha(0)
    white = Image.new("RGB", CROPS[0].size, "white")
    got = client.classify_teams(crops=[clear, encode(clear, "PNG"), white], state=fitted.state)
    np.testing.assert_allclose(got.margin, got.margin[:1].repeat(3), atol=1e-6)


def test_no_players(client: Client, fitted: TeamFit) -> None:
    pictures: list[dict[str, Any]] = [
        {"crops": []},
        {"frame": FRAME, "boxes": [], "color_order": "RGB"},
        {"frame": encode(Image.fromarray(FRAME), "PNG"), "boxes": np.zeros((0, 4))},
    ]
    for images in pictures:
        got = client.classify_teams(state=fitted.state, **images)
        assert len(got) == 0
        assert got.coordinates.shape == (0, 2)
        assert got.labels.dtype == np.int32


def test_hints_reach_the_server(client: Client) -> None:
    for home in (0, 1):
        anchors = np.full(COUNT, -1)
        anchors[:4] = (TEAMS[:4] + home) % 2
        named = client.fit_teams(crops=CROPS, anchors=anchors)
        np.testing.assert_array_equal(named.labels, (TEAMS + home) % 2)
        again = client.fit_teams(crops=CROPS, prev_state=named.state)
        np.testing.assert_array_equal(again.labels, named.labels)
    roles = ["goalkeeper", "referee", "", "player"] * (COUNT // 4)
    assert ((client.fit_teams(crops=CROPS, roles=roles).labels == -1) == np.array([1, 1, 0, 0] * 10)).all()
    assert set(client.fit_teams(crops=CROPS, k=3).labels.tolist()) == {0, 1, 2}
    crossed = np.where(TEAMS == 0, np.arange(COUNT) // 20, -1)  # players of one team, named as of both
    assert "ANCHOR_CONFLICT" in client.fit_teams(crops=CROPS, anchors=crossed).status


def test_statuses_of_a_poor_fit(client: Client) -> None:
    assert "LOW_SUPPORT" in client.fit_teams(crops=CROPS[:12]).status
    nothing = client.fit_teams(crops=CROPS[:1] * 12)
    assert nothing.status == ("DEGENERATE",)
    assert nothing.state == b""
    assert set(nothing.labels.tolist()) == {-1}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"crops": [CROPS[0], b"no image", CROPS[0]]}, r"^CROPS\[1\]: not a decodable image"),
        ({"frame": b"no image", "boxes": BOXES}, r"^FRAME\[0\]: not a decodable image"),
        ({"frame": Image.fromarray(FRAME), "boxes": [[0, 0, 9, 9], [9, 9, 9, 9]]}, r"^BOXES\[1\]: "),
        ({"frame": Image.fromarray(FRAME), "boxes": [[0, 0, np.nan, 9]]}, r"^BOXES\[0\]: .*finite"),
        ({"frame": Image.fromarray(FRAME), "boxes": [[0, 900, 9, 999]]}, r"^BOXES\[0\]: .*outside"),
        ({"frame": Image.fromarray(FRAME), "boxes": [[0, 0, 9]]}, r"'BOXES'.*Expected \[-1,4\], got \[1,3\]"),
    ],
)
def test_the_server_names_what_it_refuses(client: Client, fitted: TeamFit, images: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        client.classify_teams(state=fitted.state, **images)


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"k": 1}, "^K: got 1"),
        ({"track_ids": [1, 2]}, "^TRACK_ID: "),
        ({"roles": ["coach"] * COUNT}, r"^ROLE\[0\]: "),
        ({"anchors": [7] * COUNT}, r"^ANCHOR\[0\]: "),
        ({"prev_state": b"?"}, "^PREV_STATE: "),
        ({"prev_state": b""}, "^PREV_STATE: "),
    ],
)
def test_the_server_names_the_hint_that_it_refuses(client: Client, hints: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        client.fit_teams(crops=CROPS, **hints)


def test_too_few_crops(client: Client) -> None:
    with pytest.raises(InvalidInputError, match="at least 8"):
        client.fit_teams(crops=CROPS[:7])
    with pytest.raises(InvalidInputError, match=r"^STATE: "):
        client.classify_teams(crops=CROPS[:1], state=b"PK")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ({}, ValueError, "either crops, or frame and boxes"),
        ({"crops": CROPS, "frame": CROPS[0], "boxes": BOXES}, ValueError, "either"),
        ({"frame": CROPS[0]}, ValueError, "either"),
        ({"crops": CROPS, "boxes": BOXES}, ValueError, "either"),
        ({"crops": [17]}, TypeError, r"crops\[0\]: int, expected bytes, a path"),
        ({"frame": 17, "boxes": BOXES}, TypeError, "frame: int"),
        ({"frame": FRAME, "boxes": BOXES}, ValueError, "color_order: None"),
        ({"crops": [np.asarray(CROPS[0])]}, ValueError, "color_order: None"),
        ({"crops": [np.asarray(CROPS[0])], "color_order": "RBG"}, ValueError, "color_order: 'RBG'"),
        ({"frame": FRAME / 255, "boxes": BOXES}, TypeError, "frame: array of float64, expected uint8"),
        ({"crops": [np.zeros((3, 9, 9), np.uint8)]}, ValueError, r"crops\[0\]: array of shape \[3, 9, 9\]"),
        ({"crops": [np.zeros((0, 9, 3), np.uint8)]}, ValueError, r"shape \[0, 9, 3\]"),
        ({"crops": [Image.new("F", (9, 9))]}, ValueError, r"crops\[0\]: PIL image of mode F"),
        ({"crops": [Image.new("RGB", (0, 9))]}, ValueError, "0x9 pixels"),
        ({"crop": CROPS}, TypeError, "crop"),
        ({"crops": CROPS, "state": "PK"}, TypeError, "state: str, expected bytes"),
    ],
)
def test_misuse_is_found_before_anything_is_sent(images: Any, error: type[Exception], message: str) -> None:
    with Client(NOBODY) as client, pytest.raises(error, match=message):
        client.classify_teams(**{"state": b"", **images})


@pytest.mark.parametrize("hints", [{"track_ids": [1.5]}, {"anchors": ["home"]}, {"track_ids": [None]}])
def test_hints_are_whole_numbers(hints: Any) -> None:
    with Client(NOBODY) as client, pytest.raises(TypeError, match="expected whole numbers"):
        client.fit_teams(crops=[], **hints)


def test_numbers_that_cannot_be_sent() -> None:
    with Client(NOBODY) as client, pytest.raises(ValueError, match=r"^anchors: .* of 32 bits"):
        client.fit_teams(crops=[], anchors=[2**31])


def test_missing_files_and_servers_raise_their_errors(
    client: Client, tmp_path: Path, server: TritonServer
) -> None:
    with pytest.raises(FileNotFoundError):
        client.fit_teams(crops=[tmp_path / "gone.png"])
    with Client(NOBODY) as nobody, pytest.raises(UnavailableError, match="no server answers"):
        nobody.fit_teams(crops=CROPS)
    with Client(server.grpc_url, timeout=0.001) as hasty, pytest.raises(DeadlineError):
        hasty.fit_teams(crops=CROPS)


# ---- shared memory


def regions() -> list[str]:
    """List the regions of this process."""
    return [path.name for path in Path("/dev/shm").glob(f"siglip-serve-client-{os.getpid()}-*")]


def test_frames_go_through_shared_memory(sharing_server: TritonServer, fitted: TeamFit) -> None:
    with Client(sharing_server.grpc_url, shared_memory=True) as client:
        for width in (COUNT, COUNT // 2, COUNT):
            frame = FRAME[:, : width * WIDTH]
            got = client.classify_teams(
                frame=frame, boxes=BOXES[:width], color_order="RGB", state=fitted.state
            )
            assert purity(np.resize(got.labels, COUNT)) == 1
            assert len(regions()) == 1  # the same for all
        larger = np.vstack([FRAME, FRAME])
        client.classify_teams(frame=larger, boxes=BOXES, color_order="RGB", state=fitted.state)
        assert len(regions()) == 1  # in the place of the first
        client.classify_teams(crops=CROPS[:2], state=fitted.state)
        again = client.fit_teams(frame=FRAME[:, :, ::-1], boxes=BOXES, color_order="BGR")
        assert purity(again.labels) == 1
        with pytest.raises(InvalidInputError, match=r"BOXES\[0\]"):
            client.classify_teams(frame=FRAME, boxes=[[5, 5, 5, 5]], color_order="RGB", state=fitted.state)
        assert len(regions()) == 1
    assert regions() == []


def test_threads_do_not_see_each_others_frames(sharing_server: TritonServer, fitted: TeamFit) -> None:
    with Client(sharing_server.grpc_url, shared_memory=True) as client, ThreadPoolExecutor(6) as pool:

        def ask(row: int) -> int:
            frame = np.asarray(CROPS[row])
            said = client.classify_teams(
                frame=frame, boxes=[[0, 0, WIDTH, HEIGHT]], color_order="RGB", state=fitted.state
            )
            return int(said.labels[0])

        labels = np.array(list(pool.map(ask, list(range(COUNT)) * 5)))
        assert 1 <= len(regions()) <= 6
    np.testing.assert_array_equal(labels, np.tile(fitted.labels, 5))
    assert regions() == []


def test_regions_are_registered_again_after_a_restart_of_the_server(sharing_server: TritonServer) -> None:
    def ask(client: Client) -> TeamFit:
        return client.fit_teams(frame=FRAME, boxes=BOXES, color_order="RGB")

    with Client(sharing_server.grpc_url, shared_memory=True) as client:
        before = ask(client)
        known = regions()
        # What a new start leaves of the regions that the client has registered.
        tritonclient.grpc.InferenceServerClient(sharing_server.grpc_url).unregister_system_shared_memory()
        np.testing.assert_array_equal(ask(client).labels, before.labels)
        assert len(regions()) == 1
        assert regions() != known
    assert regions() == []


def forget_regions(server: tritonclient.grpc.InferenceServerClient) -> None:
    """Forget all regions, as a new start would. The server holds a region for a moment after the answer."""
    until = time.monotonic() + 10
    while True:
        try:
            return server.unregister_system_shared_memory()
        except InferenceServerException:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def test_threads_share_regions_that_the_server_forgot(sharing_server: TritonServer) -> None:
    with Client(sharing_server.grpc_url, shared_memory=True) as client, ThreadPoolExecutor(4) as pool:
        other = tritonclient.grpc.InferenceServerClient(sharing_server.grpc_url)

        def ask(_: int) -> float:
            return purity(client.fit_teams(frame=FRAME, boxes=BOXES, color_order="RGB").labels)

        for _ in range(3):
            assert set(pool.map(ask, range(8))) == {1.0}
            forget_regions(other)
    assert regions() == []


def test_a_server_may_keep_shared_memory_closed(server: TritonServer, fitted: TeamFit) -> None:
    with Client(server.grpc_url, shared_memory=True) as client:
        with pytest.raises(SharedMemoryError, match="siglip-serve serve --shared-memory"):
            client.classify_teams(frame=FRAME, boxes=BOXES, color_order="RGB", state=fitted.state)
        assert regions() == []
        client.classify_teams(crops=CROPS[:2], state=fitted.state)
    assert regions() == []

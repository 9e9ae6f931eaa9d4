"""`Client` and `AsyncClient` over gRPC and HTTP: the same calls, the same answers, against a real server."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import MAPS, explain
from images import encode, photo
from numpy.typing import NDArray
from PIL import Image
from siglip_serve_client import (
    AsyncClient,
    Client,
    ClientError,
    DeadlineError,
    Explanation,
    InvalidInputError,
    ServerError,
    UnavailableError,
    UnreachableError,
)
from wire import TINY, GrpcCaller

from siglip_serve.launcher import TritonServer

PICTURES = [encode(photo(60 + number, 50, number), "JPEG") for number in range(40)]
LABELS = ["dog", "pizza", "größer als eine Katze"]
Run = Callable[..., Any]


def url(server: TritonServer, scheme: str) -> str:
    return f"{scheme}://{server.http_url if scheme == 'http' else server.grpc_url}"


@pytest.fixture(params=["sync-grpc", "sync-http", "async-grpc", "async-http"])
def run(request: pytest.FixtureRequest, server: TritonServer) -> Run:
    """Calls a method of a client of each kind; what it yields becomes a list."""
    kind, scheme = request.param.split("-")

    def call(method: str, *arguments: Any, client: dict[str, Any] | None = None, **named: Any) -> Any:
        address = (client or {}).pop("url", url(server, scheme))
        if kind == "sync":
            with Client(address, **(client or {})) as made:
                found = getattr(made, method)(*arguments, **named)
                return list(found) if isinstance(found, Iterator) else found
        return asyncio.run(awaited(address, client or {}, method, arguments, named))

    return call


async def awaited(address: str, options: dict[str, Any], method: str, arguments: Any, named: Any) -> Any:
    async with AsyncClient(address, **options) as made:
        found = getattr(made, method)(*arguments, **named)
        if isinstance(found, AsyncIterator):
            return [one async for one in found]
        return await found


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> NDArray[np.float32]:
    """The embeddings of the pictures, by plain tritonclient."""
    return GrpcCaller(server.grpc_url).embed(PICTURES)


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_images_in_order_and_progress(run: Run, expected: NDArray[np.float32], tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(PICTURES[0])
    seen: list[int] = []
    given = [path, str(path), *PICTURES[2:]]
    got = run("embed_images", given, progress=seen.append, client={"concurrency": 7})
    close(np.stack(got), expected[[0, 0, *range(2, 40)]])
    assert seen == list(range(1, 41))
    assert run("embed_images", []) == []
    unit = run("embed_image", PICTURES[3], normalized=True)
    close(unit, expected[3] / np.linalg.norm(expected[3]))


def test_pictures_and_arrays_are_the_file_they_came_from(run: Run, server: TritonServer) -> None:
    pixels = photo(90, 70, 5)
    wanted = GrpcCaller(server.grpc_url).embed([encode(pixels, "PNG")])[0]
    array = np.asarray(pixels)
    close(run("embed_image", pixels), wanted)
    close(run("embed_image", array, color_order="RGB"), wanted)
    close(run("embed_image", array[:, :, ::-1], color_order="BGR"), wanted)
    grey = pixels.convert("L")
    close(run("embed_image", np.asarray(grey)), run("embed_image", encode(grey, "PNG")))
    with pytest.raises(ValueError, match="color_order"):
        run("embed_image", array)
    with pytest.raises(TypeError, match="list"):
        run("embed_image", [1, 2])
    with pytest.raises(ValueError, match="mode I"):
        run("embed_image", Image.new("I", (4, 4)))


def test_an_image_that_fails_yields_its_error_in_its_place(run: Run, tmp_path: Path) -> None:
    given: list[bytes | Path] = [*PICTURES[:30]]
    given[4], given[7] = b"no image", tmp_path / "missing.jpg"
    got = run("embed_images", given)
    assert isinstance(got[4], InvalidInputError)
    assert str(got[4]).startswith("INPUT_IMAGE[0]: not a decodable image")
    assert isinstance(got[7], FileNotFoundError)
    assert [row for row, result in enumerate(got) if not isinstance(result, np.ndarray)] == [4, 7]


def test_any_number_of_texts(run: Run) -> None:
    texts = [f"a photo of thing {number}" for number in range(700)]
    seen: list[int] = []
    got = run("embed_texts", texts, normalized=True, progress=seen.append)
    assert got.shape[0] == 700
    assert seen == [256, 512, 700]
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    close(run("embed_text", texts[600], normalized=True), got[600])
    assert run("embed_texts", []).shape == (0, 0)
    long = "dog " * 300
    with pytest.raises(InvalidInputError, match=r"INPUT_TEXT\[599\]: the text has \d+ tokens"):
        run("embed_texts", [*texts[:599], long, *texts[600:]])
    assert np.isfinite(run("embed_text", long, truncation=True)).all()
    with pytest.raises(InvalidInputError, match="set truncation"):
        run("classify", PICTURES[0], [long, "cat"])
    assert run("classify", PICTURES[0], [long, "cat"], truncation=True).shape == (2,)
    with pytest.raises(InvalidInputError, match="set truncation"):
        run("explain", PICTURES[0], [long, "cat"])
    assert run("explain", PICTURES[0], [long, "cat"], truncation=True).scores.shape == (2,)
    with pytest.raises(TypeError, match="several texts"):
        run("embed_texts", "one text")
    with pytest.raises(TypeError, match=r"texts\[1\]: int"):
        run("embed_texts", ["a", 1])


def test_classify(run: Run) -> None:
    dog = TINY / "samples" / "dog.jpg"
    got = run("classify", dog, LABELS, templates=["a photo of a {}.", "{}"], softmax=True)
    assert got.shape == (3,)
    np.testing.assert_allclose(got.sum(), 1, rtol=1e-5)
    assert got.argmax() == 0
    many = run("classify_images", [dog, b"no image", TINY / "samples" / "pizza.jpg"], LABELS)
    assert isinstance(many[1], InvalidInputError)
    assert [many[0].argmax(), many[2].argmax()] == [0, 1]
    with pytest.raises(InvalidInputError, match=r"LABELS\[1\]: the text is empty"):
        run("classify", dog, ["dog", " "])
    with pytest.raises(TypeError, match="labels: one str"):
        run("classify", dog, "dog")


def test_explain(run: Run, server: TritonServer) -> None:
    dog = TINY / "samples" / "dog.jpg"
    found = run("explain", dog, LABELS)
    plain = explain(GrpcCaller(server.grpc_url), dog.read_bytes(), LABELS)
    assert isinstance(found, Explanation)
    assert (found.prompts, found.overlays) == (tuple(LABELS), ())
    for name in ("heatmaps", "scores", "patch_maps", "unattributed"):
        array = getattr(found, name)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, plain[name.upper()], atol=1e-5)
    total = found.patch_maps.sum((1, 2)) + found.unattributed
    np.testing.assert_allclose(total, found.scores, atol=1e-5)
    assert found.heatmaps.shape == (3, 300, 400)
    assert found.scores.argmax() == 0


def test_options_of_explain_reach_the_server(run: Run, server: TritonServer) -> None:
    pixels = photo(90, 70, 5)
    options: dict[str, Any] = {
        "templates": ["a photo of a {}.", "{}"],
        "background": ["sky", "thing"],
        "normalize": "joint",
        "size": (30, 40),
        "overlays": True,
        "colormap": "viridis",
        "opacity": 0.25,
    }
    wanted = explain(
        GrpcCaller(server.grpc_url),
        encode(pixels, "PNG"),
        LABELS,
        (*MAPS, "OVERLAY"),
        TEMPLATE=options["templates"],
        BACKGROUND=options["background"],
        NORMALIZE=["joint"],
        SIZE=[30, 40],
        COLORMAP=["viridis"],
        OPACITY=[0.25],
    )
    for image, order in ((pixels, None), (np.asarray(pixels), "RGB"), (np.asarray(pixels)[..., ::-1], "BGR")):
        found = run("explain", image, LABELS, color_order=order, **options)
        np.testing.assert_allclose(found.heatmaps, wanted["HEATMAPS"], atol=1e-4)
        assert [overlay.size for overlay in found.overlays] == [(40, 30)] * 3
    for overlay, file in zip(found.overlays, wanted["OVERLAY"], strict=True):
        with Image.open(io.BytesIO(file)) as expected_overlay:
            difference = np.asarray(overlay, dtype=int) - np.asarray(expected_overlay, dtype=int)
        assert np.abs(difference).max() <= 2
    absolute = run("explain", pixels, LABELS, mode="absolute", size=(5, 5))
    assert np.abs(absolute.patch_maps.sum(0)).max() > 1e-4  # relative ones sum to 0


def test_explain_refuses_bad_arguments(run: Run) -> None:
    picture = PICTURES[0]
    for refused, message in (
        ({"prompts": ["dog", ""]}, r"^PROMPTS\[1\]: the text is empty"),
        ({"prompts": []}, r"^PROMPTS: no rows"),
        ({"prompts": ["dog"], "mode": "other"}, "^MODE: got 'other'"),
        ({"prompts": ["dog"], "colormap": "hot"}, "^COLORMAP: got 'hot'"),
        ({"prompts": ["dog"], "opacity": 2}, "^OPACITY: got 2"),
        ({"prompts": ["dog"], "size": (5000, 5000)}, "^SIZE: 1 maps of 5000x5000"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            run("explain", picture, **refused)
    with pytest.raises(InvalidInputError, match=r"^INPUT_IMAGE\[0\]: not a decodable image"):
        run("explain", b"no image", ["dog"])
    with pytest.raises(TypeError, match="prompts: one str"):
        run("explain", picture, "dog")
    with pytest.raises(TypeError, match=r"background\[1\]: int"):
        run("explain", picture, ["dog"], background=["sky", 3])
    with pytest.raises(TypeError, match="no argument 'overlay'"):
        run("explain", picture, ["dog"], overlay=True)
    for size in ((5,), (5, 0), (5.5, 2), (2**31, 1), "55"):
        with pytest.raises(ValueError, match="size: "):
            run("explain", picture, ["dog"], size=size)


def test_health(run: Run) -> None:
    assert run("check_health") == 128


def test_a_server_describes_its_checkpoint(run: Run) -> None:
    described = run("describe")
    assert set(described) == {
        *("checkpoint_name", "checkpoint_revision", "dtype", "preprocess", "color", "checkpoint_note")
    }
    assert (described["checkpoint_name"], described["dtype"]) == ("siglip-tiny", "float32")
    assert run("describe", "siglip_base_model")["checkpoint_name"] == "siglip-tiny-jersey"


def test_a_late_answer_is_not_asked_for_again(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(PICTURES[0])
    with pytest.raises(DeadlineError, match="in time"):
        run("embed_image", path, client={"timeout": 0.001})


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_silent_server_raises_a_deadline_error(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout=0.3) as client, pytest.raises(DeadlineError, match="in time"):
            client.embed_image(PICTURES[0])
        with pytest.raises(DeadlineError, match="in time"):
            asyncio.run(awaited(address, {"timeout": 0.3}, "embed_image", (PICTURES[0],), {}))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_an_address_without_a_server_is_unreachable(scheme: str) -> None:
    message = r"no server answers at 127\.0\.0\.1:9"
    with Client(f"{scheme}://127.0.0.1:9") as client, pytest.raises(UnreachableError, match=message):
        client.check_health()
    with pytest.raises(UnreachableError, match=message):
        asyncio.run(awaited(f"{scheme}://127.0.0.1:9", {}, "check_health", (), {}))


@pytest.mark.parametrize(
    "wrong", ["127.0.0.1", "ftp://127.0.0.1:1", "http://", "127.0.0.1:port", "http://a:1/b"]
)
def test_refuses_malformed_urls(wrong: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="expected host:port"):
            kind(wrong)


class Busy:
    """Answers a number of requests with 503, then with 500. Triton's own overload cannot be timed."""

    def __init__(self, times: int) -> None:
        self.left, self.asked = times, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                # All of it: a connection that is closed with unread bytes is reset, and its answer lost.
                with connection.makefile("rb") as request:
                    head = iter(request.readline, b"\r\n")
                    lengths = [int(line[15:]) for line in head if line.lower().startswith(b"content-length:")]
                    request.read(sum(lengths))
                self.asked += 1
                status = b"503 Busy" if self.asked <= self.left else b"500 Broken"
                body = b'{"error": "Exceeds maximum queue size"}'
                connection.sendall(
                    b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                    % (status, len(body), body)
                )


def test_only_a_busy_server_is_asked_again() -> None:
    busy = Busy(2)
    with Client(busy.url) as client, pytest.raises(ServerError, match="500"):
        client.embed_image(b"x")
    assert busy.asked == 3
    stuck = Busy(10**6)
    with pytest.raises(UnavailableError, match=r"Exceeds maximum queue size|within|in time"):
        asyncio.run(awaited(stuck.url, {"timeout": 1.5}, "embed_image", (b"x",), {}))
    assert 1 < stuck.asked < 8  # not as often as it answers, and on a busy machine not only once
    busy.socket.close()
    stuck.socket.close()


def test_leaving_an_iteration_stops_reading(server: TritonServer) -> None:
    taken: list[int] = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield PICTURES[0]

    async def leave() -> None:
        async with AsyncClient(server.grpc_url, concurrency=4) as client:
            async for outcome in client.embed_images(endless()):
                assert isinstance(outcome, np.ndarray)
                break

    with Client(server.grpc_url, concurrency=4) as client:
        results = client.embed_images(endless())
        assert isinstance(next(results), np.ndarray)
        results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 16
    asyncio.run(leave())
    assert len(taken) <= 32


def test_images_may_come_asynchronously(server: TritonServer, expected: NDArray[np.float32]) -> None:
    async def pictures() -> AsyncIterator[bytes]:
        for picture in PICTURES[:5]:
            await asyncio.sleep(0.001)
            yield picture

    async def embed() -> list[Any]:
        async with AsyncClient(server.grpc_url) as client:
            return [one async for one in client.embed_images(pictures())]

    close(np.stack(asyncio.run(embed())), expected[:5])


def test_frames_through_shared_memory(sharing_server: TritonServer) -> None:
    frame = np.asarray(photo(400, 300, 9))
    for scheme in ("grpc", "http"):
        served = url(sharing_server, scheme)
        with Client(served) as plain:
            wanted = plain.embed_image(frame, color_order="RGB")
        with Client(served, shared_memory=True) as client:
            got = list(client.embed_images([frame] * 20, color_order="RGB"))
            close(np.stack(got), np.stack([wanted] * 20))  # type: ignore[arg-type]
            with pytest.raises(InvalidInputError, match=r"LABELS\[1\]: the text is empty"):
                client.classify(frame, ["dog", ""], color_order="RGB")
            found = client.explain(frame, ["dog"], overlays=True, color_order="RGB")
            assert found.overlays[0].size == (400, 300)
        options, asked = {"shared_memory": True}, {"color_order": "RGB"}
        close(asyncio.run(awaited(served, options, "embed_image", (frame,), asked)), wanted)
    assert not list(Path("/dev/shm").glob(f"siglip-serve-client-{os.getpid()}-*"))


def test_shared_memory_that_is_closed_is_named(server: TritonServer) -> None:
    frame = np.asarray(photo(40, 30, 9))
    for scheme in ("grpc", "http"):
        with (
            Client(url(server, scheme), shared_memory=True) as client,
            pytest.raises(ClientError, match="--shared-memory"),
        ):
            client.embed_image(frame, color_order="RGB")


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(kind).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)

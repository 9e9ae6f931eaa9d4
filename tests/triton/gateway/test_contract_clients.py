"""Clients in the shape of Weaviate's and Immich's servers, before a gateway and a real Triton."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from contract_clients import Immich, ImmichError, Weaviate, WeaviateError
from gateways import encoded, gateway_process
from images import encode, photo
from immich_upstream import ImmichUpstream, immich_upstream
from numpy.typing import NDArray
from programs import free_port
from siglip_serve_client import Client
from wire import TINY, GrpcCaller

from siglip_serve.launcher import TritonServer

DOG = (TINY / "samples" / "dog.jpg").read_bytes()
PENGUIN = (TINY / "samples" / "penguin.png").read_bytes()
MODEL = "ViT-B-16-SigLIP__webli"
# Requests at the same time share a batch, in which sums may round in another way.
SHARED_BATCH = 1e-6


@pytest.fixture(scope="module")
def weaviate(gateway_url: str) -> Iterator[Weaviate]:
    client = Weaviate(gateway_url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def upstream() -> Iterator[ImmichUpstream]:
    with immich_upstream() as running:
        yield running


@pytest.fixture(scope="module")
def relaying_url(server: TritonServer, upstream: ImmichUpstream) -> Iterator[str]:
    """A gateway with Immich's own service behind it."""
    with gateway_process(server.grpc_url, "--immich-upstream", upstream.url) as url:
        yield url


@pytest.fixture
def immich(relaying_url: str, upstream: ImmichUpstream) -> Iterator[Immich]:
    upstream.tasks.clear()
    upstream.status = 200
    client = Immich([relaying_url])
    client.tick()
    yield client
    client.close()


def vector(text: str) -> NDArray[np.float32]:
    return np.array(json.loads(text), np.float32)


def test_weaviate_starts_and_shows_the_model(weaviate: Weaviate, triton: Client) -> None:
    weaviate.wait_for_startup(10)
    meta = weaviate.meta()
    assert meta["model"] == triton.describe()["checkpoint_name"]
    assert meta["dimensions"] == triton.check_health()


def test_weaviate_vectorizes_single_and_mixed(weaviate: Weaviate, triton: Client) -> None:
    """An import sends the texts and images of one object, a search sends one text or one image."""
    texts, images = weaviate.vectorize(["a <b> & c"], None)
    np.testing.assert_array_equal(texts, [triton.embed_text("a <b> & c", True)])
    assert len(images) == 0
    texts, images = weaviate.vectorize(None, [encoded(DOG)])
    np.testing.assert_array_equal(images, [triton.embed_image(DOG, True)])
    assert len(texts) == 0
    texts, images = weaviate.vectorize(["a dog", "ein Hund"], [encoded(PENGUIN), encoded(DOG)])
    np.testing.assert_array_equal(texts, triton.embed_texts(["a dog", "ein Hund"], True))
    expected = [triton.embed_image(data, True) for data in (PENGUIN, DOG)]
    np.testing.assert_allclose(images, expected, rtol=0, atol=SHARED_BATCH)


def test_weaviate_vectorizes_a_batch_of_a_hundred(
    weaviate: Weaviate, server: TritonServer, triton: Client
) -> None:
    names = [f"text {number}" for number in range(100)]
    texts, _ = weaviate.vectorize(names, None)
    np.testing.assert_array_equal(texts, triton.embed_texts(names, True))
    pictures = [encode(photo(30 + number, 40), "JPEG") for number in range(100)]
    _, images = weaviate.vectorize([], [encoded(data) for data in pictures])
    expected = GrpcCaller(server.grpc_url).embed(pictures, normalized=True)
    np.testing.assert_allclose(images, expected, rtol=0, atol=SHARED_BATCH)


def test_weaviate_imports_in_parallel(weaviate: Weaviate, triton: Client) -> None:
    pictures = [encode(photo(50 + number, 60), "JPEG") for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda item: weaviate.vectorize([f"{item[0]}"], [encoded(item[1])]), enumerate(pictures))
        )
    for number, (texts, images) in enumerate(found):
        expected = [triton.embed_text(str(number), True)]
        np.testing.assert_allclose(texts, expected, rtol=0, atol=SHARED_BATCH)
        expected = [triton.embed_image(pictures[number], True)]
        np.testing.assert_allclose(images, expected, rtol=0, atol=SHARED_BATCH)


def test_weaviate_logs_our_message(weaviate: Weaviate) -> None:
    with pytest.raises(WeaviateError, match=r"^fail with status 400: images\[1\]: "):
        weaviate.vectorize(["a"], [encoded(DOG), encoded(b"no picture")])
    with pytest.raises(WeaviateError, match=r"^fail with status 400: images\[0\]: not base64"):
        weaviate.vectorize(None, ["?"])


def test_weaviate_waits_for_a_server_that_starts() -> None:
    address = f"127.0.0.1:{free_port()}"
    with gateway_process(address) as url:
        client = Weaviate(url)
        try:
            with pytest.raises(WeaviateError, match=r"not ready: status 503|Timeout"):
                client.wait_for_startup(0.3)
            with pytest.raises(WeaviateError, match="fail with status 503: the inference server"):
                client.vectorize(["a"], None)
        finally:
            client.close()


def test_immich_encodes_pictures_and_texts(immich: Immich, triton: Client, relaying_url: str) -> None:
    assert immich.healthy == {relaying_url: True}
    np.testing.assert_array_equal(vector(immich.encode_image(DOG, MODEL)), triton.embed_image(DOG, True))
    for text in ("a dog", "ä & <b> ü\r\nline", "a" * 3000):
        expected = triton.embed_texts([text], True, truncation=True)[0]
        np.testing.assert_array_equal(vector(immich.encode_text(text, MODEL, "en")), expected)
    assert immich.warnings == []


def test_immich_asks_many_pictures_at_the_same_time(immich: Immich, triton: Client) -> None:
    pictures = [encode(photo(60 + number, 50), "JPEG") for number in range(48)]
    with ThreadPoolExecutor(16) as pool:
        faces = pool.map(lambda data: immich.detect_faces(data, "buffalo_l", 0.7), pictures)
        images = pool.map(lambda data: immich.encode_image(data, MODEL), pictures)
        texts = pool.map(lambda number: immich.encode_text(f"text {number}", MODEL), range(48))
        found_images, found_texts, found_faces = list(images), list(texts), list(faces)
    for number, data in enumerate(pictures):
        image = triton.embed_image(data, True)
        np.testing.assert_allclose(vector(found_images[number]), image, rtol=0, atol=SHARED_BATCH)
        text = triton.embed_text(f"text {number}", True)
        np.testing.assert_allclose(vector(found_texts[number]), text, rtol=0, atol=SHARED_BATCH)
        # The service behind saw the picture unchanged.
        assert found_faces[number]["width"] == len(data)
    assert immich.warnings == []


def test_immich_reaches_its_own_service(immich: Immich, upstream: ImmichUpstream) -> None:
    faces = immich.detect_faces(DOG, "buffalo_l", 0.7)
    assert faces["faces"][0]["boundingBox"] == {"x1": 0, "y1": 0, "x2": 2, "y2": 2}
    assert faces["width"] == len(DOG)
    assert immich.ocr(DOG, "PP-OCRv5_mobile")["text"] == ["words"]
    assert upstream.tasks == ["facial-recognition", "ocr"]


def test_immich_tries_the_next_server_after_a_failure(
    immich: Immich, relaying_url: str, upstream: ImmichUpstream
) -> None:
    """Failures of the service behind stay failures, so that Immich asks another server."""
    upstream.status = 500
    with pytest.raises(ImmichError):
        immich.detect_faces(DOG, "buffalo_l", 0.7)
    assert immich.warnings == [f"{relaying_url} failed with status 500"]
    assert immich.healthy == {relaying_url: False}
    immich.tick()  # the gateway itself is well
    assert immich.healthy == {relaying_url: True}
    two = Immich([relaying_url, upstream.url])
    try:
        two.healthy = {relaying_url: True}
        with pytest.raises(ImmichError):
            two.ocr(b"", "PP-OCRv5_mobile")
        assert [warning.rpartition(" ")[2] for warning in two.warnings] == ["500", "500"]
    finally:
        two.close()


def test_immich_prefers_a_gateway_that_answers(gateway_url: str, triton: Client) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    client = Immich([away, gateway_url])
    try:
        client.tick()
        assert client.healthy == {away: False, gateway_url: True}
        np.testing.assert_array_equal(vector(client.encode_text("a", MODEL)), triton.embed_text("a", True))
        assert client.warnings == []
        with pytest.raises(ImmichError):  # without a service behind, faces have no answer
            client.detect_faces(DOG, "buffalo_l", 0.7)
        assert f"{gateway_url} failed with status 501" in client.warnings
    finally:
        client.close()


def test_a_ping_is_answered_under_load(relaying_url: str, immich: Immich) -> None:
    """A ping needs no turn, so that a busy gateway is not taken for a dead one."""
    pictures = [encode(photo(400, 300 + number), "JPEG") for number in range(32)]
    done = threading.Event()

    def load(data: bytes) -> None:
        while not done.is_set():
            immich.encode_image(data, MODEL)

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(load, data) for data in pictures[:16]]
        try:
            for _ in range(10):
                immich.tick()
                assert immich.healthy == {relaying_url: True}
                time.sleep(0.05)
        finally:
            done.set()
        for future in futures:
            future.result()

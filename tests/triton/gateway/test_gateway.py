"""The clients of OpenAI and Cohere as they ship, and those of Weaviate and Immich, before a real Triton."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import pytest
import torch
from gateways import encoded, gateway_process
from images import encode, photo
from numpy.typing import NDArray
from programs import free_port
from siglip_serve_client import Client
from siglip_serve_client.compact import COMPACT, compact
from transformers import AutoTokenizer, SiglipModel
from wire import TINY, GrpcCaller

from siglip_serve.launcher import TritonServer

DOG = (TINY / "samples" / "dog.jpg").read_bytes()
PENGUIN = (TINY / "samples" / "penguin.png").read_bytes()


def uri(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{encoded(data)}"


@pytest.fixture(scope="module")
def openai_client(gateway_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{gateway_url}/v1",
        api_key="any",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest.fixture(scope="module")
def cohere_client(gateway_url: str) -> Iterator[cohere.ClientV2]:
    with httpx.Client(trust_env=False, timeout=60) as transport:
        yield cohere.ClientV2(api_key="any", base_url=gateway_url, httpx_client=transport)


def rows(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_openai_vectors_equal_those_of_triton(
    openai_client: openai.OpenAI, triton: Client, encoding: str | None
) -> None:
    """Without a format the client asks for base64, and decodes it."""
    inputs = ["a dog", uri(DOG), "a penguin", uri(PENGUIN, "png")]
    fields: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
    answer = openai_client.embeddings.create(model="any", input=inputs, **fields)
    expected = [
        triton.embed_text("a dog", True),
        triton.embed_image(DOG, True),
        triton.embed_text("a penguin", True),
        triton.embed_image(PENGUIN, True),
    ]
    found: list[Any] = [entry.embedding for entry in answer.data]
    if encoding == "base64":
        found = [np.frombuffer(base64.b64decode(text), "<f4") for text in found]
    np.testing.assert_array_equal(rows(found), rows(expected))
    assert answer.usage.total_tokens == 0


def test_openai_single_inputs(openai_client: openai.OpenAI, triton: Client) -> None:
    for given, expected in (
        ("a dog", triton.embed_text("a dog", True)),
        (uri(DOG), triton.embed_image(DOG, True)),
    ):
        answer = openai_client.embeddings.create(model="any", input=given)
        np.testing.assert_array_equal(rows(answer.data[0].embedding), expected)


def test_vectors_of_raw_towers_on_request(http: httpx.Client, triton: Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": ["a dog", uri(DOG)], "normalized": False}).json()
    found = rows([entry["embedding"] for entry in answer["data"]])
    np.testing.assert_array_equal(found, rows([triton.embed_text("a dog"), triton.embed_image(DOG)]))


def test_a_batch_of_a_hundred_keeps_its_order(
    openai_client: openai.OpenAI, server: TritonServer, triton: Client
) -> None:
    pictures = [encode(photo(40 + number, 30), "JPEG") for number in range(50)]
    texts = [f"picture number {number}" for number in range(50)]
    mixed = [item for pair in zip(texts, map(uri, pictures), strict=True) for item in pair]
    answer = openai_client.embeddings.create(model="any", input=mixed)
    found = rows([entry.embedding for entry in answer.data])
    caller = GrpcCaller(server.grpc_url)
    same_batches = [
        caller.embed(pictures[:32], normalized=True),
        caller.embed(pictures[32:], normalized=True),
    ]
    np.testing.assert_array_equal(found[1::2], np.concatenate(same_batches))
    np.testing.assert_array_equal(found[0::2], triton.embed_texts(texts, True))


def test_short_texts_are_padded_to_the_context(openai_client: openai.OpenAI) -> None:
    """The towers were trained with padding to the full context. Unpadded texts have other vectors."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = SiglipModel.from_pretrained(TINY).eval()

    def reference(padding: Any) -> NDArray[np.float64]:
        with torch.no_grad():
            tokens = tokenizer(["a dog"], padding=padding, return_tensors="pt")["input_ids"]
            (vector,) = model.text_model(input_ids=tokens).pooler_output.double().numpy()
        scaled: NDArray[np.float64] = vector / np.linalg.norm(vector)
        return scaled

    answer = openai_client.embeddings.create(model="any", input="a dog")
    found = np.array(answer.data[0].embedding)
    assert found @ reference("max_length") > 0.99999
    assert found @ reference(True) < 0.99


def test_openai_errors_are_those_of_its_client(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"input\[1\]: the text has") as caught:
        openai_client.embeddings.create(model="any", input=["a", "dog " * 300])
    assert isinstance(caught.value.body, dict)
    with pytest.raises(openai.BadRequestError, match=r"input\[2\]: .*image") as caught:
        openai_client.embeddings.create(model="any", input=[uri(DOG), "a", uri(b"no picture")])
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length"):
        openai_client.embeddings.create(model="any", input=[[1, 2, 3]])
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        openai_client.embeddings.create(model="any", input="a", dimensions=3)
    width = len(openai_client.embeddings.create(model="any", input="a").data[0].embedding)
    openai_client.embeddings.create(model="any", input="a", dimensions=width)


def test_openai_lists_the_checkpoint(openai_client: openai.OpenAI, triton: Client) -> None:
    (model,) = openai_client.models.list().data
    assert model.id == triton.describe()["checkpoint_name"]


def test_cohere_vectors_equal_those_of_triton(cohere_client: cohere.ClientV2, triton: Client) -> None:
    kinds: Any = ["float", *COMPACT]
    answer: Any = cohere_client.embed(
        model="any", input_type="image", images=[uri(DOG)], embedding_types=kinds
    )
    expected = triton.embed_image(DOG, True)[None]
    np.testing.assert_array_equal(rows(answer.embeddings.float_), expected)
    for kind in COMPACT:
        np.testing.assert_array_equal(getattr(answer.embeddings, kind), compact(expected, kind))
    assert (answer.images[0].width, answer.images[0].height, answer.images[0].format) == (400, 300, "jpeg")


def test_cohere_texts_and_mixed_inputs(cohere_client: cohere.ClientV2, triton: Client) -> None:
    texts = [f"text {number}" for number in range(100)]
    answer: Any = cohere_client.embed(
        model="any", input_type="search_document", texts=texts, embedding_types=["float"]
    )
    np.testing.assert_array_equal(rows(answer.embeddings.float_), triton.embed_texts(texts, True))
    inputs: Any = [
        {"content": [{"type": "image_url", "image_url": {"url": uri(DOG)}}]},
        {"content": [{"type": "text", "text": "a dog"}]},
    ]
    answer = cohere_client.embed(
        model="any", input_type="search_document", inputs=inputs, embedding_types=["float"]
    )
    expected = [triton.embed_image(DOG, True), triton.embed_text("a dog", True)]
    np.testing.assert_array_equal(rows(answer.embeddings.float_), rows(expected))


def test_cohere_errors_are_those_of_its_client(cohere_client: cohere.ClientV2) -> None:
    with pytest.raises(cohere.BadRequestError, match=r"texts\[1\]"):
        cohere_client.embed(
            model="any",
            input_type="search_document",
            texts=["a", "dog " * 300],
            embedding_types=["float"],
            truncate="NONE",
        )


def test_a_client_of_weaviate(http: httpx.Client, triton: Client) -> None:
    """The module multi2vec-clip: it waits for `ready`, reads `/meta`, and posts texts and images."""
    assert http.get("/.well-known/ready").status_code == 204
    assert http.get("/meta").json()["model"] == triton.describe()["checkpoint_name"]
    answer = http.post("/vectorize", json={"texts": ["a dog"], "images": [encoded(DOG)]}).json()
    np.testing.assert_array_equal(rows(answer["textVectors"][0]), triton.embed_text("a dog", True))
    np.testing.assert_array_equal(rows(answer["imageVectors"][0]), triton.embed_image(DOG, True))


def test_a_client_of_immich(http: httpx.Client, triton: Client) -> None:
    """Immich's server: it pings, and posts a form with a picture or a text."""
    assert http.get("/ping").text == "pong"
    entries = {"clip": {"visual": {"modelName": "ViT-B-16-SigLIP__webli", "options": {}}}}
    answer = http.post("/predict", data={"entries": json.dumps(entries)}, files={"image": DOG}).json()
    np.testing.assert_array_equal(rows(json.loads(answer["clip"])), triton.embed_image(DOG, True))
    assert (answer["imageWidth"], answer["imageHeight"]) == (400, 300)
    entries = {"clip": {"textual": {"modelName": "ViT-B-16-SigLIP__webli", "options": {"language": "en"}}}}
    form = {"entries": (None, json.dumps(entries)), "text": (None, "a dog")}
    answer = http.post("/predict", files=form).json()
    np.testing.assert_array_equal(rows(json.loads(answer["clip"])), triton.embed_text("a dog", True))


def test_labels_are_those_of_triton(http: httpx.Client, triton: Client) -> None:
    labels = ["dog", "cat", "pizza"]
    answer = http.post("/classify", json={"image": uri(DOG), "labels": labels, "softmax": True}).json()
    expected = triton.classify(DOG, labels, softmax=True)
    np.testing.assert_array_equal(rows(answer["probabilities"]), expected)
    wrong = http.post("/classify", json={"image": uri(b"no picture"), "labels": labels})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["message"].startswith("image: ")


def test_every_spelling_of_base64_has_the_same_vector(http: httpx.Client, triton: Client) -> None:
    standard = encoded(DOG)
    safe = base64.urlsafe_b64encode(DOG).decode().rstrip("=")
    lines = "\n".join(standard[index : index + 76] for index in range(0, len(standard), 76))
    body = {"input": [{"image": text} for text in (standard, safe, lines)], "modality": "image"}
    answer = http.post("/embeddings", json=body).json()
    expected = triton.embed_image(DOG, True)
    for entry in answer["data"]:
        np.testing.assert_array_equal(rows(entry["embedding"]), expected)


def test_health_is_a_real_inference(http: httpx.Client, triton: Client) -> None:
    assert http.get("/health").json()["dimensions"] == triton.check_health()


def test_callers_that_give_up_leave_the_server_whole(http: httpx.Client, gateway_url: str) -> None:
    pictures = [uri(encode(photo(300, 200 + number), "JPEG")) for number in range(8)]

    def give_up(_number: int) -> None:
        with (
            httpx.Client(base_url=gateway_url, trust_env=False) as client,
            pytest.raises(httpx.TimeoutException),
        ):
            client.post("/v1/embeddings", json={"input": 3 * pictures}, timeout=0.03)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(give_up, range(16)))
    answer = http.post("/v1/embeddings", json={"input": pictures})
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == len(pictures)
    assert http.get("/health").status_code == 200


def test_several_workers_share_a_port(server: TritonServer) -> None:
    with (
        gateway_process(server.grpc_url, "--workers", "2") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        for number in range(10):
            assert client.post("/v1/embeddings", json={"input": f"text {number}"}).status_code == 200
        time.sleep(0.6)  # each worker writes its counters twice a second
        client.post("/v1/embeddings", json={"input": "a"})
        text = client.get("/metrics").text
    assert 'siglip_gateway_requests_total{api="openai",status="200"}' in text


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("siglip-serve")), "gateway"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)

    missing = run("--api-key-file", str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "--api-key-file" in missing.stderr
    assert run("--workers", "0").returncode == 2
    assert "--triton HOST:PORT" in run("--help").stdout


def test_a_gateway_without_triton_says_so() -> None:
    process_url = f"127.0.0.1:{free_port()}"
    with (
        gateway_process(process_url) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        assert client.get("/.well-known/live").status_code == 204
        assert client.get("/health").status_code == 503
        answer = client.post("/v1/embeddings", json={"input": "a"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"

"""The clients of OpenAI, Cohere, LangChain, LlamaIndex and LiteLLM as they ship, before a real Triton.

`make test-gateway` installs those that the extra `dev` does not bring. The others are skipped.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from gateways import encoded
from images import encode, photo
from numpy.typing import NDArray
from siglip_serve_client import Client
from wire import TINY, GrpcCaller

from siglip_serve.launcher import TritonServer

# The packages warn about their own dependencies, and leave connections open.
pytestmark = pytest.mark.filterwarnings("ignore")

DOG = (TINY / "samples" / "dog.jpg").read_bytes()
TOO_LONG = "dog " * 300
# Several requests to Triton at a time share a batch, in which sums may round in another way.
SHARED_BATCH = 1e-6

Item: TypeAlias = str | bytes  # a text, or an image file
Embed: TypeAlias = Callable[[Sequence[Item]], Any]


@dataclass(frozen=True)
class Package:
    """A client as a caller uses it.

    Attributes:
        embed: the vectors of texts and image files.
        error: the class of what it raises for a refused request.
        mixed: texts and pictures fit one request.
    """

    embed: Embed
    error: type[BaseException]
    mixed: bool = True


def uri(item: Item) -> str:
    """A text as it is, and an image file as a data URI."""
    if isinstance(item, str):
        return item
    kind = "png" if item.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{encoded(item)}"


def waited(work: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await work()

    return asyncio.run(run())


def openai_default(url: str) -> Package:
    """Without a format it asks for base64, and decodes it."""
    openai: Any = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)

    def embed(items: Sequence[Item]) -> Any:
        answer = client.embeddings.create(model="any", input=[uri(item) for item in items])
        return [entry.embedding for entry in answer.data]

    return Package(embed, openai.BadRequestError)


def openai_async_float(url: str) -> Package:
    openai: Any = pytest.importorskip("openai")

    async def ask(items: Sequence[Item]) -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            inputs = [uri(item) for item in items]
            answer = await client.embeddings.create(model="any", input=inputs, encoding_format="float")
            return [entry.embedding for entry in answer.data]

    return Package(lambda items: waited(lambda: ask(items)), openai.BadRequestError)


def cohere_inputs(url: str) -> Package:
    cohere: Any = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key="any", base_url=url)

    def content(item: Item) -> Any:
        if isinstance(item, str):
            return {"type": "text", "text": item}
        return {"type": "image_url", "image_url": {"url": uri(item)}}

    def embed(items: Sequence[Item]) -> Any:
        kinds = {type(item) for item in items}
        fields: dict[str, Any] = {"inputs": [{"content": [content(item)]} for item in items]}
        if len(kinds) == 1:
            name = "texts" if kinds == {str} else "images"
            fields = {name: [uri(item) for item in items]}
        answer = client.embed(
            model="any",
            input_type="search_document" if kinds != {bytes} else "image",
            embedding_types=["float"],
            truncate="NONE",
            **fields,
        )
        return answer.embeddings.float_

    return Package(embed, cohere.BadRequestError)


def langchain(url: str) -> Package:
    """A class for texts, through which pictures go as data URIs."""
    package: Any = pytest.importorskip("langchain_openai", exc_type=ImportError)
    openai: Any = pytest.importorskip("openai")
    client = package.OpenAIEmbeddings(
        model="any", base_url=f"{url}/v1", api_key="any", check_embedding_ctx_length=False, max_retries=0
    )

    def embed(items: Sequence[Item]) -> Any:
        if len(items) == 1:
            return [client.embed_query(uri(items[0]))]
        return client.embed_documents([uri(item) for item in items])

    return Package(embed, openai.BadRequestError)


def langchain_async(url: str) -> Package:
    package: Any = pytest.importorskip("langchain_openai", exc_type=ImportError)
    openai: Any = pytest.importorskip("openai")

    async def ask(items: Sequence[Item]) -> Any:
        client = package.OpenAIEmbeddings(
            model="any", base_url=f"{url}/v1", api_key="any", check_embedding_ctx_length=False, max_retries=0
        )
        return await client.aembed_documents([uri(item) for item in items])

    return Package(lambda items: waited(lambda: ask(items)), openai.BadRequestError)


def _llama(client: Any, error: type[BaseException]) -> Package:
    def embed(items: Sequence[Item]) -> Any:
        if len(items) == 1:
            return [client.get_text_embedding(uri(items[0]))]
        return client.get_text_embedding_batch([uri(item) for item in items])

    return Package(embed, error)


def llama_index_like(url: str) -> Package:
    package: Any = pytest.importorskip("llama_index.embeddings.openai_like", exc_type=ImportError)
    openai: Any = pytest.importorskip("openai")
    return _llama(
        package.OpenAILikeEmbedding(
            model_name="any", api_base=f"{url}/v1", api_key="any", embed_batch_size=200, max_retries=0
        ),
        openai.BadRequestError,
    )


def llama_index_openai(url: str) -> Package:
    """The class for OpenAI itself, which knows OpenAI's models alone."""
    package: Any = pytest.importorskip("llama_index.embeddings.openai", exc_type=ImportError)
    openai: Any = pytest.importorskip("openai")
    return _llama(
        package.OpenAIEmbedding(api_base=f"{url}/v1", api_key="any", embed_batch_size=200, max_retries=0),
        openai.BadRequestError,
    )


def llama_index_jina(url: str, folder: Path) -> Package:
    """The class for Jina, whose methods take texts, or paths of pictures."""
    package: Any = pytest.importorskip("llama_index.embeddings.jinaai", exc_type=ImportError)
    client = package.JinaEmbedding(model="any", api_key="any", embed_batch_size=200)
    client._api.api_url = f"{url}/v1/embeddings"

    def path(number: int, item: Item) -> str:
        file = folder / f"{number}.image"
        file.write_bytes(item if isinstance(item, bytes) else b"")
        return str(file)

    def embed(items: Sequence[Item]) -> Any:
        if all(isinstance(item, str) for item in items):
            return client.get_text_embedding_batch(list(items))
        paths = [path(number, item) for number, item in enumerate(items)]
        if len(paths) == 1:
            return [client.get_image_embedding(paths[0])]
        return client.get_image_embedding_batch(paths)

    return Package(embed, RuntimeError, mixed=False)


def litellm(provider: str) -> Callable[[str], Package]:
    def made(url: str) -> Package:
        package: Any = pytest.importorskip("litellm", exc_type=ImportError)

        def embed(items: Sequence[Item]) -> Any:
            answer = package.embedding(
                model=f"{provider}/any",
                input=[uri(item) for item in items],
                api_base=f"{url}/v1" if provider != "jina_ai" else f"{url}/v1/embeddings",
                api_key="any",
                max_retries=0,
            )
            return [entry["embedding"] for entry in answer.data]

        return Package(embed, package.BadRequestError)

    return made


PACKAGES: dict[str, Callable[..., Package]] = {
    "openai": openai_default,
    "openai async": openai_async_float,
    "cohere": cohere_inputs,
    "langchain": langchain,
    "langchain async": langchain_async,
    "llama-index openai-like": llama_index_like,
    "llama-index openai": llama_index_openai,
    "llama-index jina": llama_index_jina,
    "litellm openai": litellm("openai"),
    "litellm hosted_vllm": litellm("hosted_vllm"),
    "litellm jina_ai": litellm("jina_ai"),
}


@pytest.fixture(params=list(PACKAGES))
def package(
    request: pytest.FixtureRequest, gateway_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Package:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Without this it downloads a list of prices when it is imported.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    make = PACKAGES[request.param]
    return make(gateway_url, tmp_path) if make is llama_index_jina else make(gateway_url)


def float32(rows: Any) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def test_one_text(package: Package, triton: Client) -> None:
    found = float32(package.embed(["a dog & a \u201ccat\u201d"]))
    np.testing.assert_array_equal(found, [triton.embed_text("a dog & a \u201ccat\u201d", True)])


def test_one_picture(package: Package, triton: Client) -> None:
    np.testing.assert_array_equal(float32(package.embed([DOG])), [triton.embed_image(DOG, True)])


def test_a_hundred_texts(package: Package, triton: Client) -> None:
    texts = [f"text number {number}" for number in range(100)]
    np.testing.assert_array_equal(float32(package.embed(texts)), triton.embed_texts(texts, True))


def test_a_hundred_pictures(package: Package, server: TritonServer) -> None:
    pictures = [encode(photo(32 + number, 48), "JPEG") for number in range(100)]
    expected = GrpcCaller(server.grpc_url).embed(pictures, normalized=True)
    np.testing.assert_allclose(float32(package.embed(pictures)), expected, rtol=0, atol=SHARED_BATCH)


def test_texts_and_pictures_in_one_request(package: Package, triton: Client) -> None:
    if not package.mixed:
        pytest.skip("this client has a method for texts and one for pictures")
    pictures = [encode(photo(48, 32 + number), "PNG") for number in range(5)]
    items = [item for number, data in enumerate(pictures) for item in (data, f"text {number}")]
    expected = [
        triton.embed_text(item, True) if isinstance(item, str) else triton.embed_image(item, True)
        for item in items
    ]
    np.testing.assert_allclose(float32(package.embed(items)), expected, rtol=0, atol=SHARED_BATCH)


def test_errors_are_those_of_the_client_with_our_message(package: Package) -> None:
    with pytest.raises(package.error, match=r"\[1\]: the text has"):
        package.embed(["a", TOO_LONG])
    with pytest.raises(package.error, match=r"\[1\]: .*image"):
        package.embed([DOG, b"\xff\xd8\xff\xe0" + bytes(200)])


def test_langchain_learns_why_its_tokens_are_refused(
    gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Any = pytest.importorskip("langchain_openai", exc_type=ImportError)
    openai: Any = pytest.importorskip("openai")
    tiktoken: Any = pytest.importorskip("tiktoken")
    # OpenAI's vocabulary would be downloaded. One of bytes gives token numbers as well.
    ranks = {bytes([byte]): byte for byte in range(256)}
    vocabulary = tiktoken.Encoding("bytes", pat_str=r".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", vocabulary)
    client = package.OpenAIEmbeddings(model="any", base_url=f"{gateway_url}/v1", api_key="any")
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embed_query("a dog")


def test_jina_asks_for_bits(gateway_url: str, triton: Client) -> None:
    package: Any = pytest.importorskip("llama_index.embeddings.jinaai", exc_type=ImportError)
    expected = triton.embed_text("a dog", True) > 0
    for kind in ("binary", "ubinary"):
        client = package.JinaEmbedding(model="any", api_key="any", encoding_queries=kind)
        client._api.api_url = f"{gateway_url}/v1/embeddings"
        np.testing.assert_array_equal(client.get_query_embedding("a dog"), expected)


def test_base64_of_litellm_is_that_of_triton(gateway_url: str, triton: Client) -> None:
    package: Any = pytest.importorskip("litellm", exc_type=ImportError)
    answer = package.embedding(
        model="openai/any",
        input=["a dog"],
        encoding_format="base64",
        api_base=f"{gateway_url}/v1",
        api_key="any",
    )
    found: Any = answer.data[0]["embedding"]
    if isinstance(found, str):
        found = np.frombuffer(base64.b64decode(found), "<f4")
    np.testing.assert_array_equal(float32(found), triton.embed_text("a dog", True))

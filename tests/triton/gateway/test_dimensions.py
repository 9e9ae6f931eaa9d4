"""A projection from pictures to answers: embed, fit, and ask a gateway for fewer dimensions."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import pytest
from gateways import encoded, gateway_process
from images import encode, photo
from programs import free_port
from siglip_serve_client import Client
from siglip_serve_client.compact import compact
from siglip_serve_client.projection import Projection, read_projection, write_projection
from wire import TINY

from siglip_serve.launcher import TritonServer

PROGRAM = str(Path(sys.executable).with_name("siglip-serve"))
DOG = (TINY / "samples" / "dog.jpg").read_bytes()
URI = f"data:image/jpeg;base64,{encoded(DOG)}"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def projection(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted to 40 pictures with the commands that users have."""
    folder = tmp_path_factory.mktemp("projection")
    (folder / "images").mkdir()
    for number in range(40):
        (folder / "images" / f"{number:02}.jpg").write_bytes(encode(photo(60 + number, 50, number), "JPEG"))
    embedded = run("embed", folder / "images", "-o", folder / "vectors.parquet", "--url", server.grpc_url)
    assert embedded.returncode == 0, embedded.stderr
    fitted = run("fit-projection", folder / "vectors.parquet", "-o", folder / "p.npz", "--dimensions", "24")
    assert fitted.returncode == 0, fitted.stderr
    assert "24 dimensions of 128, from 40 embeddings" in fitted.stdout
    return folder / "p.npz"


def test_clients_get_fewer_dimensions(server: TritonServer, projection: Path) -> None:
    made = read_projection(projection)
    with Client(server.grpc_url) as triton:
        whole = np.stack([triton.embed_text("a dog", True), triton.embed_image(DOG, True)])
    expected = made.project(whole, 16)
    with (
        gateway_process(server.grpc_url, "--projection", str(projection)) as url,
        openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="any",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client,
        httpx.Client(trust_env=False, timeout=60) as transport,
    ):
        answer = client.embeddings.create(model="any", input=["a dog", URI], dimensions=16)
        np.testing.assert_array_equal([entry.embedding for entry in answer.data], expected)
        half = transport.post(
            f"{url}/v1/embeddings",
            json={"input": ["a dog", URI], "dimensions": 16, "encoding_format": "float16"},
        ).json()
        found = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f2") for entry in half["data"]]
        np.testing.assert_array_equal(found, expected.astype(np.float16))
        with pytest.raises(openai.BadRequestError, match="dimensions: 25, expected 1 to 24, or 128"):
            client.embeddings.create(model="any", input="a dog", dimensions=25)
        embed: Any = cohere.ClientV2(api_key="any", base_url=url, httpx_client=transport).embed(
            model="any",
            input_type="search_query",
            texts=["a dog"],
            output_dimension=16,
            embedding_types=["int8", "ubinary"],
        )
        np.testing.assert_array_equal(embed.embeddings.int8, compact(expected[:1], "int8"))
        np.testing.assert_array_equal(embed.embeddings.ubinary, compact(expected[:1], "ubinary"))


def test_a_projection_of_another_checkpoint_ends_the_start(
    server: TritonServer, projection: Path, tmp_path: Path
) -> None:
    made = read_projection(projection)
    other = tmp_path / "other.npz"
    with other.open("wb") as file:
        write_projection(Projection(made.matrix, made.explained, made.rows, "google/siglip-base"), file)
    done = run("gateway", "--triton", server.grpc_url, "--port", str(free_port()), "--projection", other)
    assert done.returncode == 1
    assert f"--projection {other}: the projection is of google/siglip-base with width 128" in done.stderr
    assert "but Triton serves siglip-tiny with width 128" in done.stderr

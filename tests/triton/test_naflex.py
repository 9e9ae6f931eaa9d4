"""A NaFlex checkpoint behind a real server: every model of images and texts, against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_options import exact_options
from images import encode, photo
from PIL import Image
from random_checkpoints import random_naflex, save_naflex
from siglip_serve_client import Client, InvalidInputError
from transformers import Siglip2ImageProcessorPil, Siglip2Model, SiglipTokenizer
from wire import TINY, GrpcCaller

from siglip_serve.errors import ServerStartError, SettingsError
from siglip_serve.launcher import ServeOptions, TritonServer

MOST = 40
MODELS = ("embed_image", "embed_text", "classify_image", "explain_image", "siglip_vision_features")
TEXTS = ["a dog", "two cats", "a large red house"]
PICTURES = [photo(90, 60, 1), photo(200, 30, 2), photo(25, 190, 3), photo(64, 64, 4)]
FILES = [encode(picture, "PNG") for picture in PICTURES]
GRIDS = [(5, 8), (2, 14), (16, 2), (6, 6)]


@dataclass(frozen=True)
class Served:
    """A server, and transformers' reading of its checkpoint."""

    server: TritonServer
    model: Siglip2Model
    processor: Siglip2ImageProcessorPil

    def tokens_and_embeddings(self, pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            found = self.model.vision_model(**self.processor(pictures, return_tensors="pt"))
        return found.last_hidden_state, found.pooler_output

    def text_embeddings(self) -> torch.Tensor:
        tokenizer = SiglipTokenizer.from_pretrained(TINY)
        ids = tokenizer(TEXTS, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return self.model.text_model(ids).pooler_output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("naflex")
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, path / name)
    return save_naflex(random_naflex(text={"vocab_size": 32_000}), path)


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "log"
    with TritonServer(exact_options(checkpoint, log, *MODELS, max_num_patches=str(MOST))) as server:
        processor = Siglip2ImageProcessorPil(max_num_patches=MOST)
        yield Served(server, Siglip2Model.from_pretrained(checkpoint).eval(), processor)


def test_embeds_pictures_of_any_aspect_in_one_request(served: Served) -> None:
    tokens, expected = served.tokens_and_embeddings(PICTURES)
    outputs = ["EMBEDDING", "MEAN_EMBEDDING", "PATCH_EMBEDDINGS"]
    found = GrpcCaller(served.server.grpc_url).call("siglip_vision_features", FILES, outputs)
    np.testing.assert_allclose(found["EMBEDDING"], expected, atol=1e-5)
    for index, (rows, columns) in enumerate(GRIDS):
        own = tokens[index, : rows * columns]
        np.testing.assert_allclose(found["PATCH_EMBEDDINGS"][index, : rows * columns], own, atol=1e-5)
        np.testing.assert_allclose(found["MEAN_EMBEDDING"][index], own.mean(0), atol=1e-5)
        assert not found["PATCH_EMBEDDINGS"][index, rows * columns :].any()
    with Client(served.server.grpc_url) as client:
        np.testing.assert_allclose(client.embed_image_batch(FILES), expected, atol=1e-5)
        for picture, embedding in zip(PICTURES, expected, strict=True):
            np.testing.assert_allclose(client.embed_image(picture), embedding, atol=1e-5)
        np.testing.assert_allclose(client.embed_texts(TEXTS), served.text_embeddings(), atol=1e-5)


def test_classifies(served: Served) -> None:
    _, images = served.tokens_and_embeddings(PICTURES)
    cosine = F.normalize(images) @ F.normalize(served.text_embeddings()).T
    scale, bias = served.model.logit_scale.exp().detach(), served.model.logit_bias.detach()
    expected = torch.sigmoid(scale * cosine + bias)
    with Client(served.server.grpc_url) as client:
        for picture, probabilities in zip(PICTURES, expected, strict=True):
            np.testing.assert_allclose(client.classify(picture, TEXTS), probabilities, atol=1e-5)


def test_explains_on_the_grid_of_the_picture(served: Served) -> None:
    with Client(served.server.grpc_url) as client:
        for picture, grid in zip(PICTURES, GRIDS, strict=True):
            found = client.explain(picture, TEXTS)
            assert found.patch_maps.shape == (len(TEXTS), *grid)
            assert found.heatmaps.shape == (len(TEXTS), picture.height, picture.width)
            total = found.patch_maps.sum((1, 2)) + found.unattributed
            np.testing.assert_allclose(total, found.scores, atol=1e-5)
            _, image = served.tokens_and_embeddings([picture])
            cosine = F.normalize(image) @ F.normalize(served.text_embeddings()).T
            np.testing.assert_allclose(found.scores, cosine[0], atol=1e-5)


def test_names_the_picture_that_is_too_thin(served: Served) -> None:
    thin = encode(Image.new("RGB", (41, 1)), "PNG")
    with (
        Client(served.server.grpc_url) as client,
        pytest.raises(InvalidInputError, match=r"INPUT_IMAGE\[1\]: picture of 41x1 pixels is too thin"),
    ):
        client.embed_image_batch([FILES[0], thin])


def test_refuses_before_the_server_starts(checkpoint: Path, log: Path) -> None:
    refused: list[tuple[ServeOptions, type[Exception], str]] = [
        (
            exact_options(checkpoint, log),
            ServerStartError,
            "takes images of one size, but the checkpoint is a NaFlex",
        ),
        (exact_options(checkpoint, log, dtype="int8"), SettingsError, "dtype int8: not for towers of NaFlex"),
        (
            exact_options(checkpoint, log, max_num_patches="5000"),
            SettingsError,
            "got 5000, expected at most 4096",
        ),
        (exact_options(TINY, log, max_num_patches="9"), SettingsError, "siglip-tiny is no NaFlex checkpoint"),
    ]
    for start, error, message in refused:
        with pytest.raises(error, match=message), TritonServer(start):
            pass
    assert not log.exists()

"""A CLIP checkpoint behind a real server: every model, against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_vocabulary import write_clip_vocabulary
from exact_options import exact_options
from images import encode, photo
from numpy.typing import NDArray
from PIL import Image
from players import CROPS, purity
from random_checkpoints import random_clip, save_clip
from siglip_serve_client import Client, InvalidInputError
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from tritonclient.utils import InferenceServerException
from wire import GrpcCaller

from siglip_serve.errors import ServerStartError, SettingsError
from siglip_serve.launcher import TritonServer

SIDE = 48
TEXTS = ["a dog", "A DOG!", "größer, naïve", "🐶 and 🐱", "x" * 300, " spaced   out ", "it's a dog's life"]
LABELS = ["dog", "cat", "a large red house"]
# The squares in their centres are 60 pixels wide.
LANDSCAPE, PORTRAIT = photo(90, 60, 1), photo(60, 90, 2)


@dataclass(frozen=True)
class Served:
    """A server, and transformers' reading of its checkpoint."""

    server: TritonServer
    path: Path
    model: CLIPModel
    processor: CLIPImageProcessorPil
    tokenizer: CLIPTokenizer

    def image_features(self, *images: Image.Image) -> torch.Tensor:
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return self.model.get_image_features(pixels).pooler_output

    def text_features(self, texts: list[str]) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.inference_mode():
            return self.model.get_text_features(**ids).pooler_output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    size = write_clip_vocabulary(path, [*TEXTS, *LABELS] * 10, size=400)
    text = {
        "vocab_size": size,
        "max_position_embeddings": 16,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    return save_clip(random_clip({"image_size": SIDE, "patch_size": 16}, text), path)


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("server") / "log"
    with TritonServer(exact_options(checkpoint, log)) as server:
        yield Served(
            server,
            checkpoint,
            CLIPModel.from_pretrained(checkpoint).eval(),
            CLIPImageProcessorPil.from_pretrained(checkpoint),
            CLIPTokenizer.from_pretrained(checkpoint),
        )


def assert_close(ours: NDArray[np.float32], theirs: torch.Tensor) -> None:
    assert float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max()) <= 1e-5


def test_image_outputs_equal_transformers(served: Served) -> None:
    caller = GrpcCaller(served.server.grpc_url)
    files = [encode(image, "PNG") for image in (LANDSCAPE, PORTRAIT)]
    assert_close(caller.embed(files), served.image_features(LANDSCAPE, PORTRAIT))
    found = caller.call("siglip_vision_features", files, ["EMBEDDING", "MEAN_EMBEDDING", "PATCH_EMBEDDINGS"])
    pixels = served.processor([LANDSCAPE, PORTRAIT], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        patches = served.model.vision_model(pixels).last_hidden_state[:, 1:]
    assert_close(found["EMBEDDING"], served.image_features(LANDSCAPE, PORTRAIT))
    assert_close(found["PATCH_EMBEDDINGS"], patches)
    assert_close(found["MEAN_EMBEDDING"], patches.mean(1))


def test_text_embeddings_equal_transformers(served: Served) -> None:
    with Client(served.server.grpc_url) as client:
        assert_close(client.embed_texts(TEXTS, truncation=True), served.text_features(TEXTS))
        with pytest.raises(InvalidInputError, match="the text has 302 tokens and 16 fit"):
            client.embed_text("x " * 300)


def test_probabilities_are_a_softmax_over_the_labels(served: Served) -> None:
    images = F.normalize(served.image_features(LANDSCAPE), dim=1)
    texts = F.normalize(served.text_features(LABELS), dim=1)
    expected = (images @ texts.T * served.model.logit_scale.detach().exp()).softmax(1)
    with Client(served.server.grpc_url) as client:
        for softmax in (False, True):  # the client sends nothing for the first
            found = client.classify(LANDSCAPE, LABELS, softmax=softmax)
            np.testing.assert_allclose(found, expected[0], rtol=1e-4)


def test_refuses_probabilities_of_single_pairs(served: Served) -> None:
    caller = GrpcCaller(served.server.grpc_url)
    tensors = []
    for name, rows, shape in (
        ("INPUT_IMAGE", [encode(LANDSCAPE, "PNG")], [1, 1]),
        ("LABELS", [b"dog", b"cat"], [2]),
    ):
        tensors.append(caller.module.InferInput(name, shape, "BYTES"))
        tensors[-1].set_data_from_numpy(np.array(rows, dtype=np.object_).reshape(shape))
    message = "parameter 'softmax': got false, but the labels of a CLIP checkpoint always compete"
    with pytest.raises(InferenceServerException, match=message) as caught:
        caller.client.infer("classify_image", tensors, parameters={"softmax": False})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("image", [LANDSCAPE, PORTRAIT], ids=["landscape", "portrait"])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_heatmaps_cover_the_centre_square_and_sum_to_the_score(
    served: Served, image: Image.Image, mode: Literal["absolute", "relative"]
) -> None:
    picture = F.normalize(served.image_features(image), dim=1)
    expected = (picture @ F.normalize(served.text_features(LABELS), dim=1).T)[0].numpy()
    with Client(served.server.grpc_url) as client:
        found = client.explain(image, LABELS, mode=mode, overlays=True, opacity=1.0)
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    total = found.patch_maps.sum((1, 2)) + found.unattributed
    np.testing.assert_allclose(total, expected, atol=1e-5)
    assert found.patch_maps.shape == (3, SIDE // 16, SIDE // 16)
    assert found.heatmaps.shape == (3, image.height, image.width)
    inside = np.zeros((image.height, image.width), dtype=bool)
    inside[(image.height - 60) // 2 :, (image.width - 60) // 2 :][:60, :60] = True
    assert (found.heatmaps[:, ~inside] == 0).all()
    assert (found.heatmaps[:, inside] != 0).mean() > 0.99
    # Each patch is drawn where it lies: its own value, in its centre.
    rows, columns = (np.nonzero(inside.any(axis))[0][10::20] for axis in (1, 0))
    corner = found.heatmaps[:, rows[:, None], columns]
    np.testing.assert_allclose(corner, found.patch_maps, atol=0.06 * float(np.ptp(found.patch_maps)))
    painted = np.asarray(found.overlays[0]) != np.asarray(image)
    assert not painted[~inside].any()
    assert painted[inside].any(axis=-1).mean() > 0.9


def test_finds_two_teams(served: Served) -> None:
    with Client(served.server.grpc_url) as client:
        fitted = client.fit_teams(crops=CROPS)
        found = client.classify_teams(state=fitted.state, crops=CROPS)
    assert purity(found.labels) >= 0.9


def test_start_lists_every_fault_of_the_checkpoint(checkpoint: Path, log: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (path / "vocab.json").unlink()
    config = path / "config.json"
    config.write_text(config.read_text().replace('"projection_dim": 48', '"projection_dim": 32'))
    start = exact_options(path, log, "embed_image", "embed_text")
    with pytest.raises(ServerStartError) as caught, TritonServer(start):
        pass
    assert "no tokenizer.json, and not both of vocab.json and merges.txt" in str(caught.value)
    assert "visual_projection.weight is [48, 64], expected [32, 64]" in str(caught.value)


def test_refuses_float8_before_the_server_starts(checkpoint: Path, log: Path) -> None:
    start = exact_options(checkpoint, log, "embed_image", dtype="float8")
    with pytest.raises(SettingsError, match="dtype float8: for SigLIP's towers only"), TritonServer(start):
        pass
    assert not log.exists()

"""The setting preprocess=gpu, by which a GPU with a JPEG decoder reads the JPEGs."""

from __future__ import annotations

import base64
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from images import encode, image_files, malformed_files, oriented_files, photo
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException
from wire import ROOT, TINY, GrpcCaller

from siglip_serve.checkpoint.config import load_config
from siglip_serve.errors import SettingsError
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.launcher import ServeOptions, TritonServer
from siglip_serve.launcher.checkpoints import ServedCheckpoint
from siglip_serve.launcher.stage import Stage

REPOSITORY = ROOT / "model_repository"
SETTINGS = {"preprocess": "gpu"}
IMAGE = load_config(TINY).image
MODEL = "siglip_vision_process"


def declared(width: int, height: int) -> bytes:
    """A small JPEG whose frame claims this size."""
    data = encode(photo(90, 60), "JPEG")
    size = data.index(b"\xff\xc0") + 5
    return data[:size] + height.to_bytes(2) + width.to_bytes(2) + data[size + 4 :]


def test_refuses_preprocess_gpu_on_a_cpu(log: Path) -> None:
    options = ServeOptions(REPOSITORY, str(TINY), device="cpu", settings=SETTINGS, log_file=log)
    with pytest.raises(SettingsError, match="preprocess gpu: needs a GPU"), TritonServer(options):
        pass


@pytest.mark.parametrize(("decoders", "expected"), [(0, 4), (7, 7)])
def test_decoders_are_counted_per_gpu(decoders: int, expected: int) -> None:
    checkpoint = ServedCheckpoint({}, {"PIXEL_VALUES": [3, 3, 3], "PATCH_EMBEDDINGS": [9, 4]})
    stage = Stage(REPOSITORY, "cuda", "decode_on_gpu")
    try:
        stage.fill({"main": checkpoint, "teams": checkpoint}, decoders)
        groups = {
            name: text_format.Parse(
                (stage.models / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
            ).instance_group[0]
            for name in (MODEL, "siglip_vision_model", "jersey_process")
        }
    finally:
        stage.remove()
    assert (groups[MODEL].kind, groups[MODEL].count) == (
        model_config_pb2.ModelInstanceGroup.KIND_GPU,
        expected,
    )
    assert groups["siglip_vision_model"].count == 2
    assert groups["jersey_process"].count == 1


@pytest.fixture(scope="module")
def gpu_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    log_file = tmp_path_factory.mktemp("gpu_server") / "log"
    models = ("embed_image", MODEL, "jersey_process")
    options = ServeOptions(REPOSITORY, str(TINY), settings=SETTINGS, log_file=log_file, models=models)
    with TritonServer(options) as running:
        yield running


class Threads:
    """Calls of many threads, each with its own client."""

    def __init__(self, server: TritonServer) -> None:
        self._local, self._url = threading.local(), server.grpc_url

    def read(self, files: Sequence[bytes], **parameters: object) -> dict[str, NDArray[Any]] | str:
        """Pixels and sizes, or the error."""
        if not hasattr(self._local, "caller"):
            self._local.caller = GrpcCaller(self._url)
        try:
            return self._local.caller.call(MODEL, files, ["PIXEL_VALUES", "IMAGE_SIZE"], **parameters)
        except InferenceServerException as error:
            return f"{error.status()} {error.message()}"


def test_pixels_are_close_to_those_of_the_cpu_under_load(gpu_server: TritonServer) -> None:
    """Many clients send mixed kinds of files in requests of one or more rows."""
    read = Preprocessor(IMAGE, "fast")
    files = [*image_files().values(), *oriented_files().values()]
    files += [encode(photo(500, 375, seed), "JPEG", quality=90) for seed in range(20)]
    expected = [(read(data), read.decode(data).shape[:2]) for data in files]
    rng = random.Random(0)
    mixes = [rng.choices(range(len(files)), k=rng.choice((1, 1, 1, 2, 5))) for _ in range(600)]
    broken = list(malformed_files().values())
    threads = Threads(gpu_server)

    def one(number: int) -> tuple[dict[str, NDArray[Any]] | str, bool]:
        if number % 10 == 9:  # a broken file among the others
            return threads.read([broken[number % len(broken)]]), False
        rows = [files[index] for index in mixes[number]]
        if number % 10 == 8:
            return threads.read([base64.b64encode(row) for row in rows], base64_encoded=True), True
        return threads.read(rows), True

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(len(mixes))))
    for mix, (answer, good) in zip(mixes, answers, strict=True):
        if not good:
            assert isinstance(answer, str)
            assert answer.startswith("StatusCode.INVALID_ARGUMENT INPUT_IMAGE[0]: ")
            continue
        assert isinstance(answer, dict), answer
        for row, index in enumerate(mix):
            pixels, size = expected[index]
            difference = np.abs(answer["PIXEL_VALUES"][row].astype(int) - pixels)
            assert difference.max() <= 3
            assert difference.mean() <= 0.1
            assert tuple(answer["IMAGE_SIZE"][row]) == size


@pytest.mark.parametrize(
    ("rows", "parameters", "message"),
    [
        ([b"no image"], {}, "INPUT_IMAGE[0]: not a decodable image"),
        ([encode(photo(90, 60), "JPEG"), b""], {}, "INPUT_IMAGE[1]: empty"),
        ([b"%%%"], {"base64_encoded": True}, "INPUT_IMAGE[0]: not base64"),
        ([encode(photo(90, 60), "JPEG")], {"base64_encoded": "maybe"}, "parameter 'base64_encoded'"),
        ([encode(photo(90, 60), "JPEG")], {"embed_model": "other"}, "parameter 'embed_model'"),
        ([declared(8000, 8001)], {}, "INPUT_IMAGE[0]: 8000x8001 pixels, at most"),
    ],
)
def test_errors_equal_those_of_the_cpu(
    gpu_server: TritonServer, rows: list[bytes], parameters: dict[str, object], message: str
) -> None:
    answer = Threads(gpu_server).read(rows, **parameters)
    assert isinstance(answer, str)
    assert answer.startswith(f"StatusCode.INVALID_ARGUMENT {message}")

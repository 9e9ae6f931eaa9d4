"""The protocol of ImageNet-Segmentation against a real server, on pictures made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wire import TINY

pytest.importorskip("h5py")

from segmentation_files import write_segments

from siglip_serve.launcher import TritonServer
from validate import imagenet_segmentation
from validate.imagenet_segmentation import judge, square, total

SYNSETS = ("n01440764", "n02099601", "n09999999")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = []
    for synset, file in zip(SYNSETS, sorted((TINY / "samples").glob("*.jpg")), strict=False):
        with Image.open(file) as image:
            picture = np.asarray(image.convert("RGB").resize((90, 60)))
        mask = np.zeros(picture.shape[:2], dtype=bool)
        mask[10:50, 20:70] = True
        images.append((f"{synset}_1", picture, mask))
    return write_segments(tmp_path_factory.mktemp("segmentation") / "gtsegs_ijcv.mat", images)


def test_leaves_out_images_whose_class_the_mapping_lacks(
    server: TritonServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = tmp_path / "mapping.txt"
    mapping.write_text("n01440764 cat\nn02099601 dog, hound\n")
    arguments = ["--data", str(data), "--url", server.grpc_url, "--output", str(tmp_path), "--size", "48"]
    assert imagenet_segmentation.main([*arguments, "--mapping", str(mapping)]) == 0
    said = capsys.readouterr()
    assert "| images | pixel accuracy | mIoU | mAP |" in said.out
    assert "left out: 1 images" in said.err
    written = json.loads((tmp_path / "segmentation.json").read_text())
    assert (written["figures"]["images"], written["left_out"]) == (2, 1)
    for name in ("pixel_accuracy", "mean_iou", "mean_average_precision"):
        assert 0 < written["figures"][name] < 1
    assert written["server"]["checkpoint"] == "siglip-tiny"


def test_figures_equal_a_computation_from_the_servers_maps(
    server: TritonServer, data: Path, tmp_path: Path
) -> None:
    """The test repeats each step: predicted class, mean over a bank, mask scaled to the map."""
    from siglip_serve_client import Client

    from siglip_serve.embeddings.zero_shot import build_class_embeddings, cosine
    from validate.protocols import imagenet_classnames
    from validate.segments import Segments

    arguments = ["--data", str(data), "--url", server.grpc_url, "--output", str(tmp_path), "--size", "48"]
    assert imagenet_segmentation.main([*arguments, "--templates", "one", "--bank", "3"]) == 0
    figures = json.loads((tmp_path / "segmentation.json").read_text())["figures"]
    names = imagenet_classnames()
    outcomes = []
    with Client(server.grpc_url) as client, Segments(data) as segments:
        texts = client.embed_texts([f"a photo of a {name}." for name in names])
        classes = build_class_embeddings(texts[:, None])
        for segment in (segments[index] for index in range(len(segments))):
            picture = square(segment)
            best = int(cosine(client.embed_image(picture)[None], classes)[0].argmax())
            maps = client.explain(
                picture,
                [names[best], names[0], names[500], names[999]],
                templates=["a photo of a {}."],
                mode="absolute",
                normalize="none",
                size=(48, 48),
            ).heatmaps
            mask = Image.fromarray(segment.mask).resize((48, 48), Image.Resampling.NEAREST)
            outcomes.append(judge(maps[0] - maps[1:].mean(axis=0), np.asarray(mask)))
    expected = total(outcomes)
    assert figures["images"] == 3
    assert figures["mean_average_precision"] == pytest.approx(expected.mean_average_precision, abs=1e-3)
    assert figures["mean_iou"] == pytest.approx(expected.mean_iou, abs=1e-2)

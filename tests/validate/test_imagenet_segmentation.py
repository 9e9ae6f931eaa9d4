"""The file of ImageNet-Segmentation, and its figures on maps with a known result."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("h5py")

from segmentation_files import write_segments

from validate import imagenet_segmentation
from validate.errors import DatasetError
from validate.imagenet_segmentation import judge, square, table, total, vocabulary
from validate.segments import Segment, Segments

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
MASK = np.zeros((4, 6), dtype=bool)
MASK[1:3, 0:2] = True


def test_reads_pictures_and_masks_as_written(tmp_path: Path) -> None:
    other = np.full((2, 3, 3), 7, dtype=np.uint8)
    images = [("n01440764_10026", PICTURE, MASK), ("n02099601_3", other, np.ones((2, 3), dtype=bool))]
    with Segments(write_segments(tmp_path / "a.mat", images)) as segments:
        assert len(segments) == 2
        first, second = segments[0], segments[1]
    assert (first.name, first.synset, second.synset) == ("n01440764_10026", "n01440764", "n02099601")
    assert np.array_equal(first.picture, PICTURE)
    assert np.array_equal(first.mask, MASK)
    assert np.array_equal(second.picture, other)
    assert second.mask.all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (("fish", PICTURE, MASK), r"value/id\[0\]: got 'fish', expected as n01440764_10026"),
        (("n01440764_1", PICTURE, MASK[:2]), r"value/gt\[0\]: got \[6, 2\], expected \[6, 4\]"),
        (("n01440764_1", PICTURE[..., :2], MASK), r"value/img\[0\]: got uint8 \[2, 6, 4\], expected uint8"),
    ],
)
def test_names_an_image_of_the_wrong_form(
    image: tuple[str, NDArray[np.uint8], NDArray[np.bool_]], message: str, tmp_path: Path
) -> None:
    with (
        Segments(write_segments(tmp_path / "a.mat", [image])) as segments,
        pytest.raises(DatasetError, match=message),
    ):
        segments[0]


def test_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.mat"
    with pytest.raises(DatasetError, match="cannot be opened as HDF5"):
        Segments(file)
    file.write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(DatasetError, match="cannot be opened as HDF5"):
        Segments(file)
    write_segments(file, [])
    assert imagenet_segmentation.main(["--data", str(file)]) == 1
    assert "no images in it" in capsys.readouterr().err
    write_segments(file, [("n01440764_1", PICTURE, MASK)], gt=None)
    with pytest.raises(DatasetError, match=r"value/gt: expected references \[N, 1\], found nothing"):
        Segments(file)


def test_figures_equal_a_computation_by_hand() -> None:
    perfect = judge(np.where(MASK, 2.0, -1.0), MASK)
    assert (perfect.right, perfect.pixels, perfect.precision) == (24, 24, 1)
    # The only pixel found lies outside the object: object 0/5, background 19/24.
    wrong = np.zeros(MASK.shape)
    wrong[0, 5] = 1
    missed = judge(wrong, MASK)
    assert missed.right == 19
    assert (missed.both.tolist(), missed.either.tolist()) == ([19, 0], [24, 5])
    figures = total([perfect, missed])
    assert figures.images == 2
    assert figures.pixel_accuracy == 43 / 48
    # Sums over images first: background 20 + 19 of 20 + 24, object 4 + 0 of 4 + 5.
    assert figures.mean_iou == pytest.approx((39 / 44 + 4 / 9) / 2)
    assert figures.mean_average_precision == pytest.approx((1 + missed.precision) / 2)
    assert "| 2 | 89.58 | 66.54 |" in table(figures)


def test_ignores_values_below_the_mean_of_the_classes() -> None:
    heat = np.where(MASK, 0.5, -1.0)
    heat[0, 0] = -100
    assert judge(heat, MASK).right == MASK.size


def test_stretches_photographs_to_a_square() -> None:
    with Image.open(io.BytesIO(square(Segment("n01440764_1", PICTURE, MASK)))) as image:
        assert image.size == (6, 6)
        assert np.array_equal(np.asarray(image)[0, :, 0] > 0, PICTURE[0, :, 0] > 0)


def test_classes_come_from_imagenet_or_a_mapping(tmp_path: Path) -> None:
    assert len(vocabulary(None).names) == 1000
    mapping = tmp_path / "mapping.txt"
    mapping.write_text("n02099601 golden retriever\nn01440764 tench, Tinca tinca\n")
    words = vocabulary(mapping)
    assert words.names == ["tench", "golden retriever"]
    assert words.index == {"n01440764": 0, "n02099601": 1}


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert imagenet_segmentation.main(["--data", str(tmp_path / "missing.mat")]) == 1
    assert "missing.mat: cannot be opened as HDF5" in capsys.readouterr().err
    file = write_segments(tmp_path / "a.mat", [("n01440764_1", PICTURE, MASK)])
    assert imagenet_segmentation.main(["--data", str(file), "--url", "127.0.0.1:1"]) == 1
    assert "no gRPC server answers at 127.0.0.1:1" in capsys.readouterr().err

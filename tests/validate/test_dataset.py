from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from validate.dataset import MAPPING, Sample, few_shot, load_dataset
from validate.errors import DatasetError
from validate.protocols import curated_names, imagenet_classnames

ROWS = ("n00000001 tench, Tinca tinca", "n00000002 goldfish, Carassius auratus", "n00000003 cock")


def make_folder(
    root: Path, rows: Sequence[str] = ROWS, train: int = 3, valid: Sequence[str] = ("a_p0", "b_p0")
) -> Path:
    """A folder of ImageNet's layout. Its files are named like images and hold none."""
    (root / MAPPING).write_text("\n".join(rows) + "\n", encoding="utf-8")
    for number, row in enumerate(rows):
        for part, names in (("train", [f"{row[:9]}_{i}" for i in range(train)]), ("valid", valid)):
            folder = root / part / row.split(" ", maxsplit=1)[0]
            folder.mkdir(parents=True)
            for name in names:
                (folder / f"{name}.png").write_bytes(b"image %d %s" % (number, name.encode()))
    return root


def test_reads_a_complete_folder(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "train" / "n00000001" / ".hidden").write_bytes(b"not an image")
    dataset = load_dataset(tmp_path, "stop")
    assert [row.first_name for row in dataset.classes] == ["tench", "goldfish", "cock"]
    assert dataset.classes[0].text == "tench, Tinca tinca"
    assert [sample.label for sample in dataset.train] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [sample.style for sample in dataset.valid] == ["a", "b"] * 3
    assert dataset.problems == []


def test_limits_the_validation_images(tmp_path: Path) -> None:
    dataset = load_dataset(make_folder(tmp_path), "stop", valid_per_class=1)
    assert [sample.path.name for sample in dataset.valid] == ["a_p0.png"] * 3


def test_orders_classes_by_id(tmp_path: Path) -> None:
    dataset = load_dataset(make_folder(tmp_path, rows=ROWS[::-1]), "stop")
    assert [row.synset for row in dataset.classes] == ["n00000001", "n00000002", "n00000003"]


def test_names_and_leaves_out_every_fault(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with (tmp_path / MAPPING).open("a", encoding="utf-8") as file:
        file.write("what is this\nn00000001 tench again\nn00000004 hen\n")
    for file_of_class in (tmp_path / "valid" / "n00000002").iterdir():
        file_of_class.unlink()
    (tmp_path / "train" / "n00000099").mkdir()
    dataset = load_dataset(tmp_path, "skip")
    assert dataset.problems == [
        f"{MAPPING} line 4: expected 'n01440764 tench, Tinca tinca', got 'what is this'",
        f"{MAPPING} line 5: n00000001 was given before",
        f"train/n00000099: not in {MAPPING}",
        "train/n00000004: no such folder (hen)",
        "valid/n00000002: empty folder (goldfish)",
        "valid/n00000004: no such folder (hen)",
    ]
    assert len(dataset.classes) == 4
    assert {sample.label for sample in dataset.valid} == {0, 2}


def test_stops_at_the_first_fault_on_request(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train" / "n00000099").mkdir()
    with pytest.raises(DatasetError, match=r"train/n00000099: not in .*--on-error skip"):
        load_dataset(tmp_path, "stop")


def test_refuses_a_folder_with_nothing_to_validate(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        load_dataset(tmp_path / "missing", "skip")
    with pytest.raises(DatasetError, match="no folders of classes"):
        load_dataset(tmp_path, "skip")
    (tmp_path / MAPPING).write_text("nothing\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="no usable row"):
        load_dataset(tmp_path, "skip")
    (tmp_path / MAPPING).write_text(ROWS[0], encoding="utf-8")
    with pytest.raises(DatasetError, match="no images of any class"):
        load_dataset(tmp_path, "skip")


def test_few_shot_draws_equal_numbers_per_class() -> None:
    samples = [Sample(Path(str(number)), number % 3) for number in range(30)]
    chosen = few_shot(samples, shots=4, seed=1)
    assert [sum(samples[position].label == label for position in chosen) for label in range(3)] == [4, 4, 4]
    assert chosen == few_shot(samples, shots=4, seed=1)
    assert chosen != few_shot(samples, shots=4, seed=2)
    assert few_shot(samples, shots=99, seed=1) == list(range(30))


def test_a_file_without_a_prefix_has_no_style() -> None:
    assert Sample(Path("cat.png"), 0).style == "none"


def make_classes(folder: Path, names: Sequence[str]) -> None:
    """Folders of one file each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(name.encode())


def test_reads_numbered_folders_as_imagenets_classes(tmp_path: Path) -> None:
    """ImageNet-V2 has no parts and no mapping."""
    make_classes(tmp_path, [str(number) for number in range(1000)])
    dataset = load_dataset(tmp_path, "stop")
    assert [row.first_name for row in dataset.classes[:3]] == ["tench", "goldfish", "great white shark"]
    assert [sample.label for sample in dataset.valid] == list(range(1000))
    assert dataset.valid[10].path.parent.name == "10"
    assert dataset.train == []
    assert curated_names(dataset.classes) == imagenet_classnames()


@pytest.mark.parametrize("name", ["1000", "007"])
def test_refuses_numbers_that_are_no_class_of_imagenet(tmp_path: Path, name: str) -> None:
    make_classes(tmp_path, ["0", name])
    with pytest.raises(DatasetError, match=f"{name}: expected folders named 0 to 999"):
        load_dataset(tmp_path, "skip")


@pytest.mark.parametrize("part", ["valid", "val", "test"])
def test_reads_folders_that_are_named_after_their_classes(tmp_path: Path, part: str) -> None:
    """CIFAR as a directory."""
    make_classes(tmp_path / part, ["cat", "pickup_truck"])
    make_classes(tmp_path / "train", ["cat", "pickup_truck"])
    dataset = load_dataset(tmp_path, "stop")
    assert [row.text for row in dataset.classes] == ["cat", "pickup truck"]
    assert [sample.label for sample in dataset.valid] == [0, 1] == [sample.label for sample in dataset.train]


def test_synset_ids_need_their_names(tmp_path: Path) -> None:
    make_classes(tmp_path / "val", ["n01440764", "n15075141"])
    with pytest.raises(
        DatasetError, match=r"which are not ImageNet's 1000; LOC_synset_mapping\.txt must name"
    ):
        load_dataset(tmp_path, "skip")


def test_needs_folders(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="no folders of classes"):
        load_dataset(tmp_path, "skip")

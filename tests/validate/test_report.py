from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from validate import parity, siglip_vision
from validate.dataset import MAPPING, ClassInfo, Dataset, Sample
from validate.errors import DatasetError, ServerError
from validate.measures.accuracy import Confusion
from validate.pixels import pixel_features
from validate.protocols import Row
from validate.report import Report, _draw_bars, class_means, draw, markdown, published_table, write_json
from validate.server import Server, ServerInfo

YES, NO = True, False
ROWS = [
    Row("10-shot", "", [np.array([YES, YES, YES, NO])], [np.array([YES] * 4)], [Confusion(1, 0, 1)]),
    Row("zero-shot", "A photo of {text}.", [np.array([YES, NO, NO, NO])], [np.array([YES, YES, NO, NO])]),
]


@pytest.fixture
def report() -> Report:
    classes = [ClassInfo("n00000001", "tench, Tinca tinca"), ClassInfo("n00000002", "goldfish")]
    valid = [Sample(Path(f"{style}_p0.png"), label) for label in (0, 1) for style in ("twemoji", "fluent")]
    return Report(
        ServerInfo("127.0.0.1:8001", "2.51.0", "tiny", "unknown", "float32", "fast"),
        Dataset(Path(), classes, [], valid),
        ROWS,
        ["valid/n00000002/bad.png: not a decodable image"],
        {name: np.array([sample.style == name for sample in valid]) for name in ("fluent", "twemoji")},
        chance=True,
    )


def test_prints_the_published_layout() -> None:
    assert published_table(ROWS) == (
        "| | top-1 | top-5 | prompt |\n"
        "|---|---|---|---|\n"
        "| 10-shot | 0.7500 | 1.0000 | |\n"
        "| zero-shot | 0.2500 | 0.5000 | A photo of {text}. |"
    )


def test_markdown_tells_settings_and_left_out_images(report: Report) -> None:
    text = markdown(report)
    for part in (
        "Checkpoint tiny, revision unknown, dtype float32, preprocessing fast, served by Triton 2.51.0.",
        "2 classes, 0 training and 4 validation images.",
        "| 10-shot |  | 0.7500 | 0.3006 to 0.9544 | 1.0000 | 0.5101 to 1.0000 |  |",
        "| chance | | 0.5000 |",
        "| | images | 10-shot | zero-shot: A photo of {text}. |\n|---|---|---|---|\n| fluent | 2 | 0.5000 |",
        "| goldfish | tench | 1 |",
        "## Left out (1)\n\n- valid/n00000002/bad.png: not a decodable image",
    ):
        assert part in text


def test_json_has_the_figures(report: Report, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["rows"][0]["top1"]["value"] == 0.75
    assert content["rows"][0]["groups"] == {"fluent": 0.5, "twemoji": 1.0}
    assert content["rows"][0]["confusions"] == [["n00000002", "n00000001", 1]]
    assert content["server"]["checkpoint"] == "tiny"
    assert content["chance"] == {"top1": 0.5, "top5": 1}


def test_labels_of_the_plot_are_whole(report: Report) -> None:
    prompt = "This is a photo from ImageNet's {label} category. This category contains photos of {text}."
    report.rows = [*ROWS, Row("zero-shot", prompt, [np.array([YES] * 4)], [np.array([YES] * 4)])]
    figure, axes = plt.subplots()
    _draw_bars(axes, report)
    labels = [" ".join(label.get_text().split()) for label in axes.get_yticklabels()]
    plt.close(figure)
    assert labels == [f"zero-shot, {prompt}", "zero-shot, A photo of {text}.", "10-shot"]
    assert [text.get_text() for text in axes.texts] == ["1.0000", "0.2500", "0.7500"]


def test_draws_the_plot(report: Report, tmp_path: Path) -> None:
    means = class_means(np.eye(4), np.array([0, 0, 1, 1]))
    assert means.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    draw(report, means, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert image.width > 1_000


def test_raw_pixels(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    features = pixel_features([Sample(tmp_path / "clear.png", 0)], side=2, label="test")
    assert features.tolist() == [[1.0] * 12]
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(DatasetError, match=r"bad\.png: no pixels for the baseline"):
        pixel_features([Sample(tmp_path / "bad.png", 0)], side=2, label="test")


def test_parity_of_predictions() -> None:
    data = Dataset(Path(), [], [], [Sample(Path(), 0), Sample(Path(), 1)])
    ours = parity.Side(np.eye(2), None, np.eye(2))
    swapped = parity.Side(np.array([[1.0, 0.0], [1.0, 0.0]]), None, np.eye(2))
    (same,) = parity.compare(data, ours, ours)
    assert (same.difference, same.agreement) == (0, 1)
    (other,) = parity.compare(data, ours, swapped)
    assert (other.difference, other.agreement) == (0.5, 0.5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "localhost"])
def test_names_a_url_that_is_not_grpc(url: str) -> None:
    with pytest.raises(ServerError, match="expected host:port of the gRPC endpoint"):
        Server(url)


@pytest.mark.parametrize("command", [siglip_vision.main, parity.main])
def test_no_server_ends_with_one_line_and_a_failing_status(
    command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MAPPING).write_text("n00000001 tench\n", encoding="utf-8")
    (tmp_path / "valid" / "n00000001").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "valid" / "n00000001" / "a.png")
    arguments = ["--data", str(tmp_path), "--url", "127.0.0.1:9", "--cache", str(tmp_path / "cache")]
    assert callable(command)
    assert command([*arguments, *(["--checkpoint", "none"] if command is parity.main else [])]) == 1
    told = capsys.readouterr().err
    assert told.endswith(
        "error: no gRPC server answers at 127.0.0.1:9: is it running, is this its gRPC port?\n"
    )
    assert "Traceback" not in told


@pytest.mark.parametrize("command", [siglip_vision.main, parity.main])
def test_help(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(command)
    with pytest.raises(SystemExit) as stopped:
        command(["--help"])
    assert stopped.value.code == 0
    assert "--on-error" in capsys.readouterr().out

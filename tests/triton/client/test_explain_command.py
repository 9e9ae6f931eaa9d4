"""`siglip-serve explain` against a real server: the grid, the arrays, the table, and what goes wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from images import encode, exif, photo
from PIL import Image
from siglip_serve_client.commands.main import main
from wire import TINY

from siglip_serve.launcher import TritonServer

DOG = TINY / "samples" / "dog.jpg"


def run(server: TritonServer, *words: str | Path, scheme: str = "grpc") -> int:
    address = server.http_url if scheme == "http" else server.grpc_url
    return main(["explain", "--url", f"{scheme}://{address}", *map(str, words)])


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_grid_arrays_and_table(
    scheme: str, server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, arrays = tmp_path / "grid.png", tmp_path / "arrays"
    both = ["--prompt", "dog", "--prompt", "a slice of pizza"]
    assert run(server, DOG, *both, "-o", output, "--npz", arrays, scheme=scheme) == 0
    with Image.open(output) as grid:
        assert grid.format == "PNG"
        assert grid.width > 800  # the picture and a map beside it
    with np.load(arrays) as file:
        found = dict(file)
    assert list(found["prompts"]) == ["dog", "a slice of pizza"]
    assert found["heatmaps"].shape == (2, 300, 400)
    total = found["patch_maps"].sum((1, 2)) + found["unattributed"]
    np.testing.assert_allclose(total, found["scores"], atol=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["prompt", "cosine", "in", "places", "unattributed"]
    for line, score, prompt in zip(lines[1:3], found["scores"], found["prompts"], strict=True):
        cosine, placed, rest = map(float, line.removeprefix(prompt).split())
        assert cosine == pytest.approx(score, abs=5e-4)
        assert placed + rest == pytest.approx(cosine, abs=2e-3)
    assert lines[3] == f"{output}: 2 heatmaps"


def test_options_reach_the_server(server: TritonServer, tmp_path: Path) -> None:
    def arrays(*words: str) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        path = tmp_path / "arrays.npz"
        both = ["--prompt", "dog", "--prompt", "pizza"]
        assert run(server, DOG, *both, *words, "-o", tmp_path / "grid.png", "--npz", path) == 0
        with np.load(path) as file:
            return dict(file)

    plain = arrays("--normalize", "prompt")
    np.testing.assert_allclose(plain["heatmaps"].max((1, 2)), 1, atol=0.05)
    small = arrays("--size", "20", "30")["heatmaps"]
    assert small.shape == (2, 20, 30)
    # Coarse pixels seldom lie on a patch's centre. On one scale, the default, pizza is below dog here.
    assert 0.85 < small[0].max() <= 1
    assert small[1].max() < 0.99 * plain["heatmaps"][1].max()
    for words in (
        ["--mode", "absolute"],
        ["--background", "sky", "--background", "thing"],
        ["--template", "a photo of a {}."],
    ):
        changed = arrays(*words)["patch_maps"]
        assert np.abs(changed - plain["patch_maps"]).max() > 1e-5, words
    default = (tmp_path / "grid.png").read_bytes()
    arrays("--template", "a photo of a {}.", "--colormap", "cividis")
    assert (tmp_path / "grid.png").read_bytes() != default
    arrays("--template", "a photo of a {}.", "--opacity", "0.1")
    assert (tmp_path / "grid.png").read_bytes() != default


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP"), ("a.pdf", "")]
)
def test_formats_of_the_grid(name: str, kind: str, server: TritonServer, tmp_path: Path) -> None:
    assert run(server, DOG, "--prompt", "dog", "-o", tmp_path / name) == 0
    if kind:
        with Image.open(tmp_path / name) as grid:
            assert grid.format == kind
    else:
        assert (tmp_path / name).read_bytes().startswith(b"%PDF")


def test_turned_and_transparent_pictures_are_shown_as_they_are_seen(
    server: TritonServer, tmp_path: Path
) -> None:
    (tmp_path / "turned.jpg").write_bytes(encode(photo(200, 100), "JPEG", exif=exif(6)))
    assert run(server, tmp_path / "turned.jpg", "--prompt", "dog", "-o", tmp_path / "turned.png") == 0
    with Image.open(tmp_path / "turned.png") as grid:
        turned = grid.size
    clear = Image.new("RGBA", (100, 200), (0, 0, 0, 0))
    (tmp_path / "clear.png").write_bytes(encode(clear, "PNG"))
    assert run(server, tmp_path / "clear.png", "--prompt", "dog", "-o", tmp_path / "grid.png") == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == turned  # both are 100 wide and 200 high
        assert grid.convert("RGB").getpixel((60, 150)) == (255, 255, 255)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_refuses_unreadable_and_unwritable_files(
    server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "dog", "-o"]
    good = tmp_path / "grid.png"
    assert run(server, tmp_path / "nothing.jpg", *words, good) == 2
    assert "nothing.jpg: No such file or directory" in error_of(capsys)
    for name in ("grid", "grid.txt", "grid.psd"):
        assert run(server, DOG, *words, tmp_path / name) == 2
        assert f"{name}: not a picture's ending, such as .png or .jpg" in error_of(capsys)
    assert run(server, DOG, *words, tmp_path / "none" / "grid.png") == 2
    assert "there is no folder" in error_of(capsys)
    assert run(server, DOG, *words, good, "--npz", tmp_path / "none" / "a.npz") == 2
    assert "there is no folder" in error_of(capsys)
    assert run(server, DOG, *words, good, "--npz", tmp_path) == 2
    assert f"{tmp_path}: Is a directory" in error_of(capsys)


def test_refusals_of_the_server_name_the_crop(
    server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grid.png"
    assert run(server, DOG, "--prompt", "dog", "--prompt", " ", "-o", output) == 1
    assert "siglip-serve: PROMPTS[1]: the text is empty" in error_of(capsys)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    assert run(server, bad, "--prompt", "dog", "-o", output) == 1
    assert "INPUT_IMAGE[0]: not a decodable image" in error_of(capsys)
    assert run(server, DOG, "--prompt", "dog", "--opacity", "3", "-o", output) == 1
    assert "OPACITY: got 3, expected 0 to 1" in error_of(capsys)
    assert not output.exists()


def test_an_address_without_a_server_is_unreachable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", str(DOG), "--prompt", "dog", "-o", str(tmp_path / "grid.png")]
    assert main([*words, "--url", "127.0.0.1:9"]) == 1
    assert "no server answers at 127.0.0.1:9" in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["--prompt", "dog"], "required: -o/--output"),
        (["-o", "a.png"], "required: --prompt"),
        (["--prompt", "dog", "-o", "a.png", "--size", "5"], "--size: expected 2 arguments"),
        (["--prompt", "dog", "-o", "a.png", "--size", "5", "0"], "expected a whole number of at least 1"),
        (["--prompt", "dog", "-o", "a.png", "--mode", "none"], "invalid choice: 'none'"),
        (["--prompt", "dog", "-o", "a.png", "--colormap", "hot"], "invalid choice: 'hot'"),
        (["--prompt", "dog", "-o", "a.png", "--opacity", "x"], "invalid float"),
    ],
)
def test_refuses_misuse(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", str(DOG), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = "--prompt --output --npz --template --background --mode --normalize --size --colormap --opacity"
    assert set(options.split()) <= set(re.findall(r"--[a-z]+", text))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "show where in a picture a prompt's score comes from" in " ".join(capsys.readouterr().out.split())

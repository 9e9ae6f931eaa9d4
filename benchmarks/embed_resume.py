"""`siglip-serve embed` undisturbed, and with the command and the server killed on the way: the same rows?

    python -m benchmarks.embed_resume --images 10000 --output benchmarks/results/embed_resume.csv

Every image is another one. The disturbed run has the command killed at a fifth, at a third and at 60 % of the
rows. The server is killed at a half and started again 5 seconds later. Kills are SIGKILL.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.inputs import synthetic_jpeg
from benchmarks.records import about, write_csv
from siglip_serve.launcher import ServeOptions, TritonServer

_ROOT = Path(__file__).parents[1]
_DOWN = 5.0  # seconds without a server


def main() -> None:
    """Run both and compare them row by row."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number in range(options.images):
            (folder / "images" / f"{number:06}.jpg").write_bytes(synthetic_jpeg(64, 48, number))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with _server(options.checkpoint, port, folder):
            begin = time.monotonic()
            _finish(_start(folder, "plain.npz", port))
            seconds = time.monotonic() - begin
        kills, waits = _disturb(folder, options, port)
        row = _compare(folder) | {
            "images": str(options.images),
            "seconds_undisturbed": f"{seconds:.1f}",
            "kills_of_the_command": str(kills),
            "kills_of_the_server": str(waits),
        }
    print(row)
    write_csv(options.output, [{**row, **about(("numpy", "tritonclient"))}])


def _disturb(folder: Path, options: argparse.Namespace, port: int) -> tuple[int, int]:
    server = _server(options.checkpoint, port, folder)
    server.start()
    try:
        for share in (0.2, 0.33):
            process = _start(folder, "disturbed.npz", port)
            _wait(folder, share * options.images, process)
            process.kill()
            process.wait()
        process = _start(folder, "disturbed.npz", port)
        _wait(folder, 0.5 * options.images, process)
        os.kill(server.pid, signal.SIGKILL)
        server.stop(timeout=1)
        time.sleep(_DOWN)
        server = _server(options.checkpoint, port, folder)
        server.start()
        _wait(folder, 0.6 * options.images, process)
        process.kill()
        process.wait()
        _finish(_start(folder, "disturbed.npz", port))
    finally:
        server.stop()
    return 3, 1


def _server(checkpoint: Path, port: int, folder: Path) -> TritonServer:
    log = folder / "server.log"
    return TritonServer(
        ServeOptions(
            _ROOT / "model_repository",
            str(checkpoint),
            device="cpu",
            models=("embed_image",),
            grpc_port=port,
            log_file=log,
        )
    )


def _start(folder: Path, output: str, port: int) -> subprocess.Popen[bytes]:
    program = str(Path(sys.executable).parent / "siglip-serve")
    arguments = ["embed", "images", "-o", output, "--url", f"127.0.0.1:{port}", "--part-rows", "100"]
    return subprocess.Popen([program, *arguments], cwd=folder)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait(3600):
        sys.exit(f"siglip-serve embed ended with status {process.returncode}")


def _wait(folder: Path, rows: float, process: subprocess.Popen[bytes]) -> None:
    while len(list(folder.glob("disturbed.npz.partial/part-*.npz"))) * 100 < rows:
        if process.poll() is not None:
            sys.exit(f"siglip-serve embed ended too early, with status {process.returncode}")
        time.sleep(0.02)


def _compare(folder: Path) -> dict[str, str]:
    with np.load(folder / "plain.npz") as plain, np.load(folder / "disturbed.npz") as disturbed:
        same = {name: bool(np.array_equal(plain[name], disturbed[name])) for name in ("paths", "sha256")}
        a, b = plain["embeddings"], disturbed["embeddings"]
        once = len(set(disturbed["paths"].tolist())) == len(disturbed["paths"])
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "rows": str(len(b)),
        "every_row_once": str(once),
        "same_paths_in_order": str(same["paths"]),
        "same_sha256": str(same["sha256"]),
        "identical_embeddings": str(int((a == b).all(1).sum())),
        "largest_difference": f"{np.abs(a - b).max():.2e}",
        "least_cosine": f"{cosine.min():.7f}",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/siglip-tiny"))
    parser.add_argument("--images", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("build/bench/embed_resume.csv"))
    return parser


if __name__ == "__main__":
    main()

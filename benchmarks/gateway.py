"""Cost of the gateway: the same inputs through it and through Triton's own HTTP in JSON, alternating.

    python -m benchmarks.gateway --checkpoint checkpoints/siglip-tiny --concurrency 8 64 --output FILE.csv

The ways are `triton` (KServe's JSON with base64 at Triton's own HTTP port), `door` (the same at the public
port), `gateway` (OpenAI's API with data URIs) and every `--peer`, a running server of another project. A row
has the medians over the rounds, and those of the ratio to `triton` within a round. CPU time is in
milliseconds per picture or text. `largest_difference` is that of any value of the vectors from Triton's, and
`cosine_to_transformers` the smallest cosine of texts to those of transformers, padded as SigLIP was trained.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast, get_args

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.inputs import parse_settings, synthetic_texts
from benchmarks.json_clients import image_request, path_of, text_request
from benchmarks.load import Load, Result, first_answers, run
from benchmarks.load_clients import JsonForm, Target
from benchmarks.records import about, cosine, write_csv
from benchmarks.serve_load import add_load_options, device_name, pictures
from siglip_serve.launcher import ServeOptions, TritonServer

_ROOT = Path(__file__).parents[1]
_PACKAGES = ["uvicorn", "fastapi", "orjson", "tritonclient", "grpcio", "numpy"]
_BODIES = 8  # different requests of several inputs
# The processes of this server by what they are. Those that decode and compute are named by their model.
_KINDS = {
    "siglip_gateway": "gateway",
    "siglip_gateway.doors grpc": "grpc_door",
    "siglip_gateway.doors http": "http_door",
    "tritonserver": "tritonserver",
    "siglip_vision_process": "decoder",
    "siglip_vision_model": "model",
    "siglip_text_tokenize": "decoder",
    "siglip_text_model": "model",
}
_COLUMNS = ("gateway", "grpc_door", "http_door", "tritonserver", "decoder", "model")


@dataclass(frozen=True)
class Way:
    """A way to vectors.

    Attributes:
        pid: the process above all others of a peer, or None for this server.
    """

    name: str
    form: JsonForm
    url: str
    pid: int | None = None
    path: str = ""

    def target(self, model: str) -> Target:
        """Where requests for a model of Triton go."""
        return Target(self.form, self.url, self.path or path_of(self.form, model))


def main() -> None:
    """Start the server, measure all ways, print and write the table."""
    options = _parser().parse_args()
    options.label = options.label or options.checkpoint.name
    with tempfile.TemporaryDirectory() as folder:
        served = ServeOptions(
            _ROOT / "model_repository",
            str(options.checkpoint),
            device=options.device,
            settings=parse_settings(options.setting),
            models=("embed_image", "embed_text"),
            direct_grpc=False,
            direct_http=False,
            gateway_port=0 if options.workers is None else None,
            log_file=Path(folder) / "server.log",
        )
        with TritonServer(served) as server, _gateway(options, server, Path(folder)) as url:
            ways = [
                Way("triton", "triton_json", server.triton_urls["http"]),
                Way("door", "triton_json", server.http_url),
                Way("gateway", "openai", url),
            ]
            ways = [way for way in ways if way.name in options.ways or way.name == "triton"]
            ways += [
                Way(name, cast(JsonForm, form), url, int(pid), path)
                for name, form, url, path, pid in options.peer
            ]
            for batch in options.batch:
                for concurrency in options.concurrency:
                    _compare(options, ways, batch, concurrency)


def _compare(options: argparse.Namespace, ways: Sequence[Way], batch: int, concurrency: int) -> None:
    """Measure all ways with the same inputs and write their rows."""
    texts = synthetic_texts(options.pictures)
    given: Sequence[str] | Sequence[bytes] = texts if options.input == "text" else pictures(options)
    bodies = {way.name: _bodies(way.form, given, batch) for way in ways}
    model = "embed_text" if options.input == "text" else "embed_image"
    targets = {way.name: way.target(model) for way in ways}
    expected = {name: first_answers(targets[name], bodies[name]) for name in targets}
    reference = _transformers(options.checkpoint, texts) if options.input == "text" else None
    rounds: list[dict[str, Result]] = []
    for turn in range(options.rounds):
        found = {}
        for way in ways if turn % 2 else reversed(ways):
            load = Load(
                targets[way.name],
                bodies[way.name],
                concurrency,
                min(options.processes, concurrency),
                options.seconds,
                options.warmup,
                check=options.check,
                server_pid=way.pid or os.getpid(),
            )
            found[way.name] = run(load, expected[way.name])
        rounds.append(found)
    rows = []
    for way in ways:
        row = {
            **about(_PACKAGES, device_name(options.device_name) if options.device != "cpu" else None),
            "label": options.label,
            "input": options.input,
            "batch": str(batch),
            "concurrency": str(concurrency),
            "workers": str(options.workers or ""),
            **_measured(way, [found[way.name] for found in rounds], batch),
            **_ratios(way, rounds),
            **_fidelity(expected[way.name], expected["triton"], batch),
            "cosine_to_transformers": _closeness(expected[way.name], reference, batch),
        }
        _print(row)
        rows.append(row)
    if options.output:
        write_csv(options.output, rows, append=True)


def _measured(way: Way, results: Sequence[Result], batch: int) -> dict[str, str]:
    columns = [result.columns() for result in results]
    cpu = [_cpu(way, result, batch) for result in results]
    parts = {name: median(used.get(name, 0.0) for used in cpu) for name in (*_COLUMNS, "peer")}
    total = median(sum(used.values()) for used in cpu)
    return {
        "way": way.name,
        "form": way.form,
        "processes": str(results[0].load.processes),
        "seconds": f"{results[0].load.seconds:g}",
        "rounds": str(len(results)),
        "per_second": f"{batch * median(result.rate for result in results):.1f}",
        **{name: f"{median(float(c[name]) for c in columns):g}" for name in ("p50_ms", "p99_ms")},
        "server_cpu_ms": f"{total:.3f}",
        **{f"{name}_cpu_ms": f"{used:.3f}" for name, used in parts.items()},
        "client_cpu_ms": f"{median(float(column['client_cpu_ms']) for column in columns) / batch:.3f}",
        "busy_cores": f"{median(result.busy_cores for result in results):.2f}",
        "cores": str(os.cpu_count()),
        "memory_mb": str(_memory(way.pid or os.getpid())),
        "errors": str(sum(sum(result.statuses.values()) for result in results)),
        "checked": str(sum(result.checked for result in results)),
    }


def _cpu(way: Way, result: Result, batch: int) -> dict[str, float]:
    """Milliseconds of CPU time per input, by what the process is. This server's own parent is left out."""
    done = batch * result.completed or np.nan
    if way.pid is not None:
        return {"peer": 1000 * sum(result.server_cpu.values()) / done}
    used = dict.fromkeys(_COLUMNS, 0.0)
    for name, seconds in result.server_cpu.items():
        if name in _KINDS:
            used[_KINDS[name]] += 1000 * seconds / done
    return used


def _ratios(way: Way, rounds: Sequence[Mapping[str, Result]]) -> dict[str, str]:
    """The rate over Triton's in the same round: median, lowest and highest."""
    if way.name == "triton":
        return {"ratio": "", "lowest_ratio": "", "highest_ratio": ""}
    ratios = [found[way.name].rate / (found["triton"].rate or np.nan) for found in rounds]
    return {
        "ratio": f"{median(ratios):.3f}",
        "lowest_ratio": f"{min(ratios):.3f}",
        "highest_ratio": f"{max(ratios):.3f}",
    }


def _fidelity(found: NDArray[np.float32], triton: NDArray[np.float32], batch: int) -> dict[str, str]:
    """Differences from Triton's vectors. Vectors of peers, which have any length, are scaled first."""
    if found.shape != triton.shape:
        return {"largest_difference": "", "cosine_min": ""}
    rows, own = (vectors.reshape(len(vectors) * batch, -1) for vectors in (found, triton))
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled = rows if np.allclose(lengths, 1, atol=1e-3) else rows / lengths
    return {
        "largest_difference": f"{np.abs(scaled - own).max():.3g}",
        "cosine_min": f"{cosine(rows, own).min():.6f}",
    }


def _closeness(found: NDArray[np.float32], reference: NDArray[np.float32] | None, batch: int) -> str:
    """The smallest cosine of vectors to those of transformers, which are in the order of the inputs."""
    if reference is None:
        return ""
    rows = found.reshape(len(found), batch, -1)
    order = [[(first + n) % len(reference) for n in range(batch)] for first in range(len(rows))]
    return f"{cosine(rows, reference[order]).min():.6f}"


def _transformers(checkpoint: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors [N, D] of texts as transformers compute them, in float32 and padded to the full length."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint).eval()
    length = model.config.text_config.max_position_embeddings
    ids = tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found: NDArray[np.float32] = model.text_model(input_ids=ids).pooler_output.numpy()
    return found


def _bodies(form: JsonForm, given: Sequence[Any], batch: int) -> list[bytes]:
    """Requests of `batch` inputs. Each begins with another one."""
    count = len(given) if batch == 1 else min(len(given), _BODIES)
    chosen = [[given[(first + n) % len(given)] for n in range(batch)] for first in range(count)]
    make = text_request if isinstance(given[0], str) else image_request
    return [make(form, inputs) for inputs in chosen]


def _memory(root: int) -> int:
    """Proportional size in MB of a server. Of this process's descendants only those of the server count."""
    size = 0
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        try:
            if root != os.getpid() or _is_ours(process.cmdline()):
                size += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return round(size / 1e6)


def _is_ours(command: Sequence[str]) -> bool:
    return any(name in " ".join(command) for name in ("siglip_gateway", "tritonserver", "/model.py"))


@contextmanager
def _gateway(options: argparse.Namespace, server: TritonServer, folder: Path) -> Iterator[str]:
    """The gateway of the server, or `--workers` processes of one: its host:port."""
    if options.workers is None:
        yield f"127.0.0.1:{server.gateway_port}"
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    triton = server.grpc_url if options.through == "door" else server.triton_urls["grpc"]
    command = [sys.executable, "-m", "siglip_gateway", "--triton", triton, "--port", str(port)]
    command += ["--share-port", "--no-access-log", "--metrics-folder", str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(options.workers)]
    try:
        _wait_until_open(port, options.workers, processes)
        yield f"127.0.0.1:{port}"
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def _wait_until_open(port: int, workers: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for _ in range(600):
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a gateway ended during its start")
        listening = [
            connection
            for process in processes
            for connection in psutil.Process(process.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        if len(listening) >= workers:
            return
        time.sleep(0.1)
    raise RuntimeError("the gateway did not open")


def _print(row: Mapping[str, str]) -> None:
    cpu = " ".join(f"{name} {row[f'{name}_cpu_ms']}" for name in (*_COLUMNS, "peer", "client"))
    print(
        f"{row['label']} {row['input']} x{row['batch']} {row['concurrency']} in flight, {row['way']}: "
        f"{row['per_second']}/s, p50 {row['p50_ms']} p99 {row['p99_ms']} ms, ratio {row['ratio'] or '-'}, "
        f"errors {row['errors']}, checked {row['checked']}, difference {row['largest_difference']}, "
        f"to transformers {row['cosine_to_transformers'] or '-'}, "
        f"busy {row['busy_cores']}, {row['memory_mb']} MB\n    CPU ms: {cpu}",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="directory of the checkpoint that is served")
    add("--setting", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    add(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="of the server, default %(default)s"
    )
    add("--input", choices=["image", "text"], default="image", help="default %(default)s")
    add("--batch", type=int, nargs="+", default=[1], help="inputs per request, default 1")
    add("--ways", nargs="+", choices=["triton", "door", "gateway"], default=["triton", "gateway"])
    add("--rounds", type=int, default=3, help="each way once per round, default %(default)s")
    add("--workers", type=int, help="processes of a gateway of its own, instead of the server's")
    add("--through", choices=["door", "triton"], default="triton", help="gRPC port for --workers")
    add(
        "--peer",
        nargs=5,
        action="append",
        default=[],
        metavar=("NAME", "|".join(get_args(JsonForm)), "HOST:PORT", "PATH", "PID"),
        help="a running server of another project, and its process",
    )
    add_load_options(parser)
    parser.set_defaults(check=16, concurrency=[8])
    add("--device-name", help="in the table; default: this machine's GPUs, else its CPU")
    add("--label", default="", help="name of the checkpoint in the table")
    add("--output", type=Path, help="CSV file to append to")
    return parser


if __name__ == "__main__":
    main()

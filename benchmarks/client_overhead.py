"""Cost of the clients: the same pictures, as many in flight, by plain tritonclient and by ours, alternating.

    python -m benchmarks.client_overhead --output benchmarks/results/client_overhead.csv

Each round sends the pictures once in every way, in an order that changes from round to round. A row has the
median over the rounds, and the median of the ratio to the reference of the same round. The reference is plain
tritonclient in as many threads for the clients that wait, and `Client` in as many threads for `AsyncClient`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client import AsyncClient, Client
from tqdm import tqdm

from benchmarks.inputs import synthetic_jpeg
from benchmarks.records import about, cosine, write_csv
from benchmarks.servers import Running, run_ours

Embeddings: TypeAlias = NDArray[np.float32]
Way: TypeAlias = Callable[[Sequence[bytes], int], Embeddings]


def main() -> None:
    """Run the comparison and write the table."""
    options = _parser().parse_args()
    width, height = map(int, options.size.split("x"))
    pictures = [synthetic_jpeg(width, height, seed) for seed in range(16)]
    pictures = [pictures[number % 16] for number in range(options.requests)]
    rows = []
    with run_ours(options.checkpoint, options.device, {}, 600) as server:
        for concurrency in options.concurrency:
            rows += _compare(server, pictures, concurrency, options.rounds)
    constant = {"size": options.size, "requests": str(options.requests), "rounds": str(options.rounds)}
    named = about(("tritonclient", "grpcio", "aiohttp", "urllib3", "numpy"))
    write_csv(options.output, [{**row, **constant, **server.columns, **named} for row in rows])


def _compare(
    server: Running, pictures: Sequence[bytes], concurrency: int, rounds: int
) -> list[dict[str, str]]:
    ways = _ways(server)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = _raw_grpc(server.target.url, pictures[:16], concurrency)
    expected = np.concatenate([expected] * (len(pictures) // 16 + 1))[: len(pictures)]
    fidelity = dict.fromkeys(ways, 1.0)
    names = list(ways)
    for turn in tqdm(range(rounds + 1), desc=f"{concurrency} in flight", unit="round", disable=None):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            got = ways[name](pictures, concurrency)
            if turn:  # the first is to warm up
                seconds[name].append(time.perf_counter() - begin)
            fidelity[name] = min(fidelity[name], float(cosine(got, expected).min()))
    rows = []
    for name in names:
        reference = (
            "tritonclient" if not name.startswith("AsyncClient") else name.replace("AsyncClient", "Client")
        )
        reference = "tritonclient grpc" if reference == "tritonclient" else reference
        ratio = float(np.median(np.array(seconds[reference]) / np.array(seconds[name])))
        rate = len(pictures) / float(np.median(seconds[name]))
        print(
            f"{concurrency:4} in flight  {name:18} {rate:8.1f} images/s  {ratio:.3f} of {reference}",
            flush=True,
        )
        rows.append(
            {
                "client": name,
                "in_flight": str(concurrency),
                "images_per_second": f"{rate:.1f}",
                "reference": reference,
                "ratio": f"{ratio:.4f}",
                "least_cosine": f"{fidelity[name]:.6f}",
            }
        )
    return rows


def _ways(server: Running) -> dict[str, Way]:
    grpc, http = server.target.url, f"http://{server.http_url}"
    return {
        "tritonclient grpc": lambda pictures, n: _raw_grpc(grpc, pictures, n),
        "Client grpc": lambda pictures, n: _waiting(grpc, pictures, n),
        "AsyncClient grpc": lambda pictures, n: asyncio.run(_awaiting(grpc, pictures, n)),
        "Client http": lambda pictures, n: _waiting(http, pictures, n),
        "AsyncClient http": lambda pictures, n: asyncio.run(_awaiting(http, pictures, n)),
    }


def _raw_grpc(url: str, pictures: Sequence[bytes], concurrency: int) -> Embeddings:
    """Embeddings by tritonclient as its documentation shows it, a thread for each request in flight."""
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(url)

    def embed(picture: bytes) -> Any:
        tensor = triton.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[picture]], dtype=np.object_))
        return client.infer("embed_image", [tensor]).as_numpy("EMBEDDING")[0]

    with ThreadPoolExecutor(concurrency) as pool:
        found = np.stack(list(pool.map(embed, pictures)))
    client.close()
    return found


def _waiting(url: str, pictures: Sequence[bytes], concurrency: int) -> Embeddings:
    with Client(url, concurrency) as client:
        return _stack(list(client.embed_images(pictures)))


async def _awaiting(url: str, pictures: Sequence[bytes], concurrency: int) -> Embeddings:
    async with AsyncClient(url, concurrency) as client:
        return _stack([outcome async for outcome in client.embed_images(pictures)])


def _stack(outcomes: Sequence[Any]) -> Embeddings:
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return np.stack(outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/siglip-tiny"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 64], help="requests in flight")
    parser.add_argument("--size", default="64x128", help="of the JPEGs (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1024, help="pictures a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("build/bench/client_overhead.csv"))
    return parser


if __name__ == "__main__":
    main()

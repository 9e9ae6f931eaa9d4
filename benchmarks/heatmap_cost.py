"""Measure what heatmaps cost compared with a plain forward pass: time and peak memory of one image.

Weights are random. These ways are measured, each by the engine that serves:

    forward                  the embedding alone
    heatmaps                 all layers of CLIP, the last two blocks of SigLIP
    heatmaps, pooled tokens  SigLIP without blocks that are rolled back
    naive store              the parts that each head of each layer added from each token, [L, H, T, D], all
                             stored before any is used; for SigLIP only those of the pooling head, as the
                             store of one block would take [T, T, H, D]

Each round runs all ways one after the other, and a ratio compares two ways of the same round.

On a CPU the memory of a way is the largest resident size of its own process, weights included. On a GPU it is
the most memory that torch has allocated. For the backend `fused` no memory is given, since its recordings
hold all that they need from the start. `completeness` is the largest difference between maps + unattributed
and the cosine of the same pass.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.inputs import GEOMETRIES
from benchmarks.records import about, write_csv
from siglip_serve.checkpoint.model_config import ClipVisionConfig, ImageConfig, VisionConfig
from siglip_serve.engine.engines import VisionEngine
from siglip_serve.engine.passes import VisionRunner
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.runners import TorchVision
from siglip_serve.heatmaps.attribution import Explanation, SiglipExplainer, explainer_of
from siglip_serve.machine import available_cores
from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import AnyVisionTower
from siglip_serve.towers.siglip import VisionTower

__all__ = ["CLIP_GEOMETRIES", "main", "measure", "random_tower"]

CLIP_GEOMETRIES = {
    "CLIP ViT-L/14@224": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_size": 768,
    },
}
_ALL = [*CLIP_GEOMETRIES, *GEOMETRIES]
_FORWARD, _MAPS, _POOLED, _NAIVE = "forward", "heatmaps", "heatmaps, pooled tokens", "naive store"


@dataclass(frozen=True)
class Case:
    """One configuration to measure."""

    geometry: str
    device: str
    dtype: str
    prompts: int


Way = Callable[[], Explanation[Tensor] | None]


def random_tower(geometry: str) -> AnyVisionTower:
    """Make a tower with random weights of sensible sizes, float32, the same every time."""
    torch.manual_seed(0)
    tower: AnyVisionTower
    if geometry in CLIP_GEOMETRIES:
        tower = ClipVisionTower(
            ClipVisionConfig(
                **CLIP_GEOMETRIES[geometry],
                layer_norm_eps=1e-5,
                hidden_act="quick_gelu",
                projected=True,
            )
        )
    else:
        values = GEOMETRIES[geometry]
        tower = VisionTower(VisionConfig(**values, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"))
    for parameter in tower.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.1)
    return tower.eval().requires_grad_(False)


class _Subject:
    """A tower in its engine, one image, and P vectors of unit length."""

    def __init__(self, case: Case) -> None:
        tower = random_tower(case.geometry)
        config = tower.config
        image = ImageConfig(config.image_size, "bicubic", 1 / 255, (0.5,) * 3, (0.5,) * 3)
        rng = np.random.default_rng(0)
        side = config.image_size
        self.pixels = rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8)
        vectors = rng.normal(size=(case.prompts, config.embedding_size)).astype(np.float32)
        self.vectors = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        self.tower = tower
        # Explainers and projections are taken before the engine packs the weights.
        self.explainer = explainer_of(tower, 2, case.prompts)
        self.pooled = SiglipExplainer(tower, 2, most=0) if isinstance(tower, VisionTower) else None
        self.projections = [block.self_attn.out_proj for block in tower.encoder.blocks]
        if isinstance(tower, VisionTower):
            self.projections.append(tower.head.attention.out_proj)
        plain = case.device == "cpu" or isinstance(tower, ClipVisionTower)
        plan: dict[str, Any] = {"dtype": case.dtype, "backend": "torch" if plain else "auto"}
        torch.set_num_threads(available_cores())
        self.engine = VisionEngine(tower, image, Plan(case.device, threads=available_cores(), **plan))
        self.runner = cast("VisionRunner", self.engine.runner)

    def ways(self) -> dict[str, Way]:
        """Return the function of each way."""
        ways: dict[str, Way] = {_FORWARD: self._embed, _MAPS: lambda: self._explain(self.explainer)}
        if self.pooled:
            ways[_POOLED] = lambda: self._explain(self.pooled)
        if isinstance(self.runner, TorchVision):
            ways[_NAIVE] = self._store
        return ways

    def _embed(self) -> None:
        self.engine(self.pixels).rows(0, 1)

    def _explain(self, explainer: object) -> Explanation[Tensor]:
        found = self.runner.explain(explainer, self.pixels, self.vectors)
        return Explanation(found.maps.cpu(), found.unattributed.cpu(), found.embedding.cpu())

    @torch.inference_mode()
    def _store(self) -> None:
        pixels = cast("TorchVision", self.runner).normalize(self.pixels)
        vectors = self.vectors.to(pixels.device)
        if isinstance(self.tower, ClipVisionTower):
            _naive_clip(self.tower, self.projections, pixels, vectors).cpu()
        else:
            _naive_pool(self.tower, self.projections[-1], pixels, vectors).cpu()


def _naive_clip(
    tower: ClipVisionTower, projections: Sequence[nn.Linear], pixels: Tensor, vectors: Tensor
) -> Tensor:
    """Store every head's part from every token; [1, 3, S, S] -> maps [P, T]."""
    x, store = tower.embed(pixels), []
    for block, projection in zip(tower.encoder.blocks, projections, strict=True):
        x, trace = block.trace(x)
        q, k, v = trace.queries, trace.keys, trace.values
        weights = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[0, :, 0]  # [H, 1 + T]
        matrix = projection.weight.unflatten(1, (len(weights), -1))  # [D, H, D/H]
        store.append(torch.einsum("ht,hte,dhe->htd", weights, v[0], matrix))
    stored = torch.stack(store).float()  # [L, H, 1 + T, D]
    scale = (x[0, 0].float().var(correction=0) + tower.post_layernorm.eps).sqrt()
    stored = (stored - stored.mean(-1, keepdim=True)) / scale * tower.post_layernorm.weight.float()
    projected = tower.projection(stored.sum((0, 1)).to(x.dtype)).float()  # [1 + T, E]
    return (projected @ vectors.T / tower.head(x).float().norm()).T[:, 1:]


def _naive_pool(tower: VisionTower, projection: nn.Linear, pixels: Tensor, vectors: Tensor) -> Tensor:
    """Store what each head of the pooling took from each token, [H, T, D]; [1, 3, S, S] -> maps [P, T]."""
    tokens, attention = tower(pixels), tower.head.attention
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    heads = (attention.num_heads, -1)
    q = F.linear(tower.head.probe[0, 0], w_q, b_q).unflatten(0, heads)
    k = F.linear(tokens[0], w_k, b_k).unflatten(-1, heads)  # [T, H, D/H]
    v = F.linear(tokens[0], w_v, b_v).unflatten(-1, heads)
    weights = (torch.einsum("he,the->ht", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    matrix = projection.weight.unflatten(1, heads)
    store = torch.einsum("ht,the,dhe->htd", weights, v, matrix).float()  # [H, T, D]
    return vectors @ store.sum(0).T / tower.head(tokens).float().norm()


def _peak_on_cpu(case: Case, way: str, answers: Any) -> None:
    """Compute one image; put the largest resident MiB meanwhile, and the MiB before, into the queue."""
    run = _Subject(case).ways()[way]
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the largest size
    before = _resident("VmRSS")
    run()
    answers.put((_resident("VmHWM"), before))


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) / 1024


def _peak(case: Case, way: str, run: Way) -> tuple[float, float]:
    """Return the largest MiB of a way and the MiB before it; on a CPU it runs in its own process."""
    if case.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20, before
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_peak_on_cpu, args=(case, way, answers))
    process.start()
    peak, before = answers.get(timeout=600)
    process.join()
    return peak, before


def _completeness(found: Explanation[Tensor] | None, vectors: Tensor) -> str:
    if found is None:
        return ""
    cosine = F.normalize(found.embedding, dim=1) @ vectors.T
    return f"{float((found.maps.sum(-1) + found.unattributed - cosine).abs().max()):.1e}"


def measure(case: Case, rounds: int) -> Iterator[dict[str, str]]:
    """Measure a configuration; one row of the table per way."""
    subject = _Subject(case)
    ways = subject.ways()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found = {way: run() for way, run in ways.items()}
    for _ in tqdm(range(rounds), desc=case.geometry, unit="round", disable=None):
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - begin)
    peaks = {way: _peak(case, way, run) for way, run in ways.items()}
    told = subject.engine.plan.backend != "fused"
    for way in ways:
        ratios = [one / plain for one, plain in zip(seconds[way], seconds[_FORWARD], strict=True)]
        yield {
            **about(["torch", "numpy"], None if case.device == "cpu" else torch.cuda.get_device_name()),
            "geometry": case.geometry,
            "backend": subject.engine.plan.backend,
            "dtype": subject.engine.plan.dtype,
            "prompts": str(case.prompts),
            "way": way,
            "rounds": str(rounds),
            "milliseconds": f"{median(seconds[way]) * 1000:.2f}",
            "time_ratio": f"{median(ratios):.3f}",
            "peak_mib": f"{peaks[way][0]:.0f}" if told else "",
            "peak_ratio": f"{peaks[way][0] / peaks[_FORWARD][0]:.3f}" if told else "",
            "beyond_weights_mib": f"{peaks[way][0] - peaks[way][1]:.0f}" if told else "",
            "completeness": _completeness(found[way], subject.vectors),
        }


def main() -> None:
    """Measure, print, and append to a CSV if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=_ALL, nargs="+", default=_ALL, help="default: all")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda:0")
    parser.add_argument("--dtype", default="float32", help="default %(default)s")
    parser.add_argument("--prompts", type=int, default=5, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default %(default)s")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    for geometry in options.geometry:
        case = Case(geometry, options.device, options.dtype, options.prompts)
        for row in measure(case, options.rounds):
            print(" ".join(f"{value:>12}" for value in list(row.values())[-12:]), flush=True)
            if options.output:
                write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()

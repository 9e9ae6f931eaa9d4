"""The tables and figures of the pages: which rows of which CSV file, and how they are printed.

Where a file holds several runs of one thing, the last one counts, as in `benchmarks/plots.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.bulk_tables import BULK, BULK_FIGURES
from benchmarks.memory_tables import MEMORY, MEMORY_FIGURES
from benchmarks.peer_tables import PEERS
from benchmarks.scaled_tables import SCALED
from benchmarks.search_tables import SEARCH
from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table
from benchmarks.team_tables import JERSEY, TEAMS
from benchmarks.text_tables import TEXTS
from benchmarks.vector_tables import VECTORS

__all__ = ["FIGURES", "TABLES"]

_H100, _H200_X1, _EPYC = "NVIDIA H100 80GB HBM3", "NVIDIA H200 x1", "AMD EPYC"
_GEOMETRIES = {"base/16@224": "base/16@224", "so400m/14@384": "so400m/14@384"}
_BATCH = ("192", "56")  # rows of a full pass: of base/16@224 and of so400m/14@384

_TOWER = Source("vision_waterfall.csv", {"device": _H100})
_LEVERS = {
    "torch as it is": "plain torch (measured from main memory)",
    "fused QKV, torch's own attention": "one product for queries, keys and values, torch's attention",
    "cuDNN attention": "cuDNN's attention",
    "GELU in the product": "GELU inside the matrix product before it",
    "LayerNorm kernel, residual in the product": "one LayerNorm kernel, residual added by the product",
    "folded patch embedding and pooling query": "patch kernel, folded normalisation and pooling query",
    "CUDA graphs": "CUDA graphs",
    "attention kernel": "own attention kernel",
    "float8": "float8, if asked for",
}
_NAFLEX_TOWERS = {"naflex": "NaFlex", "square": "squares"}
_WAYS = {"torch as it is": "plain torch", "attention kernel": "`fused`", "float8": "`fused`, float8"}


_NAFLEX_KEYS = (
    Key("width", "width"),
    Key("tower", "tower", _NAFLEX_TOWERS),
    Key("backend", "backend"),
    Key("dtype", "dtype"),
    Key("pictures", "pictures"),
)


def _lever(geometry: str, rows: str) -> Column:
    cell = Cell("{device_images_per_second:,.0f}", {"geometry": geometry, "rows": rows})
    return Column(f"{geometry}, {rows} images", cell)


def _tower(heading: str, template: str, rows: str | tuple[str, ...]) -> Column:
    return Column(heading, Cell(template, {"rows": rows}))


def _attention(way: str, template: str = "{microseconds:.1f}", heading: str = "") -> Column:
    return Column(heading or f"{way}, µs", Cell(template, {"way": way}))


def _cpu(heading: str, template: str, way: str | tuple[str, ...], reduce: str = "last") -> Column:
    return Column(heading, Cell(template, {"way": way, "rows": "8"}, reduce))


def _load(heading: str, template: str) -> Column:
    return Column(heading, Cell(template, {}))


_SPEED: Mapping[str, Table | Summary] = {
    "summary": Summary(
        ("what", "device", "this project", "compared with", "ratio"),
        (
            (
                Source("peers.csv", {"device": _H200_X1, "concurrency": "256"}),
                (
                    "server, base/16@224",
                    "H200, 16 cores",
                    Cell("{per_second:,.0f} img/s", {"server": "ours"}),
                    Cell("transformers behind FastAPI: {per_second:,.0f} img/s", {"server": "fastapi"}),
                    Cell("{ratio:.2f}", {"server": "fastapi"}),
                ),
            ),
            (
                Source("peers.csv", {"device": _EPYC, "concurrency": "8"}),
                (
                    "server, base/16@224",
                    "2 CPU cores",
                    Cell("{per_second:.1f} img/s", {"server": "ours"}),
                    Cell("transformers behind FastAPI: {per_second:.1f} img/s", {"server": "fastapi"}),
                    Cell("{ratio:.2f}", {"server": "fastapi"}),
                ),
            ),
            (
                Source("vision_waterfall.csv", {"device": _H100, "geometry": "base/16@224", "rows": "192"}),
                (
                    "image tower, base/16@224, bfloat16",
                    "H100",
                    Cell("{images_per_second:,.0f} img/s", {"step": "attention kernel"}),
                    Cell("plain torch: {images_per_second:,.0f} img/s", {"step": "torch as it is"}),
                    Cell(
                        "{images_per_second:.2f}",
                        {"step": "attention kernel"},
                        over={"step": "torch as it is"},
                    ),
                ),
            ),
            (
                Source("cpu_engine.csv", {"device": _EPYC, "rows": "8"}),
                (
                    "image tower, base/16@224, int8",
                    "2 CPU cores",
                    Cell("{images_per_second:.1f} img/s", {"way": "openvino int8"}),
                    Cell(
                        "transformers in bfloat16: {images_per_second:.1f} img/s",
                        {"way": "transformers bfloat16"},
                    ),
                    Cell("{ratio_to_fastest_transformers:.2f}", {"way": "openvino int8"}),
                ),
            ),
            (
                Source("preprocess.csv", {"device": _EPYC, "case": "500x375"}),
                (
                    "JPEG of 500x375 to pixels",
                    "1 CPU core",
                    Cell("{ms_per_image:.2f} ms", {"mode": "fast"}),
                    Cell("Pillow: {ms_per_image:.2f} ms", {"mode": "pil"}),
                    Cell("{ratio:.2f}", {"mode": "fast"}),
                ),
            ),
        ),
    ),
    "levers": Table(
        _TOWER,
        (Key("lever", "step", {name: text for name, text in _LEVERS.items() if name != "torch as it is"}),),
        (_lever("base/16@224", "192"), _lever("so400m/14@384", "56")),
    ),
    "gpu-tower": Table(
        _TOWER,
        (Key("geometry", "geometry", _GEOMETRIES), Key("backend", "step", _WAYS)),
        (
            _tower("full pass, img/s", "{images_per_second:,.0f}", _BATCH),
            _tower("on the device", "{device_images_per_second:,.0f}", _BATCH),
            _tower("1 image, ms", "{milliseconds:.2f}", "1"),
            _tower("on the device", "{device_milliseconds:.2f}", "1"),
            _tower("smallest cosine", "{cosine_min:.5f}", _BATCH),
            _tower("start, s", "{start_seconds:.1f}", _BATCH),
        ),
    ),
    "attention": Table(
        Source("attention.csv", {"device": "NVIDIA H200"}),
        (Key("geometry", "geometry"), Key("images", "rows")),
        (
            _attention("flash"),
            _attention("cuDNN"),
            _attention("ours"),
            _attention("ours", "{ratio_to_cudnn:.2f}", "ours against cuDNN"),
        ),
    ),
    "cpu-tower": Table(
        Source("cpu_engine.csv", {"device": _EPYC}),
        (Key("backend and dtype", "way"),),
        (
            Column("8 images, img/s", Cell("{images_per_second:.2f}", {"rows": "8"})),
            Column("ratio", Cell("{ratio_to_fastest_transformers:.2f}", {"rows": "8"})),
            Column("smallest cosine", Cell("{cosine_min:.5f}", {"rows": "8"})),
            Column("1 image, img/s", Cell("{images_per_second:.2f}", {"rows": "1"})),
        ),
    ),
    "naflex": Table(
        Source("naflex.csv", {"device": _EPYC}),
        _NAFLEX_KEYS,
        (
            Column("padding", Cell("{padding:.3f}", {})),
            Column("img/s", Cell("{images_per_second:.2f}", {})),
            Column("CPU ms per image", Cell("{cpu_ms_per_image:.1f}", {})),
        ),
    ),
    "naflex-gpu": Table(
        Source("naflex.csv", {"device": "NVIDIA H200", "largest_aspect": "8.0"}),
        (
            Key("tower", "tower", _NAFLEX_TOWERS),
            Key("backend", "backend", {"fused": "fused", "torch": "torch"}),
            Key("dtype", "dtype"),
        ),
        (
            Column("padding", Cell("{padding:.3f}", {})),
            Column("img/s", Cell("{images_per_second:,.0f}", {})),
            Column(
                "smallest cosine with float32",
                Cell("{cosine_min:.6f}", {"dtype": ("bfloat16", "float16", "float8")}),
            ),
        ),
    ),
    "naflex-fidelity": Table(
        Source("naflex.csv", {"device": _EPYC, "tower": "naflex", "backend": ("openvino", "torch")}),
        _NAFLEX_KEYS,
        (
            Column("to transformers", Cell("{difference:.1e}", {})),
            Column("unit vectors", Cell("{unit_difference:.1e}", {})),
            Column("to one by one", Cell("{difference_one_by_one:.1e}", {})),
            Column("smallest cosine", Cell("{cosine_min:.7f}", {})),
        ),
    ),
    "cpu-processors": Table(
        Source("cpu_engine.csv", {"rows": "8"}),
        (Key("processor", "device"), Key("cores", "cores")),
        (
            _cpu("transformers float32", "{images_per_second:.2f}", "transformers float32"),
            _cpu("transformers bfloat16", "{images_per_second:.2f}", "transformers bfloat16"),
            _cpu("OpenVINO float32", "{images_per_second:.2f}", "openvino float32"),
            _cpu("OpenVINO bfloat16", "{images_per_second:.2f}", "openvino bfloat16"),
            _cpu("OpenVINO int8", "{images_per_second:.2f}", "openvino int8"),
            _cpu(
                "best ratio without int8",
                "{ratio_to_fastest_transformers:.2f}",
                ("openvino float32", "openvino bfloat16"),
                "largest",
            ),
        ),
    ),
    "cpu-serving": Table(
        Source("cpu_serving.csv", {}),
        (Key("dtype", "dtype"),),
        (
            Column("engine alone, img/s", Cell("{in_process_images_per_second:.2f}", {})),
            Column("through Triton, img/s", Cell("{through_triton_images_per_second:.2f}", {})),
            Column("ratio", Cell("{ratio:.3f}", {})),
            Column("smallest to largest", Cell("{ratio_min:.3f} to {ratio_max:.3f}", {})),
            Column("ratio with decoding", Cell("{ratio_with_decoding:.3f}", {})),
        ),
    ),
    "cpu-accuracy": Table(
        Source("cpu_accuracy.csv", {"device": "AMD EPYC, AVX2 alone"}),
        (Key("dtype", "dtype"),),
        (
            Column("top-1", Cell("{top1:.4f}", {})),
            Column("mean cosine to float32", Cell("{cosine_mean:.4f}", {})),
            Column("smallest cosine", Cell("{cosine_min:.4f}", {})),
        ),
    ),
    "serve-load": Table(
        Source(
            "serve_load.csv",
            {"client": "grpc", "device": (f"{_H100} x1", _EPYC)},
        ),
        (
            Key("device", "device", {f"{_H100} x1": "H100, 16 cores", _EPYC: "2 CPU cores"}),
            Key(
                "checkpoint",
                "label",
                {
                    "base": "base/16@224",
                    "base, preprocess gpu": "base/16@224, decoded by the GPU",
                    "so400m": "so400m/14@384",
                    "so400m, float8": "so400m/14@384, float8",
                    "siglip-tiny": "siglip-tiny",
                },
            ),
            Key("in flight", "concurrency"),
        ),
        (
            _load("img/s", "{images_per_second:,.1f}"),
            _load("p50, ms", "{p50_ms:.2f}"),
            _load("p99, ms", "{p99_ms:.2f}"),
            _load("errors", "{errors:.0f}"),
            _load("busy cores", "{busy_cores:.1f}"),
            _load("server's CPU per image, ms", "{server_cpu_ms:.2f}"),
        ),
    ),
    "gpu-sizes": Table(
        Source("serve_load.csv", {"device": _H200_X1, "label": "base, preprocess gpu"}),
        (
            Key("JPEG", "size"),
            Key("in flight", "concurrency", {number: number for number in ("192", "256", "768")}),
        ),
        (
            _load("img/s", "{images_per_second:,.0f}"),
            _load("p50, ms", "{p50_ms:.0f}"),
            _load("p99, ms", "{p99_ms:.0f}"),
            _load("errors", "{errors:.0f}"),
            _load("busy cores", "{busy_cores:.1f}"),
        ),
    ),
    "peers": Table(
        Source("peers.csv", {"size": "500x375", "asked_dtype": "bfloat16"}),
        (
            Key("device", "device", {_H200_X1: "H200, 16 cores", _EPYC: "2 CPU cores"}),
            Key("in flight", "concurrency"),
        ),
        (
            Column("FastAPI, img/s", Cell("{per_second:,.1f}", {"server": "fastapi"})),
            Column("FastAPI, p50 ms", Cell("{p50_ms:.1f}", {"server": "fastapi"})),
            Column("this server, img/s", Cell("{per_second:,.1f}", {"server": "ours"})),
            Column("this server, p50 ms", Cell("{p50_ms:.1f}", {"server": "ours"})),
            Column("ratio", Cell("{ratio:.2f}", {"server": "fastapi"})),
            Column("smallest cosine", Cell("{cosine_min:.5f}", {"server": "ours"})),
        ),
    ),
    "preprocess": Table(
        Source("preprocess.csv", {}),
        (
            Key("JPEG", "case", {name: name for name in ("64x128", "500x375", "1080p", "12 MP")}),
            Key("kB", "kilobytes"),
        ),
        (
            Column("`pil`, ms", Cell("{ms_per_image:.3f}", {"mode": "pil"})),
            Column("`fast`, ms", Cell("{ms_per_image:.3f}", {"mode": "fast"})),
            Column("ratio", Cell("{ratio:.2f}", {"mode": "fast"})),
            Column("largest difference", Cell("{max_abs_diff:.0f}", {"mode": "fast"})),
            Column("mean difference", Cell("{mean_abs_diff:.4f}", {"mode": "fast"})),
        ),
    ),
    "decode-bombs": Table(
        Source("decode_bombs.csv", {}),
        (Key("format", "format"), Key("files", "files"), Key("refused for their cost", "cost_refused")),
        (
            Column("most CPU time, s", Cell("{max_cpu_seconds:.2f}", {})),
            Column("bytes of that file", Cell("{worst_bytes:,.0f}", {})),
            Column("most memory, MB", Cell("{max_megabytes:.0f}", {})),
        ),
    ),
    "gpu-jpeg": Table(
        Source("gpu_jpeg.csv", {}),
        (Key("processes", "processes"), Key("files read", "answers")),
        (
            Column("wrong", Cell("{wrong:.0f}", {})),
            Column("largest difference", Cell("{most:.0f}", {})),
            Column("mean difference", Cell("{mean:.4f}", {})),
        ),
    ),
}

_CLIENTS: Mapping[str, Table | Summary] = {
    "client-overhead": Table(
        Source("client_overhead.csv", {}),
        (Key("in flight", "in_flight"),),
        tuple(
            Column(heading, Cell("{images_per_second:,.0f}", {"client": client}))
            for client, heading in (
                ("tritonclient grpc", "tritonclient, gRPC, one thread per request"),
                ("Client grpc", "`Client`, gRPC"),
                ("AsyncClient grpc", "`AsyncClient`, gRPC"),
                ("Client http", "`Client`, HTTP"),
                ("AsyncClient http", "`AsyncClient`, HTTP"),
            )
        ),
    ),
    "locust": Table(
        Source("locust.csv", {}),
        (
            Key(
                "client",
                "client",
                {
                    "serve_load grpc": "`serve_load`, gRPC",
                    "locust grpc": "`siglip-serve bench`, gRPC",
                    "serve_load triton_http": "`serve_load`, HTTP",
                    "locust http": "`siglip-serve bench`, HTTP",
                },
            ),
            Key("in flight", "concurrency"),
        ),
        (
            Column("requests/s", Cell("{images_per_second:.1f}", {}, "median")),
            Column("p50, ms", Cell("{p50_ms:.2f}", {}, "median")),
            Column("client's CPU per request, ms", Cell("{client_cpu_ms:.2f}", {}, "median")),
        ),
    ),
}


def _method(heading: str, template: str) -> Column:
    return Column(heading, Cell(template, {}))


_QUALITY: Mapping[str, Table | Summary] = {
    "parity": Table(
        Source("full_width_parity.csv", {}),
        (Key("geometry", "geometry"),),
        (
            Column("image tokens", Cell("{vision_last_hidden_state:.1e}", {})),
            Column("image embedding", Cell("{vision_pooler_output:.1e}", {})),
            Column("text tokens", Cell("{text_last_hidden_state:.1e}", {})),
            Column("text embedding", Cell("{text_pooler_output:.1e}", {})),
        ),
    ),
    "heatmaps": Table(
        Source("heatmaps.csv", {"prompts": ("scene", "")}),
        (
            Key(
                "method",
                "method",
                {
                    "ours": "`explain_image`",
                    "LeGrad, pooler": "LeGrad, pooling head",
                    "LeGrad, blocks": "LeGrad, blocks",
                    "dense": "dense cosines",
                    "occlusion": "occlusion, 64 passes",
                    "pool attention": "attention of the pooling head",
                    "ours, untrained": "`explain_image`, random weights",
                    "random": "noise",
                },
            ),
            Key("blocks", "blocks", {"0": "0", "1": "1", "2": "2", "4": "4", "9": "9", "": ""}),
        ),
        (
            _method("average precision", "{ap:.3f}"),
            _method("95 % interval", "{ap_low:.3f} to {ap_high:.3f}"),
            _method("pointing game", "{pointing:.3f}"),
            _method("mean IoU", "{iou:.3f}"),
            _method("contrast", "{contrast:.3f}"),
            _method("deletion", "{deletion:.3f}"),
            _method("insertion", "{insertion:.3f}"),
        ),
    ),
    "heatmap-cost": Table(
        Source("heatmap_cost.csv", {"geometry": ("CLIP ViT-L/14@224", "so400m/14@384", "base/16@224")}),
        (
            Key("device", "device", {_H100: "H100", _EPYC: "2 CPU cores"}),
            Key("geometry", "geometry"),
            Key("backend", "backend"),
            Key("dtype", "dtype"),
        ),
        (
            Column("embedding, ms", Cell("{milliseconds:,.1f}", {"way": "forward"})),
            Column("heatmaps, ms", Cell("{milliseconds:,.1f}", {"way": "heatmaps"})),
            Column("ratio", Cell("{time_ratio:.2f}", {"way": "heatmaps"})),
            Column("memory, ratio", Cell("{peak_ratio:.2f}", {"way": "heatmaps"})),
            Column("naive store, ratio", Cell("{time_ratio:.2f}", {"way": "naive store"})),
            Column("its memory", Cell("{peak_ratio:.2f}", {"way": "naive store"})),
            Column("0 blocks, ratio", Cell("{time_ratio:.2f}", {"way": "heatmaps, pooled tokens"})),
        ),
    ),
    "heatmap-latency": Table(
        Source("heatmap_latency.csv", {}),
        (Key("request", "way"),),
        (
            Column("p50, ms", Cell("{p50_ms:.1f}", {})),
            Column("p95, ms", Cell("{p95_ms:.1f}", {})),
            Column("image tower, ms", Cell("{siglip_vision_model_ms:.1f}", {})),
            Column("maps, ms", Cell("{explain_maps_ms:.1f}", {})),
            Column("overlays, ms", Cell("{explain_overlays_ms:.1f}", {})),
        ),
    ),
}

TABLES: Mapping[str, Table | Summary] = {
    **_SPEED,
    **_CLIENTS,
    **_QUALITY,
    **VECTORS,
    **SEARCH,
    **BULK,
    **SCALED,
    **PEERS,
    **MEMORY,
    **TEAMS,
    **TEXTS,
}

FIGURES: Mapping[str, tuple[Source, Cell]] = {
    **BULK_FIGURES,
    **MEMORY_FIGURES,
    "peer-gpu": (
        Source("peers.csv", {"device": _H200_X1, "concurrency": "256", "server": "fastapi"}),
        Cell("{ratio:.1f}", {}),
    ),
    "peer-cpu": (
        Source("peers.csv", {"device": _EPYC, "concurrency": "8", "server": "fastapi"}),
        Cell("{ratio:.1f}", {}),
    ),
    "football-held-out": (
        Source("football.csv", {"way": "3 frames", "matches": "all"}),
        Cell("{held_out:.3f}", {}),
    ),
    "teams-hardest": (
        Source("teams.csv", {"way": "ours", "checkpoint": JERSEY, "tier": "T5"}),
        Cell("{tracks:.2f}", {}, "mean"),
    ),
    "teams-hardest-recipe": (
        Source("teams.csv", {"way": "recipe", "checkpoint": JERSEY, "tier": "T5"}),
        Cell("{tracks:.2f}", {}, "mean"),
    ),
}

"""The direction of dependencies: a module may import only from the layers before its own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "siglip_serve"

LAYERS = [
    {"errors", "config", "turns", "batches"},
    {"checkpoint"},
    {"jpeg", "resize", "preprocess", "tokenizer", "team_state", "trimmed_kmeans", "weights"},
    {"siglip", "clip", "towers", "pooling", "jersey"},
    {"heatmap", "heatmap_image", "saliency", "zero_shot", "clustering"},
    {"engine"},
    {"_jpeg_kernel", "_nvjpeg", "gpu_jpeg", "knn", "localization", "metrics"},
    {"telemetry"},
    {"serving"},
    {"handlers", "image_handlers"},
    {"team_handlers", "explain_handlers"},
    {"_staging", "_watcher"},
    {"launcher"},
    {"serve_command"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}


def imported(file: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == package:
                found |= {name.name for name in node.names}
            elif node.module.startswith(f"{package}."):
                found.add(node.module.removeprefix(f"{package}."))
    return found


def test_dependencies_point_one_way() -> None:
    files = [file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py"]
    names = [file.relative_to(SOURCE).parts[0].removesuffix(".py") for file in files]
    assert set(names) == set(RANK)
    for name, file in zip(names, files, strict=True):
        for module in imported(file, "siglip_serve"):
            assert RANK[module.partition(".")[0]] <= RANK[name], (file, module)


def test_clients_and_validation_know_the_server_only_by_wire() -> None:
    evaluation = {"errors", "knn", "localization", "metrics", "pooling", "zero_shot"}
    for file in (ROOT / "validate").glob("*.py"):
        assert imported(file, "siglip_serve") <= evaluation, file
    for file in (ROOT / "clients").rglob("*.py"):
        assert imported(file, "siglip_serve") <= {"serve_command"}, file


def test_light_modules_do_not_import_torch() -> None:
    modules = ["config", "checkpoint", "preprocess", "tokenizer", "launcher", "serve_command"]
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    names = [f"siglip_serve.{module}" for module in modules] + ["siglip_serve_client.commands.main"]
    subprocess.run([sys.executable, "-c", code, *names], check=True)


def test_no_size_of_a_checkpoint_is_typed_in_code() -> None:
    repository = ROOT / "model_repository"
    for file in [*SOURCE.rglob("*.py"), *repository.rglob("*.py"), *repository.rglob("*.pbtxt")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not re.search(r"(?<![\w.])(224|384|768|1152)(?![\w.])", line), f"{file}:{number}"


def test_models_are_thin() -> None:
    for file in (ROOT / "model_repository").glob("*/1/model.py"):
        assert len(file.read_text().splitlines()) <= 40, file

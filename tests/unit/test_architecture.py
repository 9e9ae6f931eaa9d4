"""The rooms of the house: which may import which, what each may know, how large a file may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import MODELS, ROOT

SOURCE = ROOT / "src" / "siglip_serve"
CLIENT = ROOT / "clients" / "siglip_serve_client"
GATEWAY = ROOT / "src" / "siglip_gateway"

# A room imports only from rooms of a lower floor, and from itself.
FLOORS = [
    {"errors"},
    {"config", "machine"},
    {"checkpoint"},
    {"images", "texts", "towers", "embeddings"},
    {"heatmaps", "teams"},
    {"engine"},
    {"serving", "launcher", "bulk"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Models whose prefix is not the name of their file in serving/.
PROGRAMS = ("locustfile.py", "perf_data.py")
# The launcher starts them as programs of their own.
DOORS, GATEWAY_PROGRAM = GATEWAY / "doors" / "__main__.py", GATEWAY / "__main__.py"
# Modules that the client's command may import, when it runs: its client alone needs none of them.
COMMANDS = {
    "siglip_serve.launcher.command",
    "siglip_serve.bulk.command",
    "siglip_serve.bulk.query",
    "siglip_serve.errors",
}
EXCEPTIONS = {"siglip_base_model": "siglip_vision.SiglipVisionModel", "jersey_process": "team.JerseyProcess"}


def modules(folder: Path) -> dict[str, Path]:
    """Each module below `folder` by its dotted name."""
    found = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules among `known` that a file imports, those for type checkers included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known:
                    yield name
                elif node.module in known:
                    yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def room(module: str) -> str:
    """The first name below the package: `siglip_serve.engine.plan` lies in `engine`."""
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in modules(SOURCE)} - {""}
    assert rooms == set(FLOOR)
    assert len([file for file in SOURCE.glob("*.py") if file.name != "__init__.py"]) <= 5


def test_rooms_import_only_from_lower_floors() -> None:
    known = modules(SOURCE)
    for module, file in known.items():
        for other in imports(file, known):
            own, theirs = room(module), room(other)
            if theirs not in (own, ""):
                assert FLOOR[theirs] < FLOOR[own], f"{module} imports {other}"


@pytest.mark.parametrize("package", [SOURCE, CLIENT, GATEWAY], ids=lambda folder: folder.name)
def test_modules_do_not_import_each_other_in_a_circle(package: Path) -> None:
    known = modules(package)
    graph = {module: set(imports(file, known)) - {module} for module, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_serving_knows_triton() -> None:
    for module, file in modules(SOURCE).items():
        if room(module) != "serving":
            assert "pb_utils" not in file.read_text(encoding="utf-8"), module


def test_importing_the_launcher_and_light_modules_loads_no_torch() -> None:
    light = ["config", "machine", "checkpoint.config", "checkpoint.files", "checkpoint.scale"]
    light += ["images.preprocess", "texts.tokenizer"]
    light += ["engine", "engine.plan", "engine.buckets", "engine.turns"]
    light += ["engine.engines", "engine.openvino.runners", "bulk.query"]
    light += ["launcher", "launcher.command"]
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    names = [f"siglip_serve.{module}" for module in light] + ["siglip_serve_client.commands.main"]
    subprocess.run([sys.executable, "-c", code, *names], check=True)


def test_clients_and_validation_know_the_server_only_by_wire() -> None:
    known = modules(SOURCE)
    for file in (ROOT / "validate").rglob("*.py"):
        rooms = {room(module) for module in imports(file, known)}
        assert rooms <= {"errors", "embeddings"}, file
    for file in (ROOT / "clients").rglob("*.py"):
        assert set(imports(file, known)) <= COMMANDS, file


def test_the_gateway_stands_on_the_client_alone() -> None:
    for file in GATEWAY.rglob("*.py"):
        assert not set(imports(file, modules(SOURCE))), file
    for file in SOURCE.rglob("*.py"):
        assert not set(imports(file, modules(GATEWAY))), file
    for file in CLIENT.rglob("*.py"):  # the command `siglip-serve gateway` starts it
        assert set(imports(file, modules(GATEWAY))) <= {"siglip_gateway.command"}, file
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "sys.exit(bool({'siglip_serve', 'torch', 'numpy'} & sys.modules.keys()))"
    )
    doors = [module for module in modules(GATEWAY) if module.startswith("siglip_gateway.doors")]
    subprocess.run([sys.executable, "-c", code, *doors], check=True)
    code = code.replace(", 'numpy'", "")
    subprocess.run([sys.executable, "-c", code, *modules(GATEWAY).keys() - set(doors)], check=True)


def test_every_module_is_reached_from_a_model_the_launcher_or_a_command() -> None:
    known = modules(SOURCE) | modules(CLIENT) | modules(GATEWAY)
    scripts = (
        CLIENT / "commands" / "bench"
    )  # started as programs of their own, by locust and perf_analyzer.sh
    left = [*MODELS.glob("*/1/model.py"), ROOT / "pyproject.toml", *map(scripts.joinpath, PROGRAMS), DOORS]
    left.append(GATEWAY_PROGRAM)
    reached: set[str] = set()
    while left:
        file = left.pop()
        found = set(imports(file, known)) if file.suffix == ".py" else _entry_points(known)
        # Importing a module runs the packages around it.
        found |= {module for name in found for module in known if name.startswith(f"{module}.")}
        left += [known[module] for module in found - reached]
        reached |= found
    programs = {f"{CLIENT.name}.commands.bench.{name.removesuffix('.py')}" for name in PROGRAMS}
    assert known.keys() - reached == programs | {
        "siglip_gateway.__main__",
        "siglip_gateway.doors.__main__",
    }


def _entry_points(known: Mapping[str, Path]) -> set[str]:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return {target.partition(":")[0] for target in scripts.values()} & known.keys()


def test_each_model_is_the_class_of_its_name() -> None:
    for file in sorted(MODELS.glob("*/1/model.py")):
        model, text = file.parts[-3], file.read_text(encoding="utf-8")
        prefix = next(
            (stem for stem in sorted(_serving(), key=len, reverse=True) if model.startswith(stem)), ""
        )
        own = "".join(word.capitalize() for word in model.split("_"))
        module, _, name = EXCEPTIONS.get(model, f"{prefix}.{own}").rpartition(".")
        assert f"from siglip_serve.serving.{module} import {name}" in text, file
        assert len(text.splitlines()) <= 40, file


def _serving() -> set[str]:
    return {file.stem for file in (SOURCE / "serving").glob("*.py")}


def test_files_stay_readable() -> None:
    for folder in ("src", "clients", "validate", "benchmarks", "training", "tests", "docker"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 500, file
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    body = node.body[0].lineno, node.end_lineno or node.lineno
                    assert body[1] - body[0] < 50, f"{file}:{node.lineno} {node.name}"


def test_no_size_of_a_checkpoint_is_typed_in_code() -> None:
    for file in [*SOURCE.rglob("*.py"), *MODELS.rglob("*.py"), *MODELS.rglob("*.pbtxt")]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.search(r"(?<![\w.])(224|384|768|1152)(?![\w.])", line), f"{file}:{number}"

"""docker/: checks that need no Docker engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml
from gateways import gateway_process
from programs import free_port, program
from wire import JERSEY, ROOT, TINY

from siglip_gateway.command import _parser as gateway_parser
from siglip_serve.launcher import ServeOptions
from siglip_serve.launcher.command import _parser

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
ENVIRONMENT_FILE = (DOCKER / ".env.example").read_text(encoding="utf-8")
COMPOSE_FILE = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::([-?])([^}]*))?\}")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, with continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in filter(None, joined.splitlines()):
        name, _, arguments = line.partition(" ")
        found.append((name, arguments))
    return found


def arguments_of(name: str) -> list[str]:
    return [arguments for found, arguments in instructions() if found == name]


def sources() -> Iterator[str]:
    for arguments in arguments_of("COPY"):
        yield from (word for word in arguments.split()[:-1] if not word.startswith("--"))


def reaches_the_build(path: str) -> bool:
    """Tell if .dockerignore keeps a path. The last pattern that matches it or a folder above it decides."""
    kept = True
    parts = Path(path).parts
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split():
        pattern = line.removeprefix("!").removeprefix("**/")
        candidates = parts if line.startswith("**/") else above
        if any(fnmatch(one, pattern) for one in candidates):
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize("name", ["Dockerfile", "bulk.Dockerfile"])
def test_hadolint_accepts_the_dockerfiles(name: str) -> None:
    done = run(program("hadolint"), "--failure-threshold", "style", DOCKER / name)
    assert done.returncode == 0, done.stdout


def test_the_image_is_run_by_a_plain_user_and_checked_by_inference() -> None:
    assert arguments_of("USER")[-1] == "10001:10001"
    assert arguments_of("ENTRYPOINT") == ['["siglip-serve", "serve", "--host", "0.0.0.0"]']
    assert arguments_of("HEALTHCHECK")[0].endswith('CMD ["siglip-serve", "health"]')
    assert not arguments_of("ADD")
    assert "latest" not in DOCKERFILE
    assert all("rm -rf /var/lib/apt/lists/*" in one for one in arguments_of("RUN") if "apt-get" in one)


def test_the_base_is_a_recent_triton_without_a_registry() -> None:
    (argument,) = (one for one in arguments_of("ARG") if one.startswith("TRITON_IMAGE"))
    match = re.fullmatch(r"TRITON_IMAGE=tritonserver:(\d\d)\.(\d\d)-py3", argument)
    assert match
    assert (int(match[1]), int(match[2])) >= (26, 11)
    assert arguments_of("FROM") == ["${TRITON_IMAGE}"]
    for file in [DOCKERFILE, COMPOSE_FILE, ENVIRONMENT_FILE]:
        assert not re.search(r"\b[a-z0-9-]+\.(io|com|org|dev)\b", file)


def test_copied_files_exist_and_are_not_ignored() -> None:
    copied = list(sources())
    assert {"model_repository", "checkpoints", "src", "clients"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert reaches_the_build(path), path
    for path in (".git", "data", "docker/.env", "docker/front/secrets/keys", "src/siglip_serve/__pycache__"):
        assert not reaches_the_build(path), path


def test_the_image_holds_what_kubernetes_expects() -> None:
    text = (ROOT / "deployments/kubernetes/base/deployment.yaml").read_text(encoding="utf-8")
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (account,) = (one for one in arguments_of("RUN") if "useradd" in one)
    assert (
        f"--uid {pod['securityContext']['runAsUser']} --gid {pod['securityContext']['runAsGroup']} "
        in account
    )
    assert "--home-dir /home/siglip" in account
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/home/siglip", "/cache", "/tmp"}
    values = {one["name"]: one["value"] for one in container["env"]}
    (environment,) = arguments_of("ENV")
    assert f"HF_HOME={values['HF_HOME']} " in environment
    assert f"SIGLIP_SERVE_TEAMS_CHECKPOINT={values['SIGLIP_SERVE_TEAMS_CHECKPOINT']}" in environment
    gateway_text = (ROOT / "deployments/kubernetes/base/gateway.yaml").read_text(encoding="utf-8")
    (gateway,) = next(yaml.safe_load_all(gateway_text))["spec"]["template"]["spec"]["containers"]
    exposed = {str(port["containerPort"]) for one in (container, gateway) for port in one["ports"]}
    assert set(arguments_of("EXPOSE")[0].split()) == exposed


def test_image_installs_the_server_without_triton() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert "siglip-serve[embedded,runtime]" in extras["server"]
    (line,) = re.findall(r"requirements\.py.*> ", (DOCKER / "install.sh").read_text(encoding="utf-8"))
    assert '"$path" runtime gateway >' in line
    printed = run(
        sys.executable, DOCKER / "requirements.py", ROOT / "pyproject.toml", "runtime", "gateway"
    ).stdout
    names = {re.split(r"[><=\[]", line)[0] for line in printed.splitlines()}
    assert {"torch", "openvino", "tritonclient", "numpy", "protobuf", "fastapi", "uvicorn", "orjson"} <= names
    assert "nvidia-pytriton" not in names
    assert "<2" not in next(line for line in printed.splitlines() if line.startswith("numpy"))


def test_image_holds_the_weights_of_a_hub_checkpoint(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache/hub/models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit, encoding="ascii")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / commit).symlink_to(TINY)
    bake: list[str | Path] = [sys.executable, DOCKER / "bake.py", "owner/name", tmp_path / "checkpoints"]
    variables = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run(*bake, **variables, PYTHONPATH=f"{ROOT}/src")
    assert done.returncode == 0, done.stderr
    baked = tmp_path / "checkpoints/owner/name"
    assert not baked.is_symlink()
    for file in ("config.json", "model.safetensors"):
        assert (baked / file).read_bytes() == (TINY / file).read_bytes()


def interpolated(**given: str) -> dict[str, Any]:
    """Parse compose.yaml as Compose does with these variables."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if kind == "?" and name not in given:
            raise KeyError(name)
        return given.get(name) or (rest if kind == "-" else "")

    read = yaml.safe_load(VARIABLE.sub(value, COMPOSE_FILE))
    assert isinstance(read, dict)
    return read


def services() -> dict[str, Any]:
    found = interpolated(GRAFANA_PASSWORD="secret")["services"]
    assert isinstance(found, dict)
    return found


def test_compose_is_valid() -> None:
    whole = interpolated(GRAFANA_PASSWORD="secret")
    parsed = compose_spec.PyCompose.from_json(json.dumps(whole))
    assert set(parsed.service_names()) == set(whole["services"])
    whole["services"]["front"]["prots"] = []
    with pytest.raises(ValueError, match="prots"):
        compose_spec.PyCompose.from_json(json.dumps(whole))


def test_publishes_only_the_front() -> None:
    published = {name: one["ports"] for name, one in services().items() if "ports" in one}
    assert published.pop("front") == ["0.0.0.0:8443:8443"]
    assert set(published) == {"prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    with pytest.raises(KeyError, match="GRAFANA_PASSWORD"):  # there is no default password
        interpolated()


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_a_profile_is_complete_and_hardened(profile: str) -> None:
    chosen = {name: one for name, one in services().items() if profile in one["profiles"]}
    assert set(chosen) == {f"server-{profile}", "gateway", "front", "prometheus", "grafana"}
    for one in chosen.values():
        assert one["read_only"]
        assert one["cap_drop"] == ["ALL"]
        assert one["security_opt"] == ["no-new-privileges:true"]
    server = chosen[f"server-{profile}"]
    assert server["shm_size"] == "2gb"
    assert server["networks"]["inside"]["aliases"] == ["server"]
    assert ("deploy" in server) == (profile == "gpu")
    options = _parser().parse_args(server["command"])
    assert options.device == {"gpu": "cuda", "cpu": "cpu"}[profile]
    assert options.no_gateway  # it has a container of its own
    assert ServeOptions(Path(), "x", device=options.device)


def test_the_gateway_is_behind_the_front_and_limited() -> None:
    gateway = services()["gateway"]
    assert gateway["entrypoint"] == ["siglip-serve", "gateway"]
    given = gateway_parser().parse_args(gateway["command"])
    front = services()["front"]
    assert front["environment"]["FRONT_GATEWAY"] == f"gateway:{given.port}"
    assert given.triton == front["environment"]["FRONT_GRPC"]
    assert "gateway" in front["depends_on"]
    # nginx refuses first, so that the largest request is refused alike on both sides.
    assert front["environment"]["FRONT_GATEWAY_MAX_BODY"] == f"{given.max_body // 2**20}m"
    assert set(gateway["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert "ports" not in gateway
    assert f"http://127.0.0.1:{given.port}/health" in gateway["healthcheck"]["test"][-1]
    text = (DOCKER / "monitoring/prometheus.yml").read_text(encoding="utf-8")
    targets = [one["static_configs"][0]["targets"] for one in yaml.safe_load(text)["scrape_configs"]]
    assert [f"gateway:{given.port}"] in targets


def test_the_gateways_health_check_tells_health() -> None:
    command = services()["gateway"]["healthcheck"]["test"][1:]
    with gateway_process(f"127.0.0.1:{free_port()}") as url:
        here = [word.replace("http://127.0.0.1:8080", url) for word in command]
        assert run(sys.executable, *here[1:], http_proxy="http://127.0.0.1:9").returncode != 0
        live = [word.replace("/health", "/.well-known/live") for word in here]
        assert run(sys.executable, *live[1:], http_proxy="http://127.0.0.1:9").returncode == 0


def test_files_that_compose_mounts_exist() -> None:
    whole = interpolated(GRAFANA_PASSWORD="secret")
    for one in whole["services"].values():
        for volume in one.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
            else:
                assert source in whole["volumes"], source
    assert set(whole["services"]["front"]["secrets"]) == set(whole["secrets"])


def test_every_variable_is_in_the_example_with_its_default() -> None:
    example = dict(
        line.split("=", 1) for line in ENVIRONMENT_FILE.splitlines() if line and not line.startswith("#")
    )
    used = {name: rest if kind == "-" else "" for name, kind, rest in VARIABLE.findall(COMPOSE_FILE)}
    assert used == example


def test_compose_sets_what_the_front_reads() -> None:
    script = (DOCKER / "front/start.sh").read_text(encoding="utf-8")
    known = dict(re.findall(r'^: "\$\{(FRONT_[A-Z_]+):=([^}]*)\}"', script, re.MULTILINE))
    front = services()["front"]
    assert set(front["environment"]) <= set(known)
    template = (DOCKER / "front/nginx.conf.template").read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{(FRONT_[A-Z_]+)\}", template)) == set(known) - {"FRONT_KEYS"}
    for secret, variable in (("front_keys", "FRONT_KEYS"), ("front_certificate", "FRONT_CERTIFICATE")):
        assert known[variable] == f"/run/secrets/{secret}"


@pytest.fixture
def front_files(tmp_path: Path) -> dict[str, str]:
    """A certificate and a key, made by the project's scripts."""
    program("openssl")
    certificate = run(DOCKER / "front/make_certificate.sh", tmp_path, "host.example", "10.0.0.1")
    assert "DNS:host.example,IP:10.0.0.1" in certificate.stdout
    key = run(DOCKER / "front/make_key.sh", "team-a", tmp_path / "keys")
    assert re.fullmatch(r"[0-9a-f]{64}\n", key.stdout)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "certificate_key.pem").stat().st_mode & 0o777 == 0o600
    return {
        "FRONT_RUN": str(tmp_path / "run"),
        "FRONT_LISTEN": "127.0.0.1:8443",
        "FRONT_HTTP": "127.0.0.1:8000",
        "FRONT_GRPC": "127.0.0.1:8001",
        "FRONT_GATEWAY": "127.0.0.1:8080",
        "FRONT_KEYS": str(tmp_path / "keys"),
        "FRONT_CERTIFICATE": str(tmp_path / "certificate.pem"),
        "FRONT_CERTIFICATE_KEY": str(tmp_path / "certificate_key.pem"),
    }


def check_front(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = f"{Path(program('nginx')).parent}{os.pathsep}{os.environ['PATH']}"
    return run(DOCKER / "front/start.sh", "check", **variables, PATH=path)


def test_front_configuration_is_valid(front_files: dict[str, str]) -> None:
    done = check_front(front_files)
    assert done.returncode == 0, done.stderr
    assert "test is successful" in done.stderr
    assert "[warn]" not in done.stderr


@pytest.mark.parametrize(
    "line",
    ["team-b UPPERCASE", f"team-b {'A' * 64}", "a" * 64, f"two names {'a' * 64}", f'x";{"a" * 64}', "# none"],
)
def test_front_refuses_a_wrong_line_of_keys_without_showing_it(
    line: str, front_files: dict[str, str]
) -> None:
    keys = Path(front_files["FRONT_KEYS"])
    keys.write_text(f"{line}\n", encoding="ascii")
    done = check_front(front_files)
    assert done.returncode == 1
    assert "front: keys" in done.stderr
    assert line not in done.stderr


def test_front_refuses_a_missing_certificate_and_a_wrong_setting(front_files: dict[str, str]) -> None:
    done = check_front(front_files | {"FRONT_CERTIFICATE": "/nowhere.pem"})
    assert done.returncode == 1
    assert "/nowhere.pem: cannot be read" in done.stderr
    done = check_front(front_files | {"FRONT_MAX_BODY": "1m; deny all"})
    assert done.returncode == 1
    assert "FRONT_MAX_BODY" in done.stderr


@pytest.mark.parametrize("script", sorted(DOCKER.rglob("*.sh")), ids=lambda script: script.name)
def test_scripts_are_executable_and_well_formed(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert run("sh", "-n", script).returncode == 0


def test_page_links_and_names_existing_things() -> None:
    page = (DOCKER / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page):
        assert (DOCKER / target).exists(), target
    for target in re.findall(r"`docker/([\w./-]+\.\w+)`", page):
        assert (DOCKER / target).exists() or target == ".env", target
    assert JERSEY.is_dir()

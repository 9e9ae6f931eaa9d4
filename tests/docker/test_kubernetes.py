"""The manifests, rendered by kubectl: valid for Kubernetes and consistent with each other."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from os.path import relpath
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from paths import ROOT

from siglip_gateway.app import create_app
from siglip_gateway.command import _parser as gateway_parser
from siglip_gateway.options import GatewayOptions
from siglip_serve.bulk.options import bulk_parser
from siglip_serve.launcher.command import _parser as server_parser

FOLDER = ROOT / "deployments" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSION = "1.33"


@cache
def objects(overlay: str) -> dict[str, dict[str, Any]]:
    """The objects of an overlay, by kind and name."""
    return rendered_objects(FOLDER / "overlays" / overlay)


def rendered_objects(folder: Path) -> dict[str, dict[str, Any]]:
    """The objects of a folder, by kind and name."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    found = list(yaml.safe_load_all(rendered))
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def server(overlay: str) -> dict[str, Any]:
    """The server's container."""
    template = objects(overlay)["Deployment/siglip-serve"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    kinds = set()
    for one in objects(overlay).values():
        kubernetes_validate.validate(one, VERSION, strict=True)
        kinds.add(one["kind"])
    assert kinds == {
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
        "NetworkPolicy",
    }


def test_validation_refuses_a_field_of_the_wrong_type() -> None:
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": "8000"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="'8000' is not of type 'array'"):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_and_ports_meet_the_pods(overlay: str) -> None:
    made = objects(overlay)
    expected = {
        "siglip-serve": {"http": 8000, "grpc": 8001, "metrics": 8002},
        "siglip-serve-gateway": {"http": 8080},
    }
    for application, wanted in expected.items():
        template = made[f"Deployment/{application}"]["spec"]["template"]
        labels = template["metadata"]["labels"]
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == wanted
        services = [one for name, one in made.items() if name.startswith("Service/")]
        chosen = [one for one in services if one["spec"]["selector"] == labels]
        assert len(chosen) == (2 if application == "siglip-serve" else 1)
        assert all(port["targetPort"] in ports for one in chosen for port in one["spec"]["ports"])
        assert made[f"PodDisruptionBudget/{application}"]["spec"]["selector"]["matchLabels"] == labels
        assert made[f"NetworkPolicy/{application}"]["spec"]["podSelector"]["matchLabels"] == labels
    assert made["Service/siglip-serve-grpc"]["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_probed_by_inference_and_may_write_nowhere_else(overlay: str) -> None:
    container = server(overlay)
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["exec"]["command"] == ["siglip-serve", "health"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    pod = objects(overlay)["Deployment/siglip-serve"]["spec"]["template"]["spec"]
    memory = {volume["name"]: volume.get("emptyDir", {}).get("medium") for volume in pod["volumes"]}
    assert memory["shm"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    wanted = container["resources"]["limits"].get("nvidia.com/gpu")
    assert wanted == ("1" if overlay == "gpu" else None)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_autoscaler_uses_the_adapters_metric(overlay: str) -> None:
    adapter = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())
    names = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    (metric,) = objects(overlay)["HorizontalPodAutoscaler/siglip-serve"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_gateway_asks_the_server_over_grpc(overlay: str) -> None:
    made = objects(overlay)
    (container,) = made["Deployment/siglip-serve-gateway"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["siglip-serve", "gateway"]
    given = gateway_parser().parse_args(container["args"])
    name, _, port = given.triton.partition(":")
    (grpc,) = made[f"Service/{name}"]["spec"]["ports"]
    assert (grpc["name"], str(grpc["port"])) == ("grpc", port)
    assert given.port == container["ports"][0]["containerPort"]
    paths = {str(getattr(route, "path", "")) for route in create_app(GatewayOptions()).routes}
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert server_parser().parse_args(server(overlay)["args"]).no_gateway


def test_keys_are_a_component(tmp_path: Path) -> None:
    wanted = ["overlays/cpu", "components/gateway-keys"]
    base, component = (relpath(FOLDER / one, tmp_path) for one in wanted)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
    pod = rendered_objects(tmp_path)["Deployment/siglip-serve-gateway"]
    kubernetes_validate.validate(pod, VERSION, strict=True)
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    file = Path(gateway_parser().parse_args(container["args"]).api_key_file)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["template"]["spec"]["volumes"]}
    assert "secret" in volumes[mounts[str(file.parent)]]


def test_the_bulk_jobs_pods_are_valid_and_fit_its_command() -> None:
    (made,) = rendered_objects(FOLDER / "bulk").values()
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayJob")
    cluster = made["spec"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, workers):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "siglip-serve-bulk:latest"
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    program, command, *words = made["spec"]["entrypoint"].split()
    assert (program, command) == ("siglip-serve", "bulk")
    given = bulk_parser().parse_args(words)
    assert (given.on, given.device, given.address) == ("ray", "cuda", "")
    assert given.workers == workers["maxReplicas"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert given.worker_cpus <= int(limits["cpu"])
    assert head["rayStartParams"]["num-cpus"] == "0"
    dockerfile = (ROOT / "docker" / "bulk.Dockerfile").read_text(encoding="utf-8")
    assert f"ARG RAY_VERSION={cluster['rayVersion']}\n" in dockerfile

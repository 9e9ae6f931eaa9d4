"""The manifests, rendered by kubectl: valid for Kubernetes and consistent with each other."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml
from paths import ROOT

FOLDER = ROOT / "deployments" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSION = "1.33"


@cache
def objects(overlay: str) -> dict[str, dict[str, Any]]:
    """The objects of an overlay, by kind and name."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / "overlays" / overlay)],
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
    labels = made["Deployment/siglip-serve"]["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in server(overlay)["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for name, one in made.items():
        if name.startswith("Service/"):
            assert one["spec"]["selector"] == labels
            assert all(port["targetPort"] in ports for port in one["spec"]["ports"])
    assert made["PodDisruptionBudget/siglip-serve"]["spec"]["selector"]["matchLabels"] == labels
    assert made["NetworkPolicy/siglip-serve"]["spec"]["podSelector"]["matchLabels"] == labels
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

"""Only the model processes that resize images or compute heatmaps have torch in their memory.

It takes 130 MB of each process. OpenVINO runs the towers on a CPU without it.
"""

from __future__ import annotations

import psutil
import pytest
from images import encode, photo
from wire import GrpcCaller

from siglip_serve.launcher import TritonServer
from siglip_serve.launcher.family import ModelProcesses, family, mapped_files


def models_with(library: str, server: TritonServer) -> tuple[set[str], set[str]]:
    """The models of whose processes one has mapped this library, and all whose processes run."""
    processes = family(server.pid)
    found = ModelProcesses(server.models)(processes)
    having = {
        model
        for pid, model in found.items()
        if any(library in file.name for file in mapped_files([psutil.Process(pid)]))
    }
    return having, set(found.values())


@pytest.fixture
def cpu_server(server: TritonServer) -> TritonServer:
    if server.device != "cpu":
        pytest.skip("the towers of GPUs run in torch")
    return server


def test_only_resizing_and_heatmaps_need_torch(cpu_server: TritonServer) -> None:
    having, running = models_with("libtorch_cpu", cpu_server)
    assert having == {"siglip_vision_process", "jersey_process", "siglip_vision_model"}
    assert {"siglip_text_model", "siglip_base_model", "label_scores", "siglip_text_tokenize"} <= running


def test_the_image_tower_is_not_in_torch_where_no_heatmaps_are_served(
    cpu_server: TritonServer, mortal_server: TritonServer
) -> None:
    """Pillow resizes in this server."""
    assert cpu_server.device == mortal_server.device
    GrpcCaller(mortal_server.grpc_url).embed([encode(photo(80, 60), "JPEG")])
    having, running = models_with("libtorch_cpu", mortal_server)
    assert having == set()
    assert {"siglip_vision_process", "siglip_vision_model"} <= running
    assert models_with("libopenvino_intel_cpu", mortal_server)[0] == {"siglip_vision_model"}

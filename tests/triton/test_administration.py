"""Administration of a server, which is closed to callers without the launcher's key."""

from __future__ import annotations

import numpy as np
import pytest
from images import encode, photo
from tritonclient.utils import InferenceServerException
from wire import GrpcCaller, post

from siglip_serve.launcher import TritonServer

PICTURE = encode(photo(80, 60), "JPEG")


def test_closes_administration_to_callers_without_the_key(server: TritonServer) -> None:
    base = f"http://{server.http_url}/v2"
    for path in (
        "repository/models/embed_image/load",
        "repository/models/embed_image/unload",
        "repository/index",
        "logging",
        "trace/setting",
        "systemsharedmemory/region/x/register",
    ):
        status, _ = post(f"{base}/{path}", b"{}", {})
        assert status == 403, path
    client = GrpcCaller(server.grpc_url).client
    for call in (client.get_model_repository_index, client.get_log_settings, client.get_trace_settings):
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            call()
    assert np.isfinite(GrpcCaller(server.grpc_url).embed([PICTURE])).all()

"""Run the real `tritonserver` on a model repository: `with TritonServer(ServeOptions(...)) as server`."""

from siglip_serve.launcher.server import ServeOptions, TritonServer

__all__ = ["ServeOptions", "TritonServer"]

"""Run the real `tritonserver` on a model repository: `with TritonServer(ServeOptions(...)) as server`."""

from siglip_serve.launcher.options import ServeOptions
from siglip_serve.launcher.server import TritonServer

__all__ = ["ServeOptions", "TritonServer"]

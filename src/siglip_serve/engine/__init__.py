"""How a tower is run fast. The towers stay as they read; what makes them fast is done here.

`VisionEngine` and `TextEngine` choose a runner for the device and the dtype, and cut rows into passes that
fit the device's memory. A runner is one way to run a tower:

- `plain`: torch as it is, on any device; on CPUs with oneDNN's packed weights.
- `openvino`: CPUs.
- `fused`: NVIDIA GPUs, with the kernels of `kernels` and CUDA graphs.
"""

from siglip_serve.engine.passes import OUTPUTS, Batch
from siglip_serve.engine.towers import Explained, Plan, TextEngine, VisionEngine

__all__ = ["OUTPUTS", "Batch", "Explained", "Plan", "TextEngine", "VisionEngine"]

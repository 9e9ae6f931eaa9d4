"""Run towers fast. The towers stay as they read; what makes them fast is done here.

`engines` chooses a runner for the device and the dtype that `plan` names, and cuts rows into passes that fit
the device's memory. A runner is one way to run a tower:

- `torch`: torch as it is, on any device; on CPUs with oneDNN's packed weights.
- `openvino`: CPUs.
- `fused`: NVIDIA GPUs, with kernels of its own and CUDA graphs.

Importing this package loads none of them.
"""

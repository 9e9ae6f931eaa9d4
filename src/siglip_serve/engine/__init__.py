"""Run towers fast. The towers stay readable, and all that makes them fast is here.

`engines` chooses a runner for the device and dtype that `plan` names, and cuts rows into passes that fit the
device's memory. A runner is one way to run a tower:

- `torch`: operation by operation on any device. On CPUs weights are packed for oneDNN.
- `openvino`: CPUs.
- `fused`: NVIDIA GPUs, with kernels of this project and CUDA graphs.

Importing this package loads none of them.
"""

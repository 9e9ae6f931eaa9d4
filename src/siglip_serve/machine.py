"""Detect the machine's hardware: CPU cores, CPU instructions, GPUs."""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from pathlib import Path

__all__ = ["available_cores", "gpu_capabilities", "processor_flags"]

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds per period, or `max`
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver.
_CAPABILITY = (75, 76)


def available_cores() -> int:
    """Count the CPU cores that this process may use, at least 1.

    The count is limited by the process's affinity and by the CPU quota of its control group (containers).
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    if not quota.isdigit():
        return cores
    return max(1, min(cores, round(int(quota) / int(period))))


def processor_flags() -> frozenset[str]:
    """List the CPU's features under the kernel's names, such as `avx512_vnni`."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset(flags[1].split() if flags else ())


@cache
def gpu_capabilities() -> tuple[tuple[int, int], ...]:
    """Read the compute capability (major, minor) of each GPU that this process may use.

    The CUDA driver answers, because importing torch takes seconds. It honours `CUDA_VISIBLE_DEVICES`.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple((_attribute(driver, 0, gpu), _attribute(driver, 1, gpu)) for gpu in range(count.value))


def _attribute(driver: ctypes.CDLL, part: int, gpu: int) -> int:
    value = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), _CAPABILITY[part], gpu)
    return value.value

"""Plans: what `auto` becomes on a device, and which choices a device or a family refuses."""

from __future__ import annotations

import pytest

from siglip_serve.config import Dtype
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import SettingsError

GPUS = {"7.5": (7, 5), "8.0": (8, 0), "8.6": (8, 6), "8.9": (8, 9), "9.0": (9, 0)}


def use(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    found = tuple(GPUS[gpu] for gpu in gpus)
    monkeypatch.setattr("siglip_serve.engine.plan.gpu_capabilities", lambda: found)


@pytest.mark.parametrize(
    ("gpu", "plan", "dtype", "backend"),
    [
        ("9.0", Plan("cuda:0"), "bfloat16", "fused"),
        ("8.0", Plan("cuda:0"), "bfloat16", "fused"),
        ("7.5", Plan("cuda:0"), "float16", "torch"),
        ("9.0", Plan("cuda:0", "float32"), "float32", "torch"),
        ("9.0", Plan("cuda:0", "float8"), "float8", "fused"),
        ("8.9", Plan("cuda:0", "float8", "fused"), "float8", "fused"),
        ("8.0", Plan("cuda:0", "float16", "fused"), "float16", "fused"),
        ("8.0", Plan("cuda:0", "float16", "torch"), "float16", "torch"),
    ],
    ids=str,
)
def test_a_gpu_resolves_a_plan(
    gpu: str, plan: Plan, dtype: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, gpu)
    resolved = plan.resolve()
    assert (resolved.dtype, resolved.backend) == (dtype, backend)


@pytest.mark.parametrize(
    ("gpu", "plan", "message"),
    [
        ("8.0", Plan("cuda:0", "float8"), r"dtype float8: needs .* 8\.9 or newer \(this one has 8\.0\)"),
        ("8.6", Plan("cuda:0", "float8"), r"dtype float8: needs .* 8\.9 or newer \(this one has 8\.6\)"),
        ("9.0", Plan("cuda:0", "float8", "torch"), "dtype float8: needs the backend fused"),
        ("9.0", Plan("cuda:0", "float32", "fused"), "backend fused with dtype float32: needs 16 or 8 bits"),
        ("7.5", Plan("cuda:0", "float16", "fused"), r"backend fused with dtype float16: .*this one has 7\.5"),
        ("9.0", Plan("cuda:0", "int8"), "dtype int8: not for GPUs"),
        ("9.0", Plan("cuda:0", "auto", "openvino"), "backend openvino: not for GPUs"),
    ],
    ids=str,
)
def test_a_gpu_refuses_a_plan(gpu: str, plan: Plan, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, gpu)
    with pytest.raises(SettingsError, match=message):
        plan.resolve()


def test_refuses_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    with pytest.raises(SettingsError, match="device cuda:0: the NVIDIA driver shows no GPUs"):
        Plan("cuda:0").resolve()
    use(monkeypatch, "8.0", "9.0")
    assert Plan("cuda:1", "float8").resolve().backend == "fused"
    with pytest.raises(SettingsError, match="device cuda:2: the NVIDIA driver shows 2 GPUs"):
        Plan("cuda:2").resolve()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("cpu", "float16"), "dtype float16: not for CPUs"),
        (Plan("cpu", "float8"), "dtype float8: not for CPUs"),
        (Plan("cpu", "float32", "fused"), "backend fused: not for CPUs"),
        (Plan("cpu", "int8", "torch"), "dtype int8: needs the backend openvino"),
    ],
    ids=str,
)
def test_a_cpu_refuses_a_plan(plan: Plan, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan.resolve()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("cpu", "float32", "openvino"), "backend openvino: the package openvino is not installed"),
        (Plan("cpu", "int8"), "dtype int8: needs the backend openvino"),
    ],
)
def test_a_cpu_without_openvino_refuses_it(plan: Plan, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siglip_serve.engine.plan.find_spec", lambda _: None)
    assert Plan("cpu", "float32").resolve().backend == "torch"
    with pytest.raises(SettingsError, match=message):
        plan.resolve()


def test_openvino_is_the_default_on_a_cpu() -> None:
    assert Plan("cpu", "float32").resolve().backend == "openvino"


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16"), ({"avx2", "avx512_vnni"}, "float32")],
    ids=["avx512_bf16", "amx_bf16", "neither"],  # not the sets, whose order differs from process to process
)
def test_auto_is_bfloat16_where_the_cpu_has_it(
    flags: set[str], dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siglip_serve.engine.plan.processor_flags", lambda: frozenset(flags))
    assert Plan("cpu").resolve().dtype == dtype
    assert Plan("cpu", "int8").resolve().wide_dtype == dtype
    assert Plan("cpu", "int8").for_text("siglip").dtype == dtype


@pytest.mark.parametrize(("width", "dtype"), [(511, "bfloat16"), (512, "float8")])
def test_only_wide_vision_towers_run_in_float8(
    width: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "9.0")
    assert Plan("cuda:0", "float8").for_vision("siglip", width).dtype == dtype
    assert Plan("cuda:0", "float8").for_text("siglip").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "used", "backend"),
    [("auto", "bfloat16", "fused"), ("float16", "float16", "fused"), ("float32", "float32", "torch")],
)
def test_clip_runs_fused_on_gpus_in_16_bits(
    dtype: Dtype, used: Dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "9.0")
    plan = Plan("cuda:0", dtype)
    for activation in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        for found in (plan.for_vision("clip", 768, activation), plan.for_text("clip", activation)):
            assert (found.backend, found.dtype) == (backend, used)


def test_refuses_activations_that_no_kernel_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "9.0")
    assert Plan("cuda:0").for_vision("clip", 768, "relu").backend == "torch"
    message = "backend fused: for towers with gelu_pytorch_tanh, gelu, quick_gelu only, this one has relu"
    with pytest.raises(SettingsError, match=message):
        Plan("cuda:0", backend="fused").for_text("clip", "relu")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("cuda:0", "float8"), "dtype float8: for SigLIP's towers only; use bfloat16"),
        (Plan("cuda:0", "float8", "fused"), "dtype float8: for SigLIP's towers only; use bfloat16"),
        (Plan("cuda:0", "float32", "fused"), "backend fused with dtype float32: needs 16 or 8 bits"),
        (Plan("cuda:0", "auto", "openvino"), "backend openvino: not for GPUs"),
        (Plan("cuda:0", "int8"), "dtype int8: not for GPUs"),
    ],
    ids=str,
)
def test_a_gpu_refuses_a_plan_for_clip(plan: Plan, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "9.0")
    with pytest.raises(SettingsError, match=message):
        plan.for_vision("clip", 768)
    with pytest.raises(SettingsError, match=message):
        plan.for_text("clip")

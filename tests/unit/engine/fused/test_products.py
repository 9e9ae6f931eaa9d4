"""The choice of algorithms of matrix products. The algorithms need a GPU (benchmarks/products.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from siglip_serve.engine.fused import activated, products
from siglip_serve.engine.fused.cublaslt import CublasLtError, Kind
from siglip_serve.towers.siglip import ACTIVATIONS

Run = Callable[[], object]


def runs_of(times: Sequence[float | None]) -> tuple[list[Run], Callable[[Run], float]]:
    """Ways that take these times, or that refuse, and what measures them."""
    ways: dict[Run, float] = {}

    def way(time: float | None) -> Run:
        def run() -> None:
            if time is None:
                raise CublasLtError("refused")

        ways[run] = time or 0.0
        return run

    return [way(time) for time in times], ways.__getitem__


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([3.0, 2.0, 2.5], 1),
        ([2.0, 3.0], 0),
        ([2.0, 1.99], 0),  # no clear gain
        ([3.0, None, 2.0], 2),
        ([2.0, None], 0),
        ([2.0], 0),
    ],
)
def test_chooses_the_fastest_that_works(times: list[float | None], expected: int) -> None:
    assert products.choose(*runs_of(times)) == expected


def test_leaves_out_what_does_not_compile(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ValueError("no such instruction")

    runs, measure = runs_of([3.0, 2.0])
    products._tell.cache_clear()
    assert products.choose([*runs, broken], measure) == 1
    assert "ValueError: no such instruction" in capsys.readouterr().out


def test_a_slow_moment_does_not_decide() -> None:
    runs, _ = runs_of([2.0, 1.0])
    moments = {runs[0]: iter([2.0] * 9), runs[1]: iter([9.0, 9.0, 1.0, 9.0, 9.0])}
    assert products.choose(runs, lambda run: next(moments[run])) == 1


def test_equals_torch_where_torch_computes() -> None:
    torch.manual_seed(0)
    x, w, bias = torch.randn(5, 8), torch.randn(6, 8).t(), torch.randn(6)
    with products.tried():
        assert torch.equal(products.linear(x, w, bias), torch.addmm(bias, x, w))
        given = torch.empty(5, 6)
        assert products.linear(x, w, bias, out=given) is given
        assert torch.equal(given, torch.addmm(bias, x, w))
        for name, activation in ACTIVATIONS.items():
            found = products.linear(x, w, bias, name)
            assert torch.allclose(found, activation(torch.addmm(bias, x, w)), atol=1e-3)
        out = torch.ones(5, 6)
        assert products.add_product(out, x, w) is out
        assert torch.allclose(out, 1 + x @ w, atol=1e-5)


class OnGpu:
    """Looks like a matrix on a GPU."""

    is_cuda, dtype = True, torch.bfloat16
    device = torch.device("cuda", 0)

    def __init__(self, rows: int, columns: int, contiguous: bool = True, address: int = 64) -> None:
        self.shape, self._contiguous, self._address = (rows, columns), contiguous, address

    def __len__(self) -> int:
        return self.shape[0]

    def t(self) -> OnGpu:
        return self

    def is_contiguous(self) -> bool:
        return self._contiguous

    def data_ptr(self) -> int:
        return self._address


def kind_of(x: OnGpu, w: OnGpu) -> Kind:
    return Kind(len(x), w.shape[1], w.shape[0], x.dtype, x.dtype)


def test_tries_a_shape_only_once_and_only_where_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Kind] = []
    found = object()

    def try_one(kind: Kind, *_: object) -> object:
        tried.append(kind)
        return found

    monkeypatch.setattr(products, "_try", try_one)
    monkeypatch.setattr(products, "_chosen", {})
    x, w = OnGpu(4096, 768), OnGpu(768, 3072)

    def find(x: OnGpu, w: OnGpu) -> object:
        return products._find(kind_of(x, w), x, w, None, None, None)  # type: ignore[arg-type]

    assert find(x, w) is None
    assert not tried
    with products.tried():
        assert find(x, w) is found
        assert find(x, w) is found
    assert find(x, w) is found
    assert find(OnGpu(2048, 768), w) is None
    assert tried == [kind_of(x, w)]
    # Of the same shape, but not as the algorithm takes it.
    assert find(OnGpu(4096, 768, contiguous=False), w) is None
    assert find(x, OnGpu(768, 3072, contiguous=False)) is None
    assert find(OnGpu(4096, 768, address=8), w) is None


@pytest.mark.parametrize("error", [CublasLtError("no library"), torch.OutOfMemoryError("no memory")])
def test_leaves_to_torch_what_cannot_be_tried(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(products, "Product", refuse)
    products._tell.cache_clear()
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(products, "choose", lambda runs, _: len(runs) - 1)
    matrices = OnGpu(4096, 768), OnGpu(768, 3072)
    for _ in range(2):
        assert products._try(kind_of(*matrices), *matrices, None, None) is None  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("no library") == isinstance(error, CublasLtError)


@pytest.mark.parametrize(
    ("activation", "capability", "k", "expected"),
    [
        ("", (9, 0), 768, ["cublaslt"]),
        ("gelu_pytorch_tanh", (9, 0), 768, ["kernel", "cublaslt"]),
        ("quick_gelu", (9, 0), 768, ["kernel"]),
        ("quick_gelu", (8, 0), 768, []),
        ("gelu_pytorch_tanh", (9, 0), 764, ["cublaslt"]),  # rows do not begin at multiples of 16 bytes
    ],
)
def test_tries_what_computes_a_product(
    activation: str, capability: tuple[int, int], k: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def __init__(self, *_: object) -> None: ...

        def algorithms(self) -> list[int]:
            return [7]

        def __call__(self, *arguments: object) -> None:
            called.append("cublaslt")
            assert arguments == (7, *matrices)

    called: list[str] = []
    matrices = object(), object(), object(), object(), None

    def kernel(*arguments: object) -> None:
        called.append("kernel")
        assert arguments == (*matrices[:4], activation)

    monkeypatch.setattr(products, "Product", Library)
    monkeypatch.setattr(activated, "product", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    kind = Kind(4096, 3072, k, torch.bfloat16, torch.bfloat16, bias=True, activation=activation)
    for way in products._other_ways(kind, torch.zeros(1, dtype=torch.bfloat16), 0):
        way(*matrices)  # type: ignore[arg-type]
    assert called == expected


def test_leaves_float32_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_try", lambda *_: pytest.fail("tried"))
    x, w = OnGpu(4096, 768), OnGpu(768, 3072)
    kind = kind_of(x, w)._replace(inputs=torch.float32)
    with products.tried():
        assert products._find(kind, x, w, None, None, None) is None  # type: ignore[arg-type]


def test_leaves_small_products_to_torch() -> None:
    kind = Kind(16, 768, 768, torch.bfloat16, torch.bfloat16)
    matrices = OnGpu(16, 768), OnGpu(768, 768)
    assert products._try(kind, *matrices, None, None) is None  # type: ignore[arg-type]


def test_a_product_before_a_pass_over_memory_has_a_way_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no product computes the activation, it follows the fastest one that there is."""
    found: list[str] = []

    def find(kind: Kind, *_: object) -> None:
        found.append(kind.activation)

    monkeypatch.setattr(products, "_find", find)
    torch.manual_seed(0)
    x, w, bias = torch.randn(5, 8), torch.randn(6, 8).t(), torch.randn(6)
    expected = ACTIVATIONS["quick_gelu"](torch.addmm(bias, x, w))
    assert torch.allclose(products.linear(x, w, bias, "quick_gelu"), expected, atol=1e-5)
    assert found == ["quick_gelu", ""]

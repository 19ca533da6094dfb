"""The operators of torch.ops.dcmerge by torch's own checks, and the public functions under torch.compile and export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import dcmerge_ext as dcm
from dcmerge_ext import LowRank, ops, reference, use_backend
from dcmerge_ext.linalg import polar, svd, svd_lowrank
from dcmerge_ext.svd import truncated_svd

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")  # compilers warn of what concerns themselves

OPERATORS = torch.ops.dcmerge
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None
COMPILERS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")),
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def x32(*shape: int, seed: int = 60) -> Tensor:
    return cases.normal(*shape, seed=seed, dtype=torch.float32)


def x64(*shape: int, seed: int = 61) -> Tensor:
    return cases.normal(*shape, seed=seed)


def counts(*values: int) -> Tensor:
    return torch.tensor(values)


def bins() -> Tensor:
    return torch.zeros(16, dtype=torch.int64)


def tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found or ())


# --- the operators ---------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
SEED = (0, 1)

ONE = torch.tensor(1)
OPERATOR_CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "kth_magnitude of rows": ("kth_magnitude", (x32(3, 40), counts(1, 7, 40))),
    "kth_magnitude of a vector": ("kth_magnitude", (x64(40), torch.tensor(7))),
    "kth_magnitude of a batch, one count": ("kth_magnitude", (x64(2, 3, 5), ONE)),
    "kth_magnitude of strided float16": ("kth_magnitude", (x32(5, 3, 4).half().permute(2, 1, 0)[:, ::2], ONE)),
    "kth_magnitude of bfloat16": ("kth_magnitude", (x32(2, 9).bfloat16(), ONE)),
    "kth_magnitude of an empty batch": ("kth_magnitude", (x32(0, 4, 5), ONE)),
    "magnitude_histogram of float32": ("magnitude_histogram", (x32(3, 40), bins(), 27, 4, 0)),
    "magnitude_histogram of float64": ("magnitude_histogram", (x64(3, 40), bins(), 55, 4, 7)),
    "magnitude_histogram of strided values": ("magnitude_histogram", (x32(6, 8).T[::2], bins(), 27, 4, 0)),
    "magnitude_histogram of nothing": ("magnitude_histogram", (x32(0, 8), bins(), 27, 4, 0)),
    "elect": ("elect", (x32(3, 4, 6), None, None, 0, "mean")),
    "elect, trimmed and masked": ("elect", (x64(2, 3, 4, 4), x64(2, 3).abs(), [1, 0, 3], 1, "sum")),
    "elect of strided bfloat16": ("elect", (x32(3, 6, 4).bfloat16().mT, x32(3).abs(), None, -1, "mean")),
    "elect of float16, tasks innermost": ("elect", (x32(2, 4, 6, 3).half().movedim(-1, -3), None, None, 0, "mean")),
    "elect of an empty batch": ("elect", (x32(0, 3, 4, 4), x32(0, 3), [2, 2], 0, "mean")),
    "elect of no rows": ("elect", (x32(3, 0, 4), None, None, 0, "mean")),
    "rademacher": ("rademacher", (5, 70, SEED, "layer.weight", 2, 3, torch.float32, CPU)),
    "rademacher in float64": ("rademacher", (1, 1, SEED, "", 0, 0, torch.float64, CPU)),
    "rademacher in float16": ("rademacher", (3, 129, SEED, "", 0, 0, torch.float16, CPU)),
    "rademacher, no rows": ("rademacher", (0, 4, SEED, "", 0, 0, torch.float32, CPU)),
    "truncated_svd by Gram matrix, tall": ("truncated_svd", (x32(40, 9), 4, "exact", None, SEED)),
    "truncated_svd by Gram matrix, wide": ("truncated_svd", (x32(9, 40), 4, "exact", None, SEED)),
    "truncated_svd by LAPACK": ("truncated_svd", (x64(12, 9), 9, "exact", None, SEED)),
    "truncated_svd by LAPACK, wide": ("truncated_svd", (x64(9, 12), 3, "exact", None, SEED)),
    "truncated_svd by Krylov space": (
        "truncated_svd",
        (cases.with_spectrum(500, 400, cases.power_law(400, 1), seed=62).float(), 4, "exact", None, SEED),
    ),
    "truncated_svd, fast": ("truncated_svd", (x32(60, 50), 4, "fast", None, SEED)),
    "truncated_svd, fast and wide": ("truncated_svd", (x32(50, 60), 4, "fast", None, SEED)),
    "truncated_svd of a strided batch": (
        "truncated_svd",
        (x32(9, 12, 2, 3).permute(3, 2, 1, 0), 4, "exact", 0.1, SEED),
    ),
    "truncated_svd of bfloat16": ("truncated_svd", (x32(12, 9).bfloat16(), 4, "exact", None, SEED)),
    "truncated_svd of zero": ("truncated_svd", (torch.zeros(12, 9), 4, "exact", None, SEED)),
    "truncated_svd of a large scale": ("truncated_svd", (1e30 * x32(12, 9), 4, "exact", None, SEED)),
    "truncated_svd of an empty batch": ("truncated_svd", (x32(0, 12, 9), 4, "exact", None, SEED)),
    "truncated_svd_factors": ("truncated_svd_factors", (x32(12, 3), x32(3, 9), 3, "exact", None)),
    "truncated_svd_factors, truncated": ("truncated_svd_factors", (x64(12, 5), x64(5, 9), 2, "exact", None)),
    "truncated_svd_factors, beyond the rank": ("truncated_svd_factors", (x32(12, 2), x32(2, 9), 5, "exact", None)),
    "truncated_svd_factors of rank zero": ("truncated_svd_factors", (x32(12, 0), x32(0, 9), 2, "exact", None)),
    "truncated_svd_factors of more columns than rows": (
        "truncated_svd_factors",
        (x32(4, 7), x32(7, 9), 3, "exact", None),
    ),
    "truncated_svd_factors of a strided batch": (
        "truncated_svd_factors",
        (x32(3, 12, 2).permute(2, 1, 0).half(), x32(9, 3, 2).permute(2, 1, 0).half(), 2, "exact", None),
    ),
    "truncated_svd_factors of an empty batch": (
        "truncated_svd_factors",
        (x32(0, 12, 3), x32(0, 3, 9), 2, "exact", None),
    ),
    "svd of a batch": ("svd", (x32(3, 12, 9), False)),
    "svd by Gram matrix, tall": ("svd", (x32(90, 30), False)),
    "svd by Gram matrix, wide": ("svd", (x32(30, 90), False)),
    "svd with all rows and columns": ("svd", (x64(12, 9), True)),
    "svd of a strided batch": ("svd", (x32(9, 12, 2, 3).permute(3, 2, 1, 0), False)),
    "svd of bfloat16": ("svd", (x32(12, 9).bfloat16(), True)),
    "svd of complex numbers": ("svd", (torch.complex(x32(12, 9), x32(12, 9, seed=3)), False)),
    "svd of an empty batch": ("svd", (x32(0, 12, 9), True)),
    "svd_lowrank": ("svd_lowrank", (x32(60, 50), 4, 2, SEED)),
    "svd_lowrank of a wide batch": ("svd_lowrank", (x64(2, 50, 60), 4, 0, SEED)),
    "svd_lowrank of small matrices": ("svd_lowrank", (x32(3, 9, 4).half(), 4, 1, SEED)),
    "svd_lowrank, nothing kept": ("svd_lowrank", (x32(3, 9, 4), 0, 1, SEED)),
    "polar, tall": ("polar", (x32(12, 9), None)),
    "polar, wide": ("polar", (x64(9, 12), None)),
    "polar of a large matrix": ("polar", (x32(300, 280), None)),
    "polar, rank deficient": ("polar", (x32(12, 3) @ x32(3, 9), 1e-3)),
    "polar of a strided batch": ("polar", (x64(9, 12, 2).permute(2, 1, 0), None)),
    "polar of float16": ("polar", (x32(12, 9).half(), None)),
    "polar of an empty batch": ("polar", (x32(0, 12, 9), None)),
    "polar of no rows": ("polar", (x32(2, 0, 9), None)),
}


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_operators_pass_the_checks_of_torch(name: str, backend: str) -> None:
    operator, arguments = OPERATOR_CALLS[name]
    opcheck(getattr(OPERATORS, operator).default, arguments)


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_fake_kernels_know_the_layout_of_the_outputs(name: str, backend: str) -> None:
    operator, arguments = OPERATOR_CALLS[name]
    found = tensors(getattr(OPERATORS, operator)(*arguments))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fake = tensors(getattr(OPERATORS, operator)(*fakes))
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in found]
    assert all(t.is_contiguous() for t in [*fake, *found])


def test_every_operator_is_checked() -> None:
    registered = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("dcmerge::")}
    assert registered == {operator for operator, _ in OPERATOR_CALLS.values()}


@pytest.mark.parametrize(
    "operator", ["kth_magnitude", "elect", "truncated_svd", "truncated_svd_factors", "svd", "svd_lowrank", "polar"]
)
def test_backward_through_an_operator_raises(operator: str) -> None:
    arguments = next(a for o, a in OPERATOR_CALLS.values() if o == operator)
    arguments = (arguments[0].clone().requires_grad_(), *arguments[1:])
    opcheck(getattr(OPERATORS, operator).default, arguments, test_utils=["test_schema", "test_autograd_registration"])
    found = getattr(OPERATORS, operator)(*arguments)
    first = found if isinstance(found, Tensor) else found[0]
    with pytest.raises(RuntimeError, match=f"backward through dcmerge.{operator}.default but no autograd formula"):
        first.sum().backward()


# --- the public functions in a trace ---------------------------------------------------------------------------------


def histogram_of(x: Tensor, width: int = 4) -> Tensor:
    out = bins()
    ops.magnitude_histogram(x, out, shift=27, width=width)
    return out


def ties_like(stack: Tensor) -> Tensor:
    flat = stack.flatten(-2)
    thresholds = ops.kth_magnitude(flat, flat.shape[-1] // 5)
    return ops.elect(stack, thresholds, zero_sum=1)


def update_by_components(left: Tensor, right: Tensor) -> Tensor:
    update = LowRank(left, right) * 0.5
    U, S, Vh = dcm.truncated_svd(update, 2)
    return U * dcm.smooth_energy(S, "average")[..., None, :] @ Vh


def sketch(A: Tensor) -> Tensor:
    return ops.rademacher(4, A.shape[-2], seed=7, key="layer", task=2, stream=3, dtype=A.dtype) @ A


# name -> function, and inputs of two sizes
TRACED: dict[str, tuple[Callable[..., Any], list[tuple[Tensor, ...]]]] = {
    "kth_magnitude": (lambda x: ops.kth_magnitude(x, 3) * 2, [(x32(3, 40),), (x32(5, 31),)]),
    "kth_magnitude, a count for each row": (
        lambda x, k: ops.kth_magnitude(x, k),
        [(x64(2, 40), counts(3, 5)), (x64(4, 12), counts(1, 12, 7, 8))],
    ),
    "kth_magnitude of half precision": (lambda x: ops.kth_magnitude(x, 3), [(x32(3, 40).half(),), (x32(5, 9).half(),)]),
    "magnitude_histogram": (histogram_of, [(x32(3, 40),), (x32(5, 31),)]),
    "elect": (
        lambda stack, limits: ops.elect(stack, limits, blocks=[2, 3], reduce="sum"),
        [(x32(2, 3, 5, 5), x32(2, 3).abs()), (x32(4, 7, 5, 5), x32(4, 7).abs())],
    ),
    "kth_magnitude and elect": (ties_like, [(x64(3, 6, 9),), (x64(4, 5, 12),)]),
    "rademacher": (sketch, [(x32(12, 9),), (x32(20, 7),)]),
    "truncated_svd": (lambda A: truncated_svd(A, 4), [(x32(2, 12, 9),), (x32(3, 9, 11),)]),
    "truncated_svd, rank by the shape": (lambda A: truncated_svd(A, min(A.shape) // 2), [(x64(12, 9),), (x64(9, 12),)]),
    "truncated_svd, fast": (lambda A: truncated_svd(A, 4, accuracy="fast", seed=3), [(x32(60, 50),), (x32(50, 60),)]),
    "truncated_svd of a LowRank made inside": (
        update_by_components,
        [(x32(2, 12, 3), x32(2, 3, 9)), (x32(3, 7, 2), x32(3, 2, 8))],
    ),
    "svd": (lambda A: svd(A, False), [(x32(2, 12, 9),), (x32(3, 9, 11),)]),
    "svd, all rows and columns": (lambda A: svd(A).Vh, [(x64(12, 9),), (x64(9, 12),)]),
    "svd with a rank": (lambda A: svd(A, rank=3).S, [(x32(12, 9),), (x32(9, 12),)]),
    "svd of a LowRank made inside": (
        lambda left, right: svd(LowRank(left, right)).S,
        [(x32(12, 3), x32(3, 9)), (x32(7, 2), x32(2, 8))],
    ),
    "svd_lowrank": (lambda A: svd_lowrank(A, 4, niter=1, seed=3), [(x32(60, 50),), (x32(50, 60),)]),
    "polar": (lambda X: polar(X), [(x32(2, 12, 9),), (x32(3, 9, 12),)]),
    "polar with a tolerance": (lambda X: polar(X, tol=1e-3).Q, [(x64(12, 9),), (x64(7, 7),)]),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", TRACED)
def test_a_compiled_function_returns_the_bits_of_eager_mode(name: str, compiler: str, dynamic: bool) -> None:
    function, inputs = TRACED[name]
    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)
    for arguments in inputs:
        expected, found = function(*arguments), compiled(*arguments)
        assert type(found) is type(expected)
        for a, b in zip(tensors(found), tensors(expected), strict=True):
            if name == "rademacher" or "LowRank" in name:  # inductor's own products and sums round otherwise
                torch.testing.assert_close(a, b)
            else:
                assert same_bits(a, b)


def test_dynamic_shapes_compile_once() -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, seed: (ties_like(x), truncated_svd(x, 2, seed=seed), polar(x)),
        backend=counting,
        fullgraph=True,
        dynamic=True,
    )
    for seed, shape in enumerate([(3, 6, 9), (4, 5, 12), (5, 8, 7)], start=2):
        compiled(x32(*shape), seed)
    assert len(graphs) == 1
    recorded = [str(n.target) for n in graphs[0].graph.nodes if str(n.target).startswith("dcmerge.")]
    assert recorded == [f"dcmerge.{name}" for name in ("kth_magnitude", "elect", "truncated_svd", "polar")]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_returns_the_bits_of_eager_mode(strict: bool) -> None:
    class Merge(torch.nn.Module):
        def forward(self, stack: Tensor, left: Tensor, right: Tensor) -> tuple[Any, ...]:
            update = LowRank(left, right)
            return ties_like(stack), histogram_of(stack), truncated_svd(update, 2).S, polar(stack).H, sketch(stack)

    arguments = (x32(3, 6, 9), x32(12, 3), x32(3, 9))
    program = torch.export.export(Merge(), arguments, strict=strict).module()
    for a, b in zip(program(*arguments), Merge()(*arguments), strict=True):
        assert same_bits(a, b)


class TestLowRankInATrace:
    left, right = x32(12, 3), x32(3, 9)

    def test_is_an_argument(self) -> None:
        compiled = torch.compile(lambda update: truncated_svd(update, 2), backend="aot_eager", fullgraph=True)
        update = LowRank(self.left, self.right)
        assert all(same_bits(a, b) for a, b in zip(compiled(update), truncated_svd(update, 2), strict=True))

    def test_is_made_and_returned(self) -> None:
        def scaled(left: Tensor, right: Tensor) -> LowRank:
            return (2 * LowRank.from_lora(right, left, alpha=6).mT).to(torch.float64)

        found = torch.compile(scaled, backend="aot_eager", fullgraph=True)(self.left, self.right)
        expected = scaled(self.left, self.right)
        assert isinstance(found, LowRank)
        assert same_bits(found.left, expected.left)
        assert same_bits(found.right, expected.right)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_passes_through_an_operator(seed: int) -> None:
    compiled = torch.compile(lambda: ops.rademacher(3, 50, seed=seed), backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(), ops.rademacher(3, 50, seed=seed))


# --- as in eager mode ------------------------------------------------------------------------------------------------

X = x32(2, 5)

BAD_CALLS: dict[str, Callable[[], object]] = {
    "a count of 0": lambda: ops.kth_magnitude(X, 0),
    "a count beyond the row": lambda: ops.kth_magnitude(X, torch.tensor([2, 6])),
    "kth_magnitude of integers": lambda: ops.kth_magnitude(X.long(), 1),
    "kth_magnitude of a scalar": lambda: ops.kth_magnitude(X.sum(), 1),
    "magnitude_histogram of half precision": lambda: histogram_of(X.half()),
    "a histogram of another size": lambda: histogram_of(X, width=3),
    "elect of a matrix": lambda: ops.elect(X),
    "thresholds that do not fit": lambda: ops.elect(X[None], torch.ones(3)),
    "blocks that do not fit": lambda: ops.elect(X[None], blocks=[1, 2]),
    "a negative seed": lambda: ops.rademacher(2, 2, seed=-1),
    "a seed of 65 bits": lambda: ops.rademacher(2, 2, seed=2**64),
    "negative rows": lambda: ops.rademacher(-1, 2, seed=0),
    "random integers": lambda: ops.rademacher(2, 2, seed=0, dtype=torch.int64),
    "rank 0": lambda: truncated_svd(X, 0),
    "a negative rank": lambda: truncated_svd(X, -1),
    "a rank beyond the sides": lambda: truncated_svd(LowRank(X.mT, X), 6),
    "an unknown accuracy": lambda: truncated_svd(X, 1, accuracy="good"),
    "a tolerance of 0": lambda: truncated_svd(X, 1, tol=0.0),
    "non-finite entries": lambda: truncated_svd(X / 0, 1),
    "polar of non-finite entries": lambda: polar(X / 0),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_are_those_of_eager_mode_when_the_compiled_function_runs(name: str) -> None:
    call = BAD_CALLS[name]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as expected:
        call()
    with pytest.raises(expected.type) as raised:
        torch.compile(call, backend="aot_eager", fullgraph=True)()
    assert str(raised.value).startswith(str(expected.value))


LIKE_TORCH = {"svd", "svd, all rows and columns", "svd with a rank", "svd_lowrank"}
"""With torch's signatures and torch's gradients."""


@pytest.mark.parametrize("name", sorted(LIKE_TORCH))
def test_functions_of_torch_keep_its_gradients(name: str) -> None:
    function, inputs = TRACED[name]
    argument = inputs[0][0].clone().requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert all(t.requires_grad for t in tensors(compiled(argument)))


@pytest.mark.parametrize("name", [name for name in TRACED if name not in {"rademacher", *LIKE_TORCH}])
def test_the_input_is_detached(name: str) -> None:
    function, inputs = TRACED[name]
    arguments = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs[0]]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert not any(t.requires_grad for t in tensors(compiled(*arguments)))


def test_the_backend_is_chosen_when_the_compiled_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lambda x: ops.kth_magnitude(x, 3), backend="aot_eager", fullgraph=True)
    calls: list[str] = []
    original = reference.kth_magnitude
    monkeypatch.setattr(reference, "kth_magnitude", lambda *a: (calls.append("reference"), original(*a))[1])
    expected = compiled(X)
    assert calls == []
    with use_backend("reference"):
        assert same_bits(compiled(X), expected)
    assert calls == ["reference"]


class OperatorsCalled(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dcmerge":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def call_everything() -> list[Tensor]:
    found = [function(*inputs[0]) for function, inputs in TRACED.values()]
    return [t for part in found for t in tensors(part)]


def test_eager_calls_do_not_pass_through_operators() -> None:
    with OperatorsCalled() as called:
        call_everything()
    assert called.names == []


def test_calls_while_another_thread_compiles_return_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = call_everything()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with OperatorsCalled() as called:
        found = call_everything()
    assert {name.removesuffix(".default") for name in called.names} == {name for name, _ in OPERATOR_CALLS.values()}
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))

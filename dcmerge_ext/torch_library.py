"""The operations as operators of torch, ``torch.ops.dcmerge``: what torch.compile and torch.export record.

An operator runs the function of the same name with its validation, so errors are those of eager mode, raised when the
compiled function runs. Its fake kernel tells the shapes, dtypes and strides of the outputs and refuses nothing. Compilers
leave out an operator whose result nothing uses, and its errors with it.

The backend is chosen where the operator runs: ``use_backend`` holds around a call of the compiled function, and breaks
the graph inside it. Gradients are not defined: the public functions detach their input, and backward through an
operator that was called by name raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from dcmerge_ext import ops
from dcmerge_ext.linalg.polar import Polar, polar, polar_with_values
from dcmerge_ext.linalg.svd import full_svd, lowrank_svd
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.svd.components import Accuracy, Components
from dcmerge_ext.svd.start import Start
from dcmerge_ext.svd.truncated import decompose, truncated_svd
from dcmerge_ext.tracing import stands_for

_Factors = tuple[Tensor, Tensor, Tensor]
_HALF = 1 << 32

# --- kth_magnitude ---------------------------------------------------------------------------------------------------


@custom_op("dcmerge::kth_magnitude", mutates_args=(), schema="(Tensor x, Tensor counts) -> Tensor")
def _kth_magnitude(x: Tensor, counts: Tensor) -> Tensor:
    found: Tensor = inspect.unwrap(ops.kth_magnitude)(x, counts)
    return found


@_kth_magnitude.register_fake
def _(x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1])


@stands_for(ops.kth_magnitude)
def _traced_kth_magnitude(x: Tensor, counts: int | Tensor) -> Tensor:
    if not isinstance(counts, Tensor):
        counts = torch.full((), counts, dtype=torch.int64, device="cpu")
    found: Tensor = torch.ops.dcmerge.kth_magnitude(x.detach(), counts)
    return found


# --- magnitude_histogram ---------------------------------------------------------------------------------------------


@custom_op(
    "dcmerge::magnitude_histogram",
    mutates_args=("out",),
    schema="(Tensor x, Tensor(a!) out, SymInt shift, SymInt width, SymInt prefix) -> ()",
)
def _magnitude_histogram(x: Tensor, out: Tensor, shift: int, width: int, prefix: int) -> None:
    inspect.unwrap(ops.magnitude_histogram)(x, out, shift=shift, width=width, prefix=prefix)


@_magnitude_histogram.register_fake
def _(x: Tensor, out: Tensor, shift: int, width: int, prefix: int) -> None:
    pass


@stands_for(ops.magnitude_histogram)
def _traced_magnitude_histogram(x: Tensor, out: Tensor, *, shift: int, width: int, prefix: int = 0) -> None:
    torch.ops.dcmerge.magnitude_histogram(x.detach(), out, shift, width, prefix)


# --- elect -----------------------------------------------------------------------------------------------------------


@custom_op(
    "dcmerge::elect",
    mutates_args=(),
    schema="(Tensor stack, Tensor? thresholds, SymInt[]? blocks, SymInt zero_sum, str reduce) -> Tensor",
)
def _elect(
    stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, reduce: str
) -> Tensor:
    merged: Tensor = inspect.unwrap(ops.elect)(stack, thresholds, blocks=blocks, zero_sum=zero_sum, reduce=reduce)
    return merged


@_elect.register_fake
def _(stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, reduce: str) -> Tensor:
    return stack.new_empty(stack.shape[:-3] + stack.shape[-2:])


@stands_for(ops.elect)
def _traced_elect(
    stack: Tensor,
    thresholds: Tensor | None = None,
    *,
    blocks: Sequence[int] | None = None,
    zero_sum: int = 0,
    reduce: str = "mean",
) -> Tensor:
    limits = None if thresholds is None else thresholds.detach()
    sizes = None if blocks is None else list(blocks)
    merged: Tensor = torch.ops.dcmerge.elect(stack.detach(), limits, sizes, zero_sum, reduce)
    return merged


# --- rademacher ------------------------------------------------------------------------------------------------------


@custom_op(
    "dcmerge::rademacher",
    mutates_args=(),
    schema="(SymInt rows, SymInt cols, SymInt[] seed, str key, SymInt task, SymInt stream, ScalarType dtype, Device device) -> Tensor",
)
def _rademacher(
    rows: int,
    cols: int,
    seed: Sequence[int],
    key: str,
    task: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    signs: Tensor = inspect.unwrap(ops.rademacher)(
        rows, cols, seed=_joined(seed), key=key, task=task, stream=stream, dtype=dtype, device=device
    )
    return signs


@_rademacher.register_fake
def _(
    rows: int,
    cols: int,
    seed: Sequence[int],
    key: str,
    task: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(_at_least_0(rows), _at_least_0(cols), dtype=dtype, device=device)


@stands_for(ops.rademacher)
def _traced_rademacher(
    rows: int,
    cols: int,
    *,
    seed: int,
    key: str = "",
    task: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    signs: Tensor = torch.ops.dcmerge.rademacher(
        rows, cols, _split(seed), key, task, stream, dtype, torch.device(device)
    )
    return signs


# --- truncated_svd ---------------------------------------------------------------------------------------------------


@custom_op(
    "dcmerge::truncated_svd",
    mutates_args=(),
    schema="(Tensor A, SymInt rank, str accuracy, float? tol, SymInt[] seed) -> (Tensor, Tensor, Tensor)",
)
def _truncated_svd(A: Tensor, rank: int, accuracy: Accuracy, tol: float | None, seed: Sequence[int]) -> _Factors:
    (U, S, Vh), _ = decompose(A, rank, accuracy=accuracy, tol=tol, start=Start(_joined(seed)))
    return U.contiguous(), S.contiguous(), Vh.contiguous()


@_truncated_svd.register_fake
def _(A: Tensor, rank: int, accuracy: Accuracy, tol: float | None, seed: Sequence[int]) -> _Factors:
    return _empty_components(A, A, rank, torch.float64 if A.dtype == torch.float64 else torch.float32)


@custom_op(
    "dcmerge::truncated_svd_factors",
    mutates_args=(),
    schema="(Tensor left, Tensor right, SymInt rank, str accuracy, float? tol) -> (Tensor, Tensor, Tensor)",
)
def _truncated_svd_factors(left: Tensor, right: Tensor, rank: int, accuracy: Accuracy, tol: float | None) -> _Factors:
    (U, S, Vh), _ = decompose(LowRank(left, right), rank, accuracy=accuracy, tol=tol)
    return U.contiguous(), S.contiguous(), Vh.contiguous()


@_truncated_svd_factors.register_fake
def _(left: Tensor, right: Tensor, rank: int, accuracy: Accuracy, tol: float | None) -> _Factors:
    return _empty_components(left, right, rank, torch.float64)


@stands_for(truncated_svd)
def _traced_truncated_svd(
    A: Update, rank: int, *, accuracy: Accuracy = "exact", tol: float | None = None, seed: int = 0
) -> Components:
    if isinstance(A, LowRank):
        factors = A.left.detach(), A.right.detach()
        return Components(*torch.ops.dcmerge.truncated_svd_factors(*factors, rank, accuracy, tol))
    return Components(*torch.ops.dcmerge.truncated_svd(A.detach(), rank, accuracy, tol, _split(seed)))


# --- svd, svd_lowrank --------------------------------------------------------------------------------------------------


@custom_op("dcmerge::svd", mutates_args=(), schema="(Tensor A, bool full_matrices) -> (Tensor, Tensor, Tensor)")
def _svd(A: Tensor, full_matrices: bool) -> _Factors:
    U, S, Vh = inspect.unwrap(full_svd)(A, full_matrices)
    return U.contiguous(), S.contiguous(), Vh.contiguous()


@_svd.register_fake
def _(A: Tensor, full_matrices: bool) -> _Factors:
    m, n = A.shape[-2:]
    q = torch.sym_min(m, n)  # type: ignore[no-untyped-call]
    dtype = torch.float32 if A.dtype.itemsize < 4 else A.dtype
    values = dtype.to_real() if dtype.is_complex else dtype
    left, right = (m, n) if full_matrices else (q, q)
    return (
        A.new_empty((*A.shape[:-1], left), dtype=dtype),
        A.new_empty((*A.shape[:-2], q), dtype=values),
        A.new_empty((*A.shape[:-2], right, n), dtype=dtype),
    )


@stands_for(full_svd)
def _traced_full_svd(A: Tensor, full_matrices: bool) -> _Factors:
    found: _Factors = torch.ops.dcmerge.svd(A.detach(), full_matrices)
    return found


@custom_op(
    "dcmerge::svd_lowrank",
    mutates_args=(),
    schema="(Tensor A, SymInt rank, SymInt power_steps, SymInt[] seed) -> (Tensor, Tensor, Tensor)",
)
def _svd_lowrank(A: Tensor, rank: int, power_steps: int, seed: Sequence[int]) -> _Factors:
    U, S, Vh = inspect.unwrap(lowrank_svd)(A, rank, power_steps, _joined(seed))
    return U.contiguous(), S.contiguous(), Vh.contiguous()


@_svd_lowrank.register_fake
def _(A: Tensor, rank: int, power_steps: int, seed: Sequence[int]) -> _Factors:
    return _empty_components(A, A, rank, torch.float64 if A.dtype == torch.float64 else torch.float32)


@stands_for(lowrank_svd)
def _traced_lowrank_svd(A: Tensor, rank: int, power_steps: int, seed: int) -> _Factors:
    found: _Factors = torch.ops.dcmerge.svd_lowrank(A.detach(), rank, power_steps, _split(seed))
    return found


# --- polar -----------------------------------------------------------------------------------------------------------


@custom_op("dcmerge::polar", mutates_args=(), schema="(Tensor X, float? tol) -> (Tensor, Tensor)")
def _polar(X: Tensor, tol: float | None) -> tuple[Tensor, Tensor]:
    Q, H, _ = polar_with_values(X, tol)
    return Q, H


@_polar.register_fake
def _(X: Tensor, tol: float | None) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if X.dtype == torch.float64 else torch.float32
    return X.new_empty(X.shape, dtype=dtype), X.new_empty(X.shape[:-2] + 2 * X.shape[-1:], dtype=dtype)


@stands_for(polar)
def _traced_polar(X: Tensor, *, tol: float | None = None) -> Polar:
    return Polar(*torch.ops.dcmerge.polar(X.detach(), tol))


# --- shared ----------------------------------------------------------------------------------------------------------


def _empty_components(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> _Factors:
    """Those of a matrix with the rows of ``left`` and the columns of ``right``."""
    slots = (_at_least_0(rank),)
    U, S, Vh = (*left.shape[:-1], *slots), (*left.shape[:-2], *slots), (*left.shape[:-2], *slots, *right.shape[-1:])
    return left.new_empty(U, dtype=dtype), left.new_empty(S, dtype=dtype), left.new_empty(Vh, dtype=dtype)


def _at_least_0(size: int) -> int:
    clamped: int = torch.sym_max(size, 0)  # type: ignore[no-untyped-call]
    return clamped


def _split(seed: int) -> list[int]:
    """High and low half: a seed is unsigned with 64 bits, an operator's integers are signed."""
    return [seed // _HALF, seed % _HALF]


def _joined(seed: Sequence[int]) -> int:
    high, low = seed
    return high * _HALF + low

"""Rows of the GPU benchmark that are one kernel: inputs, truth, rivals, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cases
import cub
import flops
import oracle
import reference
import torch
from case import Check
from device_case import Bench, DeviceCase, DeviceProblem, DeviceRival
from roofline import Needs
from torch import Tensor

from dcmerge_ext import ops, smoothing, use_backend
from dcmerge_ext import reference as plain
from dcmerge_ext.backends import for_device
from dcmerge_ext.linalg.iterations import coefficients

_DIGITS = {torch.float32: 3, torch.float64: 6}
"""Passes of a selection."""
_CONDITION = 100.0
"""Of the matrices whose polar factor is sought."""
_RIVALS = 4.0
"""Rivals may be this many times less accurate than ours must be."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- random signs ------------------------------------------------------------------------------------------------------


def rademacher(rows: int, cols: int) -> DeviceCase:
    def prepare(bench: Bench) -> DeviceProblem:
        with use_backend("cpu"):
            expected = ops.rademacher(rows, cols, seed=0)

        def signs(answer: Tensor) -> Check:
            complaint = "" if bool((answer.abs() == 1).all()) else "not all of them are signs"
            return Check(0.0, 0.0, complaint=complaint)

        return DeviceProblem(
            ours=lambda: ops.rademacher(rows, cols, seed=0, device=bench.device),
            check=_same_bits(expected),
            rivals=[
                DeviceRival(
                    "torch bernoulli_",
                    lambda: torch.empty(rows, cols, device=bench.device).bernoulli_(0.5).mul_(2).sub_(1),
                    signs,
                    note="other signs",
                )
            ],
            manner="cold",
        )

    return DeviceCase(f"rademacher/float32/{rows}x{cols}", Needs(4.0 * rows * cols), prepare)


# --- selection ---------------------------------------------------------------------------------------------------------


def kth_magnitude(rows: int, length: int, dtype: torch.dtype) -> DeviceCase:
    """A thousandth of each row is kept."""
    count = max(1, length // 1000)

    def prepare(bench: Bench) -> DeviceProblem:
        x = cases.normal(rows, length, seed=0, dtype=dtype)
        with use_backend("cpu"):
            expected = ops.kth_magnitude(x, count)
        x = x.to(bench.device)
        counts = torch.full((rows,), count, device=bench.device)
        return DeviceProblem(
            ours=lambda: ops.kth_magnitude(x, counts),
            check=_same_bits(expected),
            rivals=[
                DeviceRival("torch topk", lambda: reference.thresholds(x, count)),
                *cub.kth_magnitude_rivals(x, count),
            ],
            manner="cold",
        )

    launches = 1 if length <= 16384 else 1 + 2 * _DIGITS[dtype]
    needs = Needs(dtype.itemsize * (rows * length + rows), launches=launches)
    return DeviceCase(f"kth_magnitude/{name_of(dtype)}/{rows}x{length}", needs, prepare)


def magnitude_histogram(length: int, width: int, dtype: torch.dtype) -> DeviceCase:
    """Of the leading digit."""
    shift = (31 if dtype == torch.float32 else 63) - width

    def prepare(bench: Bench) -> DeviceProblem:
        x = cases.normal(length, seed=0, dtype=dtype)
        expected = torch.zeros(1 << width, dtype=torch.int64)
        with use_backend("cpu"):
            ops.magnitude_histogram(x, expected, shift=shift, width=width)
        x = x.to(bench.device)
        out = torch.zeros_like(expected, device=bench.device)

        def counted(count: Callable[..., None]) -> Tensor:
            out.zero_()
            count(x, out, shift=shift, width=width, prefix=0)
            return out

        return DeviceProblem(
            ours=lambda: counted(ops.magnitude_histogram),
            check=_same_bits(expected),
            rivals=[
                DeviceRival("torch bincount", lambda: counted(plain.magnitude_histogram)),
                cub.histogram_rival(x, shift, width),
            ],
            manner="cold",
        )

    needs = Needs(dtype.itemsize * length + 8.0 * (1 << width), launches=2)
    return DeviceCase(f"magnitude_histogram/{name_of(dtype)}/{length}/{width} bits", needs, prepare)


# --- election and projection -------------------------------------------------------------------------------------------


def elect(tasks: int, side: int, *, masked: bool) -> DeviceCase:
    block = side // tasks
    blocks = [block] * tasks if masked else None

    def prepare(bench: Bench) -> DeviceProblem:
        cores = cases.normal(tasks, side, side, seed=0, dtype=torch.float32)
        limits = reference.thresholds(cores, max(1, side * side // 1000))
        with use_backend("cpu"):
            expected = ops.elect(cores, limits, blocks=blocks)
        cores, limits = cores.to(bench.device), limits.to(bench.device)

        def composition() -> Tensor:
            return reference.elect(cores, limits, block) if masked else reference.disjoint_mean(cores, limits)

        return DeviceProblem(
            ours=lambda: ops.elect(cores, limits, blocks=blocks),
            check=_same_bits(expected),
            rivals=[DeviceRival("torch composition", composition, _near(expected, 1e-6))],
            manner="cold",
        )

    read = tasks * side * (block if masked else side)
    needs = Needs(4.0 * (read + side * side), launches=1)
    return DeviceCase(f"elect/float32/{tasks}x{side}x{side}/{'masked' if masked else 'unmasked'}", needs, prepare)


def project(k: int, tasks: int, dtype: torch.dtype) -> DeviceCase:
    rank = k // tasks
    ranks = [rank] * tasks
    bound = 16 * (rank + 2) * torch.finfo(dtype).eps

    def prepare(bench: Bench) -> DeviceProblem:
        left, right = (cases.normal(k, k, seed=seed, dtype=dtype) for seed in (0, 1))
        s = cases.normal(k, seed=2, dtype=dtype).abs()
        counts = torch.full((tasks,), max(1, k * k // 1000))
        batched = (x.double()[None] for x in (left, right, s))
        expected = [x[0] for x in plain.project(*batched, ranks, counts[None], ranks)]
        left, right, s, counts = (x.to(bench.device) for x in (left, right, s, counts))

        def stored() -> tuple[Tensor, Tensor, Tensor]:
            """One batch of library products, a selection that reads it, and its diagonal blocks."""
            mine, other = (x.view(k, tasks, rank).transpose(0, 1) for x in (left * s, right))
            cores = mine @ other.mT
            blocks = cores.view(tasks, tasks, rank, tasks, rank).diagonal(dim1=1, dim2=3).movedim(-1, 1)
            thresholds = ops.kth_magnitude(cores.flatten(1), counts)
            return blocks.reshape(tasks, -1), thresholds, torch.linalg.vector_norm(cores.flatten(1), torch.inf, dim=1)

        return DeviceProblem(
            ours=lambda: ops.project(left, right, s, ranks=ranks, counts=counts, sizes=ranks),
            check=_near(expected, bound),
            rivals=[DeviceRival("library products + kth_magnitude + gather", stored)],
            manner="cold",
        )

    # in: both roots and the values; out: the blocks, k entries of k for each of the tasks' ranks, and two per task
    needs = Needs(dtype.itemsize * (3.0 * k * k + k + 2 * tasks), 2.0 * k**3, dtype, 3 + 2 * _DIGITS[dtype])
    return DeviceCase(f"project/{name_of(dtype)}/k{k}/T{tasks}", needs, prepare)


# --- small factorizations ----------------------------------------------------------------------------------------------


def orthonormalize(count: int, length: int) -> DeviceCase:
    """Launches: to float64, Gram matrix, panel, its pivots to the host, product, to float32."""

    def prepare(bench: Bench) -> DeviceProblem:
        rows = cases.normal(count, length, seed=0, dtype=torch.float32)
        truth = torch.linalg.qr(rows.double().mT).Q
        rows = rows.to(bench.device)

        def check(basis: Tensor | None) -> Check:
            if basis is None:
                return Check(0.0, 0.0, complaint="independent rows were called dependent")
            found = basis.cpu()
            return Check(oracle.projector_error(found.mT, truth), 1e-6, {"QQ' - I": _not_orthonormal(found.mT)})

        return DeviceProblem(
            ours=lambda: ops.orthonormalize(rows),
            check=check,
            rivals=[
                DeviceRival("torch.linalg.qr", lambda: torch.linalg.qr(rows.mT).Q.mT),
                DeviceRival("torch Cholesky, float64", lambda: plain.orthonormalize(rows, 0.0)),
            ],
            manner="warm",
        )

    needs = Needs(8.0 * count * length, 4.0 * count**2 * length, torch.float64, 6)
    return DeviceCase(f"orthonormalize/float32/{count}x{length}", needs, prepare)


def small_svd(batch: int, order: int, dtype: torch.dtype) -> DeviceCase:
    """Launches: the kernel, and three that mark what did not converge."""
    bound = 4 * order * torch.finfo(dtype).eps

    def prepare(bench: Bench) -> DeviceProblem:
        A = cases.normal(batch, order, order, seed=0, dtype=dtype)
        wide, values = A.double(), torch.linalg.svdvals(A.double())

        def check(found: Sequence[Tensor]) -> Check:
            U, S, Vh = (x.cpu().double() for x in found)
            errors = {
                "values": float(((S - values).abs() / values[:, :1]).amax()),
                "A - USV'": float(((U * S[:, None] @ Vh - wide).abs() / values[:, :1, None]).amax()),
                "U'U - I": _not_orthonormal(U) / 2,
                "VV' - I": _not_orthonormal(Vh.mT) / 2,
            }
            return Check(max(errors.values()), bound, errors)

        A = A.to(bench.device)
        backend = for_device(bench.device)
        return DeviceProblem(
            ours=lambda: backend.svd(A),
            check=check,
            rivals=[DeviceRival("torch.linalg.svd", lambda: torch.linalg.svd(A))],
            manner="warm",
            rival_bound=_RIVALS * bound,
        )

    entries = batch * (3.0 * order**2 + order)
    needs = Needs(dtype.itemsize * entries, batch * flops.svd(order, order, order), dtype, 4)
    return DeviceCase(f"small_svd/{name_of(dtype)}/{batch}x{order}x{order}", needs, prepare)


def newton_schulz(batch: int, order: int) -> DeviceCase:
    """Polar factors at condition 100, all steps of the iteration."""
    dtype = torch.float32
    steps = coefficients(1 / _CONDITION, torch.finfo(dtype).eps)
    bound = 64 * torch.finfo(dtype).eps

    def prepare(bench: Bench) -> DeviceProblem:
        sides = (torch.linalg.qr(cases.normal(batch, order, order, seed=seed)).Q for seed in (0, 1))
        U, V = sides
        X = (U * torch.linspace(1, 1 / _CONDITION, order, dtype=torch.float64) @ V.mT).to(dtype)
        truth = reference.polar_by_svd(X.double())
        X = X.to(bench.device)
        backend = for_device(bench.device)
        return DeviceProblem(
            ours=lambda: backend.newton_schulz(X, steps),
            check=_near(truth, bound),
            rivals=[
                DeviceRival("torch loop", lambda: plain.newton_schulz(X, steps)),
                DeviceRival("SVD", lambda: reference.polar_by_svd(X)),
            ],
            manner="warm",
            rival_bound=_RIVALS * bound,
        )

    one = sum(6 if c else 4 for _, _, c in steps) * order**3
    needs = Needs(2.0 * dtype.itemsize * batch * order**2, float(batch * one), dtype, 1)
    return DeviceCase(f"newton_schulz/{name_of(dtype)}/{batch}x{order}x{order}/{len(steps)} steps", needs, prepare)


def smooth_energy(rows: int, length: int, dtype: torch.dtype, kind: smoothing.Smoothing) -> DeviceCase:
    def prepare(bench: Bench) -> DeviceProblem:
        S = cases.normal(rows, length, seed=0, dtype=dtype).abs().sort(dim=-1, descending=True).values
        parameter = {"average": 0.0, "linear": 5.0}[kind]
        truth = plain.smooth_energy(S.double(), kind, parameter)
        S = S.to(bench.device)
        return DeviceProblem(
            ours=lambda: smoothing.smooth_energy(S, kind),
            check=_near(truth, 4 * torch.finfo(dtype).eps),
            rivals=[DeviceRival("torch composition", lambda: plain.smooth_energy(S, kind, parameter))],
            manner="cold",
        )

    needs = Needs(2.0 * dtype.itemsize * rows * length)
    return DeviceCase(f"smooth_energy/{name_of(dtype)}/{rows}x{length}/{kind}", needs, prepare)


# --- checks ------------------------------------------------------------------------------------------------------------


def _same_bits(expected: Tensor) -> Callable[[Tensor], Check]:
    def check(answer: Tensor) -> Check:
        found = answer.cpu()
        differ = int((found != expected).sum())
        return Check(differ / expected.numel(), 0.0, complaint=f"{differ} entries differ" if differ else "")

    return check


def _near(expected: Tensor | Sequence[Tensor], bound: float) -> Callable[[Any], Check]:
    """Relative Frobenius distance; of several tensors, the worst."""

    def check(answer: Tensor | Sequence[Tensor]) -> Check:
        pairs = [(answer, expected)] if isinstance(answer, Tensor) else list(zip(answer, expected, strict=True))
        return Check(max(oracle.relative(found.cpu(), truth) for found, truth in pairs), bound)

    return check


def _not_orthonormal(columns: Tensor) -> float:
    """Largest entry of Q'Q - I."""
    gram = columns.double().mT @ columns.double()
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().amax())

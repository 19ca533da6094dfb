"""TSV-M, Iso-C, Iso-CTS and SCORE of one matrix. Full SVDs of 4096 x 4096 are timed once and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import cases
import flops
import oracle
import torch
from case import Check, Problem, Rival, Setting
from methods_reference import spectral as reference
from near_ties import Decided, settled
from reference import LORA_RANK, full_svd
from torch import Tensor

from dcmerge_ext import LowRank, methods
from dcmerge_ext.lowrank import Update
from method_rows.common import (
    DOUBLE,
    LAPACK,
    LINALG,
    SINGLE,
    adapters,
    components,
    doubled,
    extrapolated,
    full_updates,
    near,
    single,
    task_svds,
    total,
)


def tsv_m(setting: Setting, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    if lora:
        factors = adapters(setting, m, n, tasks)
        exact = components(factors)
        parts = [single(p) for p in exact]
        return _adapters(
            partial(methods.tsv_m, factors),
            extrapolated(lambda: reference.tsv_m(parts), [task_svds(factors)], f"{tasks} x one full SVD"),
            near(reference.tsv_m(exact), DOUBLE),
            _cover_flops(factors),
        )
    updates = full_updates(setting, m, n, tasks)
    rank = min(updates[0].shape) // tasks

    def rival(given: Sequence[Tensor]) -> Tensor:
        return reference.tsv_m([full_svd(update, rank) for update in given])

    return _dense(
        partial(methods.tsv_m, updates),
        partial(rival, updates),
        near(rival(_doubles(updates)), SINGLE),
        flops.cover_method(*updates[0].shape, tasks, rank),
    )


def iso_c(setting: Setting, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    """Of adapters the mean is over the k singular values of the sum, as in the comparison of DC-Merge."""
    if lora:
        factors = adapters(setting, m, n, tasks)
        k = tasks * LORA_RANK
        exact = oracle.components(total(factors), k)
        parts = single(exact)
        return _adapters(
            partial(methods.iso_c, factors),
            extrapolated(
                lambda: reference.iso_c(parts), [(1, lambda: full_svd(_dense_sum(factors), k))], "the SVD of the sum"
            ),
            near(reference.iso_c(exact), DOUBLE),
            flops.lowrank_svd(*factors[0].shape, k),
        )
    updates = full_updates(setting, m, n, tasks)
    q = min(updates[0].shape)

    def rival(given: Sequence[Tensor]) -> Tensor:
        return reference.iso_c(full_svd(torch.stack(list(given)).sum(0), q))

    problem = _dense(
        partial(methods.iso_c, updates),
        partial(rival, updates),
        near(rival(_doubles(updates)), SINGLE),
        flops.polar(max(updates[0].shape), q),
    )
    return replace(
        problem, note="a polar factor by eigenvectors is tried first, and the spectrum is found too wide for it"
    )


def iso_cts(setting: Setting, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    if lora:
        return _iso_cts_adapters(adapters(setting, m, n, tasks))
    updates = full_updates(setting, m, n, tasks)
    q = min(updates[0].shape)
    common, own = reference.iso_cts_sizes(q, tasks)
    return _dense(
        partial(methods.iso_cts, updates),
        lambda: reference.iso_cts(updates, q),
        near(reference.iso_cts(_doubles(updates), q), SINGLE),
        flops.iso_cts(*updates[0].shape, tasks, common, own),
    )


def _iso_cts_adapters(factors: Sequence[LowRank]) -> Problem:
    tasks, k = len(factors), len(factors) * LORA_RANK
    common, own = reference.iso_cts_sizes(k, tasks, least=1)
    shared = oracle.components(total(factors), common)
    exact = [
        oracle.components(LowRank(reference.rest(u.left.double(), shared.U), u.right.double()), own) for u in factors
    ]
    found, parts = single(shared), [single(p) for p in exact]
    first = factors[0]
    rival = extrapolated(
        lambda: reference.iso_cts_of(found, parts),
        [
            (1, lambda: full_svd(_dense_sum(factors), common)),
            (tasks, lambda: full_svd(reference.rest(first.dense(), found.U), own)),
        ],
        f"the SVD of the sum and {tasks} x one of what it leaves of a task",
    )
    return _adapters(
        partial(methods.iso_cts, factors),
        rival,
        near(reference.iso_cts_of(shared, exact), DOUBLE),
        flops.iso_cts_factors(*first.shape, tasks, LORA_RANK, common),
    )


def score(setting: Setting, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    """Trimmed at the threshold of the paper, centred at 0, our default."""
    if lora:
        factors = adapters(setting, m, n, tasks)
        exact = components(factors)
        parts = [single(p) for p in exact]
        k = tasks * LORA_RANK
        return _adapters(
            partial(methods.score, factors),
            extrapolated(
                lambda: reference.score(parts, [u.dense() for u in factors]),
                [task_svds(factors)],
                f"{tasks} x one full SVD",
            ),
            _score_check(reference.score_cores(exact, [u.to(torch.float64).dense() for u in factors]), DOUBLE),
            _cover_flops(factors) + 2 * tasks * k**2 * LORA_RANK + 2 * factors[0].shape[0] * k**2,
        )
    updates = full_updates(setting, m, n, tasks)
    rank = min(updates[0].shape) // tasks
    exact = [full_svd(update, rank) for update in _doubles(updates)]
    rows, columns = updates[0].shape
    k = tasks * rank
    return _dense(
        partial(methods.score, updates),
        lambda: reference.score([full_svd(update, rank) for update in updates], updates),
        _score_check(reference.score_cores(exact, _doubles(updates)), SINGLE),
        flops.cover_method(rows, columns, tasks, rank)
        + tasks * (2 * rows * columns * k + 2 * min(rows, columns) * k**2)
        + 2 * rows * k**2,
    )


def _score_check(truth: reference.Cores, bound: float) -> Callable[[Update], Check]:
    """An entry of a core near its threshold may fall either way: what the answer decided is read off it, in the basis."""
    kept = truth.kept()
    limits = truth.limits[:, None, None]
    near_limit = ((truth.off.abs() - limits).abs() <= oracle.MARGIN * limits).flatten(1)
    expected = truth.merged_core(kept)
    off, chosen, diagonal = truth.off.flatten(1), kept.flatten(1), truth.diagonals.sum(0).diag().flatten()

    def values(entries: Tensor, inverted: Tensor) -> Tensor:
        own = torch.where(chosen[:, entries] ^ inverted, off[:, entries], 0).sum(0)
        return own + diagonal[entries]

    decided = Decided(expected, near_limit, values)

    def check(answer: Update) -> Check:
        found = cases.dense(answer)
        core, otherwise = settled(truth.left.mT @ found.double() @ truth.right.mT, decided, bound)
        error = oracle.relative(found, truth.left @ core @ truth.right)
        return Check(error, bound, {"kept otherwise": float(otherwise)})

    return check


def _cover_flops(factors: Sequence[LowRank]) -> float:
    return flops.cover_method(*factors[0].shape, len(factors), factors[0].rank, factored=True)


def _dense_sum(factors: Sequence[LowRank]) -> Tensor:
    return torch.stack([u.dense() for u in factors]).sum(0)


def _doubles(updates: Sequence[Tensor]) -> list[Tensor]:
    return [u for u in doubled(updates) if isinstance(u, Tensor)]


def _dense(
    ours: Callable[[], Update], rival: Callable[[], Tensor], check: Callable[[Update], Check], needed: float
) -> Problem:
    return Problem(ours, [Rival(LINALG, [("", rival)])], check, rival_bound=LAPACK, flops=needed)


def _adapters(
    ours: Callable[[], Update],
    rival: Rival,
    check: Callable[[Update], Check],
    needed: float,
) -> Problem:
    return Problem(ours, [rival], check, rival_bound=SINGLE, flops=needed)

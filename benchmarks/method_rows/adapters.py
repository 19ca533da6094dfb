"""KnOTS, Core Space and RobustMerge of one layer: methods for LoRA alone."""

from __future__ import annotations

from functools import partial

import cases
import flops
import oracle
import torch
from case import Check, Problem, Rival, Setting
from methods_reference import adapters as reference
from near_ties import settled
from reference import LORA_RANK, full_svd

from dcmerge_ext import LowRank, methods
from dcmerge_ext.lowrank import Update
from method_rows.common import (
    DOUBLE,
    LAPACK,
    LINALG,
    PLAIN,
    ROUNDED,
    adapters,
    doubled,
    extrapolated,
    near,
    side_by_side,
    single,
)
from method_rows.elementwise import ties_decided


def knots(setting: Setting, m: int, n: int, tasks: int) -> Problem:
    """The rival decomposes in float32, half the time of the published float64."""
    factors = adapters(setting, m, n, tasks)
    k = tasks * LORA_RANK
    exact = oracle.components(side_by_side(factors), k)
    parts = single(exact)
    truth = ties_decided(reference.knots_aligned(exact, tasks))

    def check(answer: Update) -> Check:
        """What was decided is read off the answer in the shared basis."""
        found = cases.dense(answer)
        aligned, otherwise = settled(exact.U.mT @ found.double(), truth, DOUBLE)
        return Check(oracle.relative(found, exact.U @ aligned), DOUBLE, {"kept otherwise": float(otherwise)})

    return Problem(
        ours=partial(methods.knots, factors),
        rivals=[
            extrapolated(
                lambda: reference.knots(parts, tasks),
                [(1, lambda: full_svd(torch.cat([u.dense() for u in factors], 1), k))],
                f"one full SVD of {factors[0].shape[0]} x {tasks * factors[0].shape[1]}",
            )
        ],
        check=check,
        rival_bound=LAPACK,
        flops=flops.knots(*factors[0].shape, tasks, LORA_RANK),
    )


def core_space(setting: Setting, m: int, n: int, tasks: int) -> Problem:
    """Isotropic TSV-M, in float64 on both sides as published."""
    factors = adapters(setting, m, n, tasks)
    exact = [u for u in doubled(factors) if isinstance(u, LowRank)]
    return Problem(
        ours=partial(methods.core_space, factors),
        rivals=[Rival(LINALG, [("", partial(reference.core_space, factors))])],
        check=near(reference.core_space(exact), DOUBLE),
        flops=flops.core_space(*factors[0].shape, tasks, LORA_RANK),
    )


def robust_merge(setting: Setting, m: int, n: int, tasks: int) -> Problem:
    """The selections see the factors as they are, so that no entry is decided by round-off."""
    factors = adapters(setting, m, n, tasks)
    exact = [u for u in doubled(factors) if isinstance(u, LowRank)]
    return Problem(
        ours=partial(methods.robust_merge, factors),
        rivals=[Rival(PLAIN, [("", partial(reference.robust_merge, factors))])],
        check=near(cases.dense(reference.robust_merge(exact)), ROUNDED),
        traffic=flops.robust_merge_bytes(*factors[0].shape, tasks, LORA_RANK),
    )

"""ESM of one layer, from Gram matrices of synthetic activations; the rival has the activations themselves."""

from __future__ import annotations

from functools import partial

import flops
import torch
from case import Problem, Rival, Setting
from methods_reference import spectral as reference
from reference import full_svd
from torch import Tensor

from dcmerge_ext import LowRank, methods
from dcmerge_ext.calibration import Grams
from dcmerge_ext.products import gram_float64
from method_rows.common import DOUBLE, LAPACK, LINALG, SINGLE, adapters, extrapolated, full_updates, near


def esm(setting: Setting, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    """Twice as many tokens as inputs: 32 samples of 50 for 768 of them, of 256 for 4096."""
    return _adapters(adapters(setting, m, n, tasks)) if lora else _dense(full_updates(setting, m, n, tasks))


def _dense(updates: list[Tensor]) -> Problem:
    tasks, (m, n) = len(updates), updates[0].shape
    rank = m // tasks
    activations = [_activations(2 * n, n, seed) for seed in range(tasks)]

    def rival(dtype: torch.dtype) -> Tensor:
        given = [update.to(dtype) for update in updates]
        pairs = zip(activations, given, strict=True)
        return reference.esm([reference.output_shifts(X.to(dtype), update, rank) for X, update in pairs], given)

    grams = tuple(_gram(X) for X in activations)
    return Problem(
        # the published code drops no direction; our default tolerance may, of a square A
        ours=partial(methods.esm, updates, activations=grams, basis_tol=0.0),
        rivals=[Rival(LINALG, [("", partial(rival, torch.float32))])],
        check=near(rival(torch.float64), SINGLE),
        rival_bound=LAPACK,
        flops=flops.esm(m, n, tasks, rank),
        note="every matrix is merged twice, the first time for the norms that scale layers; the rival holds them",
    )


def _adapters(factors: list[LowRank]) -> Problem:
    """The shifts of a task lie in the columns of its B: exact ones from A X'X A'."""
    tasks, (m, n), rank = len(factors), factors[0].shape, factors[0].rank
    grams, exact = [], []
    for seed, update in enumerate(factors):
        X = _activations(2 * n, n, seed)
        grams.append(_gram(X))
        reduced = X.double() @ update.right.double().mT
        found = full_svd(update.left.double() @ torch.linalg.qr(reduced, mode="r").R.mT, rank)
        exact.append(reference.Shifts(found.U, found.S))
    shifts = [reference.Shifts(*(x.float() for x in found)) for found in exact]
    last = factors[-1]
    truth = reference.esm(exact, [u.to(torch.float64).dense() for u in factors])
    return Problem(
        ours=partial(methods.esm, factors, activations=tuple(grams)),
        rivals=[
            extrapolated(
                lambda: reference.esm(shifts, [u.dense() for u in factors]),
                [(tasks, lambda: reference.output_shifts(X, last.dense(), rank))],
                f"{tasks} x one SVD of the shifts of {2 * n} tokens",
            )
        ],
        check=near(truth, DOUBLE),
        rival_bound=LAPACK,
        flops=flops.esm_factors(m, n, tasks, rank),
        note="every matrix is merged twice, the first time for the norms that scale layers; the rival holds them",
    )


def _gram(activations: Tensor) -> Grams:
    """As ``dcmerge calibrate`` makes it, for the one layer."""
    return Grams.of({"": gram_float64(activations.mT)})


def _activations(tokens: int, n: int, seed: int) -> Tensor:
    """(tokens, n): inputs of a layer, whose features differ in size as j^-0.25."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, n, generator=generator) * torch.arange(1, n + 1) ** -0.25

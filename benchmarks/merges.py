"""Cases that merge one matrix: full fine-tunes, LoRA adapters, and the trimming step alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cases
import digits
import flops
import inputs
import memory
import oracle
import reference
import torch
from case import Check, Problem, Rival, Setting
from reference import KEEP, LORA_RANK, Parts
from torch import Tensor

import dcmerge_ext as dcm
from dcmerge_ext import LowRank, ops
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import dc_merge

SINGLE = 1e-4
"""Bound of the error of merges that work in float32: the singular vectors of a flat spectrum are no better conditioned."""
DOUBLE = 1e-6
"""Bound of the error of adapter merges, which work in float64 and round their result to float32."""
MISSED = 0.03
"""Share of the squared norm captured by the best approximation of its rank that accuracy="fast" may miss."""

Source = Callable[[Setting, int, int, int], list[Tensor]]
"""Updates for a setting, T, m and n."""


def power_law(exponent: float) -> Source:
    """Singular values j^-exponent."""
    return lambda setting, tasks, m, n: inputs.full_updates(tasks, m, n, exponent)


def fine_tuned_digits(setting: Setting, tasks: int, m: int, n: int) -> list[Tensor]:
    return digits.attention_updates(setting.cache, m, steps=2 if setting.quick else 40)[:tasks]


def full_fine_tunes(
    setting: Setting, m: int, n: int, tasks: int, source: Source, *, accuracy: str = "exact"
) -> Problem:
    """``official="fft"`` against the authors' composition; with accuracy="fast" against the same."""
    m, n = setting.side(m), setting.side(n)
    q, rank = min(m, n), int(min(m, n) * (1 / tasks))
    count = min(max(1, int(KEEP * q**2)), (tasks * rank) ** 2)
    updates = source(setting, tasks, m, n)
    # The authors drop no direction of a basis; our default tolerance drops one in a hundred of such families.
    options: dict[str, Any] = {"official": "fft", "accuracy": accuracy, "basis_tol": 0.0}
    best = [oracle.components(update, rank) for update in updates]
    truth = oracle.cover(best)

    def check(answer: Tensor) -> Check:
        return merge_check(oracle.distance(answer, truth, count), SINGLE)

    def check_fast(answer: Tensor) -> Check:
        """Another subspace, by design: it must capture the norm, and the merge must be nearer to the truth than 0 is."""
        change = oracle.relative(answer, oracle.merge(truth, oracle.keeps(truth, count)))
        missed = max(
            1 - _captured(update, rank) / float(p.S.square().sum()) for update, p in zip(updates, best, strict=True)
        )
        complaint = "" if change < 1 else f"the merged matrix changes by {change:.2f} of its norm"
        return Check(missed, MISSED, {"captured": 1 - missed, "change": change}, complaint)

    decomposition = flops.svd(m, n, rank) if accuracy == "exact" else flops.subspace_iteration(m, n, rank)
    return Problem(
        ours=lambda: dc_merge(updates, **options),
        rivals=[Rival("torch.linalg composition", [("", lambda: reference.full_fine_tunes(updates))])],
        check=check if accuracy == "exact" else check_fast,
        check_rival=check,
        rival_bound=10 * SINGLE,  # the authors' own float32 route is timed wherever it makes sense at all
        flops=flops.dc_merge(m, n, tasks, rank, decomposition),
        peak=lambda: _peak(updates, options),
    )


def lora(
    setting: Setting, m: int, n: int, tasks: int, *, movement: float | None = None, form: str = "vision"
) -> Problem:
    """``official="lora"``: ours gives an adapter of rank T r, which is checked multiplied out; the reference a matrix.

    Args:
        movement: of adapters that share their initial A, see :func:`inputs.lora_updates`.
        form: "vision", the authors' full SVDs; "extrapolated", the same with one of the T timed, once; "llava", their
            randomized SVDs.
    """
    m, n = setting.side(m), setting.side(n)
    k = tasks * LORA_RANK
    count = max(1, int(KEEP * k**2))
    updates = inputs.lora_updates(tasks, m, n, LORA_RANK, movement=movement)
    options = {"official": "lora"}
    # where the dense products are small enough to be decomposed in float64, they are
    given = [u.to(torch.float64).dense() for u in updates] if m * n <= 1 << 20 else updates
    truth = oracle.cover([oracle.components(update, LORA_RANK, average=True) for update in given])

    def check(answer: Update) -> Check:
        return merge_check(oracle.distance(cases.dense(answer), truth, count), DOUBLE)

    return Problem(
        ours=lambda: dc_merge(updates, **options),
        rivals=[_lora_rival(form, updates)],
        check=check,
        rival_bound=SINGLE,
        flops=flops.dc_merge(m, n, tasks, LORA_RANK, flops.lowrank_svd(m, n, LORA_RANK)),
        peak=lambda: _peak(updates, options),
    )


def _lora_rival(form: str, updates: Sequence[LowRank]) -> Rival:
    if form == "llava":
        return Rival("authors' LLaVA form", [("", lambda: reference.llava(updates))])
    if form == "vision":
        return Rival("torch.linalg composition", [("", lambda: reference.adapters(updates))])
    # the decompositions that the rest needs, to float32 accuracy, without the minutes they take
    parts = [Parts(*(x.float() for x in oracle.components(update, LORA_RANK))) for update in updates]
    return Rival(
        "torch.linalg composition",
        [("", lambda: reference.merge_smoothed(parts))],
        once=[(len(updates), lambda: reference.full_svd(updates[0].dense(), LORA_RANK))],
        note=f"extrapolated: {len(updates)} x one full SVD, timed once, + the rest",
    )


def trim_elect_mask(setting: Setting, n: int, tasks: int) -> Problem:
    """Thresholds, election, disjoint mean and mask of T cores: the same bits as the torch composition."""
    n = setting.side(n)
    block, count = n // tasks, int(KEEP * n**2)
    cores = torch.randn(tasks, n, n, generator=torch.Generator().manual_seed(0))

    def composition() -> Tensor:
        return reference.elect(cores, reference.thresholds(cores, count), block)

    def ours() -> Tensor:
        return ops.elect(cores, ops.kth_magnitude(cores.flatten(1), count), blocks=[block] * tasks)

    expected = reference.elect(cores.double(), reference.thresholds(cores, count).double(), block).float()
    return Problem(
        ours=ours,
        rivals=[Rival("torch composition", [("", composition)])],
        check=lambda answer: Check(
            oracle.relative(answer, expected), 1e-7, complaint=_differing(answer, composition())
        ),
        traffic=flops.trim_elect_mask_bytes(tasks, n, block),
    )


def _differing(a: Tensor, b: Tensor) -> str:
    return "" if torch.equal(a, b) else f"{int((a != b).sum())} entries differ from the torch composition"


def merge_check(found: oracle.Distance, bound: float) -> Check:
    """The two numbers that judge a sparse merge."""
    details: dict[str, float] = {"kept otherwise": found.otherwise}
    return Check(found.error, bound, details | ({"within": found.within} if found.otherwise else {}))


def _captured(update: Tensor, rank: int) -> float:
    """Squared norm of the update in the subspace that accuracy="fast" finds."""
    U = dcm.truncated_svd(update, rank, accuracy="fast").U
    return float((U.double().mT @ update.double()).square().sum())


def _peak(updates: Sequence[Tensor | LowRank], options: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "updates.pt"
        memory.save_updates(updates, path)
        return memory.fresh_dc_merge(path, options).peak_bytes

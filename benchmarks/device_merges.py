"""Rows of the GPU benchmark that are the DC-Merge of one layer, against the authors' composition on the same device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cases
import flops
import inputs
import oracle
import reference
import torch
from case import Check
from device_case import Bench, DeviceCase, DeviceProblem, DeviceRival
from merges import DOUBLE, SINGLE, merge_check
from reference import KEEP, LORA_RANK, Parts
from roofline import Needs
from torch import Tensor

from dcmerge_ext import LowRank
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import dc_merge


def full_fine_tunes(m: int, n: int, tasks: int, launches: int) -> DeviceCase:
    """``official="fft"`` of updates with singular values j^-0.5."""
    q = min(m, n)
    rank = q // tasks
    count = min(max(1, int(KEEP * q**2)), (tasks * rank) ** 2)

    def prepare(bench: Bench) -> DeviceProblem:
        updates = inputs.full_updates(tasks, m, n, 0.5)
        truth = oracle.cover([oracle.components(update, rank) for update in updates])
        updates = [update.to(bench.device) for update in updates]
        # The authors drop no direction of a basis; our default tolerance drops one in a hundred of such families.
        options: dict[str, Any] = {"official": "fft", "basis_tol": 0.0}

        def check(answer: Tensor) -> Check:
            return merge_check(oracle.distance(answer.cpu(), truth, count), SINGLE)

        return DeviceProblem(
            ours=lambda: dc_merge(updates, **options),
            check=check,
            rivals=[DeviceRival("torch.linalg composition", lambda: reference.full_fine_tunes(updates))],
            manner="whole",
            rival_bound=10 * SINGLE,
        )

    work = flops.dc_merge(m, n, tasks, rank, flops.svd(m, n, rank))
    return DeviceCase(
        f"full/{m}x{n}/T{tasks}", Needs(4.0 * (tasks + 1) * m * n, work, torch.float32, launches), prepare
    )


def lora(m: int, n: int, tasks: int, launches: int, form: str = "vision") -> DeviceCase:
    """``official="lora"``; ours gives an adapter, checked multiplied out. ``form``: of the authors, see ``_composition``."""
    k = tasks * LORA_RANK
    count = max(1, int(KEEP * k**2))

    def prepare(bench: Bench) -> DeviceProblem:
        updates = inputs.lora_updates(tasks, m, n, LORA_RANK)
        parts = [oracle.components(update, LORA_RANK, average=True) for update in updates]
        truth = oracle.cover(parts)
        updates = [update.to(bench.device) for update in updates]

        def check(answer: Update) -> Check:
            return merge_check(oracle.distance(cases.dense(answer).cpu(), truth, count), DOUBLE)

        return DeviceProblem(
            ours=lambda: dc_merge(updates, official="lora"),
            check=check,
            rivals=[_composition(form, updates, parts)],
            manner="whole",
            rival_bound=SINGLE,
        )

    work = flops.dc_merge(m, n, tasks, LORA_RANK, flops.lowrank_svd(m, n, LORA_RANK), factored=True)
    # in: the factors of every task; out: those of the merged adapter, of rank k, as many
    needs = Needs(4.0 * 2 * k * (m + n), work, torch.float64, launches)
    return DeviceCase(f"lora/{m}x{n}/T{tasks}", needs, prepare)


def _composition(form: str, updates: Sequence[LowRank], truth: Sequence[Parts]) -> DeviceRival:
    """ "vision": full SVDs of the dense products; "extrapolated": of one of them; "llava": randomized SVDs."""
    if form == "llava":
        return DeviceRival("authors' LLaVA form", lambda: reference.llava(updates))
    if form == "vision":
        return DeviceRival("torch.linalg composition", lambda: reference.adapters(updates))
    # the decompositions that the rest needs, to float32 accuracy, without the minutes they take
    parts = [Parts(*(x.float().to(updates[0].device) for x in part)) for part in truth]
    return DeviceRival(
        "torch.linalg composition",
        lambda: reference.merge_smoothed(parts),
        once=(len(updates), lambda: reference.full_svd(updates[0].dense(), LORA_RANK)),
        note=f"extrapolated: {len(updates)} x one full SVD, timed once, + the rest",
    )

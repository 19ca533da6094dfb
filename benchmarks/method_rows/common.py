"""What the rows share: their updates, rivals, checks and bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cases
import inputs
import oracle
import torch
from case import Check, Rival, Setting
from merges import DOUBLE, SINGLE
from near_ties import Decided, settled
from reference import LORA_RANK, Parts, full_svd
from torch import Tensor

from dcmerge_ext import LowRank
from dcmerge_ext.lowrank import Update, concatenate

__all__ = ["DOUBLE", "LAPACK", "ROUNDED", "SINGLE"]

ROUNDED = 1e-6
"""Bound where every entry is a few operations of float32 away from its inputs."""
LAPACK = 10 * SINGLE
"""Bound of rivals that decompose in float32: they are timed wherever their answer makes sense at all."""

PLAIN, LINALG = "plain torch", "plain torch.linalg"
"""Names of rivals."""


def full_updates(setting: Setting, m: int, n: int, tasks: int) -> list[Tensor]:
    """Singular values j^-0.5, in the sizes of the setting."""
    return inputs.full_updates(tasks, setting.side(m), setting.side(n), 0.5)


def adapters(setting: Setting, m: int, n: int, tasks: int) -> list[LowRank]:
    return inputs.lora_updates(tasks, setting.side(m), setting.side(n), LORA_RANK)


def doubled(updates: Sequence[Update]) -> list[Update]:
    return [u.to(torch.float64) for u in updates]


def near(truth: Tensor, bound: float) -> Callable[[Update], Check]:
    """The relative Frobenius distance from ``truth``."""
    return lambda answer: Check(oracle.relative(cases.dense(answer), truth), bound)


def near_decided(truth: Decided, bound: float) -> Callable[[Update], Check]:
    """The same from the truth that decides near ties as the answer did."""

    def check(answer: Update) -> Check:
        found = cases.dense(answer)
        expected, otherwise = settled(found, truth, bound)
        return Check(oracle.relative(found, expected), bound, {"kept otherwise": float(otherwise)})

    return check


# --- decompositions of adapters, which rivals find in the dense products --------------------------------------------


def components(updates: Sequence[LowRank]) -> list[Parts]:
    """In float64, from the factors."""
    return [oracle.components(update, LORA_RANK) for update in updates]


def side_by_side(updates: Sequence[LowRank]) -> LowRank:
    """[B_1 A_1 .. B_T A_T]"""
    return LowRank(torch.cat([u.left for u in updates], 1), torch.block_diag(*(u.right for u in updates)))


def total(updates: Sequence[LowRank]) -> LowRank:
    """The sum, of the rank of all factors together."""
    return concatenate(list(updates))


def single(parts: Parts) -> Parts:
    return Parts(*(x.float() for x in parts))


def task_svds(updates: Sequence[LowRank]) -> tuple[int, Callable[[], Parts]]:
    """What a rival spends on the SVDs of all tasks: one of them, and how often."""
    return len(updates), lambda: full_svd(updates[0].dense(), LORA_RANK)


def extrapolated(rest: Callable[[], object], once: Sequence[tuple[int, Callable[[], object]]], what: str) -> Rival:
    """A rival whose decompositions are timed apart; ``rest`` works on others, found in float64."""
    return Rival(LINALG, [("", rest)], once=once, note=f"extrapolated: {what}, timed once, + the rest")

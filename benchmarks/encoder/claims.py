"""What the DC-Merge paper claims, held against what was measured, as it comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from .protocol import KINDS, Protocol
from .results import Results

_NAMES = {"full": "full fine-tunes", "lora": "LoRA adapters"}
_MEASURES = {"dir_sim": "DirSim", "projected_dir_sim": "DirSim in the task's space", "cos_sim": "CosSim"}


@dataclass(frozen=True)
class Claim:
    """One claim, with the verdict and the numbers it rests on."""

    text: str
    verdict: str
    evidence: str


class Correlation(NamedTuple):
    """Of a measure with normalized accuracy, over the methods of one table."""

    pearson: float
    spearman: float
    significant: bool
    """Both at the 5 % level, and positive."""


def check(results: Results, protocol: Protocol) -> list[Claim]:
    """All claims, in the order of the report."""
    found = []
    for kind in KINDS:
        found.append(_better(results, kind, "dc_merge", "tsv_m", "DC-Merge is at least as good as TSV-M"))
        found.append(_better(results, kind, "tsv_m", "task_arithmetic", "TSV-M is at least as good as task arithmetic"))
    found.append(_better(results, "lora", "dc_merge", "dc_merge, smoothing=none", "Smoothing helps"))
    found.append(_better(results, "full", "dc_merge", "dc_merge, smoothing=average", "Smoothing hurts"))
    found += [_mask(results, kind, (*protocol.subsets, len(protocol.tasks))) for kind in KINDS]
    found += [claim for kind in KINDS for claim in _directions(results, kind)]
    return found


def verdict(differences: Sequence[float], chance: float) -> str:
    """Of a claim that all differences are positive; ``chance`` is what their mean may reach by it."""
    if not any(differences):
        return "no difference"
    within = ", but within chance" if abs(fmean(differences)) <= chance else ""
    if all(d >= 0 for d in differences):
        return "holds" + within
    if all(d < 0 for d in differences):
        return "does not hold" + within
    return "undecided: the seeds disagree"


def chance(results: Results, kind: str, count: int | None = None) -> float:
    """Two standard errors of the mean over seeds of a difference of two normalized accuracies, as of separate texts.

    All methods are measured on the same texts, which makes differences more certain than this.
    """
    variances = []
    for seed in results.seeds:
        merged = results.of(seed, kind, count=count)["dc_merge"]
        terms = []
        for task, share in zip(merged.tasks, merged.accuracies, strict=True):
            tuned = results.fine_tuned(seed, kind, task).test
            terms.append(share * (1 - share) / results.probe(seed, task).test / tuned**2)
        variances.append(2 * sum(terms) / len(terms) ** 2)
    return 2 * math.sqrt(sum(variances)) / len(variances)


def correlation(results: Results, seed: int, kind: str, measure: str) -> Correlation:
    """Over all methods and variants of one table at their best scales."""
    rows = list(results.of(seed, kind).values())
    x, y = [getattr(row, measure) for row in rows], [row.normalized for row in rows]
    if len(set(x)) < 2 or len(set(y)) < 2:
        return Correlation(math.nan, math.nan, False)
    from scipy import stats

    tests = stats.pearsonr(x, y), stats.spearmanr(x, y)
    pearson, spearman = (float(test.statistic) for test in tests)
    return Correlation(pearson, spearman, all(test.pvalue < 0.05 and test.statistic > 0 for test in tests))


def _gains(results: Results, kind: str, better: str, worse: str, count: int | None = None) -> list[float]:
    """Of normalized accuracy at the best scales, one per seed."""
    tables = [results.of(seed, kind, count=count) for seed in results.seeds]
    return [table[better].normalized - table[worse].normalized for table in tables]


def _better(results: Results, kind: str, better: str, worse: str, text: str) -> Claim:
    gains, margin = _gains(results, kind, better, worse), chance(results, kind)
    return Claim(
        f"{text} ({_NAMES[kind]})",
        verdict(gains, margin),
        f"`{better}` less `{worse}`: {points(gains)}; chance ±{100 * margin:.1f}",
    )


def _mask(results: Results, kind: str, counts: Sequence[int]) -> Claim:
    gains = {count: _gains(results, kind, "dc_merge", "dc_merge, no mask", count) for count in counts}
    growth = [last - first for first, last in zip(gains[counts[0]], gains[counts[-1]], strict=True)]
    margin = math.hypot(chance(results, kind, counts[0]), chance(results, kind, counts[-1]))
    shown = "; ".join(f"T = {count}: {points(values)}" for count, values in gains.items())
    return Claim(
        f"The structural mask helps more with more tasks ({_NAMES[kind]})",
        verdict(growth, margin),
        f"gain by the mask at {shown}; growth from first to last {points(growth)}, chance ±{100 * margin:.1f}",
    )


def _directions(results: Results, kind: str) -> list[Claim]:
    found = {m: [correlation(results, seed, kind, m) for seed in results.seeds] for m in _MEASURES}
    shown = "; ".join(
        f"{_MEASURES[measure]}: Pearson {_list(c.pearson for c in values)}, Spearman {_list(c.spearman for c in values)}"
        for measure, values in found.items()
    )
    if all(c.significant for c in found["dir_sim"]):
        correlates = "holds"
    elif any(c.significant for c in found["dir_sim"]):
        correlates = "undecided: not significant in every seed"
    else:
        correlates = "does not hold: not significant in any seed"
    ahead = [a.spearman - b.spearman for a, b in zip(found["dir_sim"], found["cos_sim"], strict=True)]
    return [
        Claim(f"DirSim goes with normalized accuracy over methods ({_NAMES[kind]})", correlates, shown),
        Claim(
            f"DirSim goes with it more closely than CosSim ({_NAMES[kind]})",
            verdict(ahead, 0.0) if not any(map(math.isnan, ahead)) else "undecided: nothing to correlate",
            f"Spearman of DirSim less that of CosSim: {_list(ahead)}",
        ),
    ]


def points(differences: Sequence[float]) -> str:
    """Per seed, and the mean, in percentage points."""
    return f"{' / '.join(f'{100 * d:+.1f}' for d in differences)} (mean {100 * fmean(differences):+.1f})"


def _list(values: Iterable[float]) -> str:
    return " / ".join(f"{v:+.2f}" for v in values)

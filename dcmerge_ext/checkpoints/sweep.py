"""Search of the scale: merge once, write and evaluate a candidate per scale, keep the best."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dcmerge_ext.checkpoints.config import MergeConfig, build_config
from dcmerge_ext.checkpoints.execute import Executor, TensorResult
from dcmerge_ext.checkpoints.kept import KeptUpdates, Replay
from dcmerge_ext.checkpoints.memory import watched_memory
from dcmerge_ext.checkpoints.output import check_space, work_directory
from dcmerge_ext.checkpoints.plan import make_plan
from dcmerge_ext.checkpoints.record import gathered_warnings
from dcmerge_ext.checkpoints.run import (
    METADATA_BYTES,
    MergeReport,
    Prepared,
    compute_device,
    config_values,
    finish,
    prepare,
    write_output,
)
from dcmerge_ext.checkpoints.work import Work
from dcmerge_ext.errors import InputError, OptionError

Evaluate = Callable[[Path], float]
"""The score of a merged checkpoint in a directory, loadable as the output of a merge is."""
_MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Scales tried where none are given, in units of the method's default."""


class _Candidate(NamedTuple):
    scale: float
    score: float
    place: Path
    results: list[TensorResult]


@dataclass(frozen=True)
class SweepReport:
    """What a search found; ``merge`` is the report of the checkpoint that was kept."""

    scales: tuple[float, ...]
    scores: tuple[float, ...]
    best: float
    merge: MergeReport


def sweep(
    base: str | Path | None,
    tasks: Sequence[str | Path],
    out: str | Path,
    evaluate: Evaluate,
    scales: Sequence[float] | None = None,
    method: str = "dc_merge",
    *,
    maximize: bool = True,
    **settings: Any,
) -> SweepReport:
    """Merge once, evaluate the merged model at every scale, and keep the best one as ``out``.

    base + scale * update is linear in the scale: every candidate is written from the one merged update, and the winner
    holds the very bytes that :func:`dcmerge_ext.merge_checkpoints` writes at its scale. Takes the disk space of the
    merged updates in float32 and of two candidates, beside ``out``.

    Args:
        base, tasks, out, method: as in :func:`dcmerge_ext.merge_checkpoints`.
        evaluate: called with the directory of each candidate, in the order of ``scales``; returns its score. Use held-out
            validation data, not the data you report on.
        scales: to try. None: 0.25 to 1.5 times the method's default, in steps of 0.25.
        maximize: the highest score wins (the first of equals); False: the lowest.
        settings: further arguments of ``merge_checkpoints``: ``weights``, ``overrides``, ``dtype`` ..., and options of
            the method.
    Returns:
        SweepReport; scores and scales are also in the output's ``dcmerge.json``.
    Raises:
        OptionError: a scale beside the scales.   InputError, RunError: as merging does; a score that is no finite number. Nothing is left then, nor where
            ``evaluate`` itself raises.
    """
    values = config_values("sweep", base=base, tasks=tasks, out=out, method=method, **settings)
    return run_sweep(build_config(values, "sweep"), evaluate, scales, maximize=maximize)


def run_sweep(
    config: MergeConfig,
    evaluate: Evaluate,
    scales: Sequence[float] | None,
    *,
    maximize: bool = True,
    advance: Callable[[float, float], None] = lambda scale, score: None,
) -> SweepReport:
    """As :func:`sweep`, of a configuration. ``advance`` is told every scale with its score."""
    if config.scale is not None:
        raise OptionError("scale is what a sweep searches; give scales (--scales)")
    if config.resume or config.verify:
        raise OptionError("resume and verify belong to a merge; sweep does without")
    started = time.perf_counter()
    first = prepare(config)
    chosen = _checked(first.plan.scale, scales)
    out = Path(config.out).expanduser()
    prepared = {scale: _at(first, scale) for scale in chosen}
    device = compute_device(config.device)
    scores: list[float] = []
    with work_directory(out, "replace" if config.overwrite else "refuse") as directory, watched_memory() as peak:
        # inside: a candidate becomes the output by renaming its files, and what a killed run leaves is in one place
        with tempfile.TemporaryDirectory(prefix="sweep-", dir=directory) as scratch, gathered_warnings() as warned:
            kept = KeptUpdates(
                Path(scratch, "updates.safetensors"), first.plan, first.adapter.modules if first.adapter else ()
            )
            check_space(out, kept.nbytes + 2 * (first.output_bytes + METADATA_BYTES))
            kept.fill(Executor(first.plan, device, max_memory=config.memory_bytes))
            best: _Candidate | None = None
            for i, (scale, candidate) in enumerate(prepared.items()):
                place = Path(scratch, f"candidate-{i}")
                place.mkdir()
                results = write_output(candidate, Replay(candidate.plan, device, kept), Work(place))
                scores.append(_score(evaluate(place), scale))
                advance(scale, scores[-1])
                if best is None or (scores[-1] > best.score if maximize else scores[-1] < best.score):
                    worse, best = best, _Candidate(scale, scores[-1], place, results)
                    if worse is not None:
                        shutil.rmtree(worse.place)
                else:
                    shutil.rmtree(place)
            assert best is not None
            for file in best.place.iterdir():
                file.rename(directory / file.name)
        facts = {"sweep": [{"scale": s, "score": score} for s, score in zip(chosen, scores, strict=True)]}
        report = finish(prepared[best.scale], device, directory, best.results, started, warned, peak(), facts)
    return SweepReport(chosen, tuple(scores), best.scale, report)


def _at(first: Prepared, scale: float) -> Prepared:
    """The same merge at another scale: planned again from the headers that are open."""
    config = msgspec.structs.replace(first.config, scale=scale)
    plan = make_plan(first.plan.base, first.plan.tasks, config, with_base=first.base_path is not None)
    return Prepared.of(config, plan, first.save_as, first.base_path)


def _checked(default: float, scales: Sequence[float] | None) -> tuple[float, ...]:
    chosen = tuple(default * m for m in _MULTIPLES) if scales is None else tuple(float(s) for s in scales)
    if not chosen or not all(map(math.isfinite, chosen)) or len(set(chosen)) < len(chosen):
        raise OptionError(f"sweep: scales must be finite numbers, each once, got {list(chosen)}")
    return chosen


def _score(value: Any, scale: float) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"sweep: the evaluation returned {value!r} at scale {scale:g}; it must return a finite number")
    return score

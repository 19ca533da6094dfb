"""Merging fine-tuned encoders as ``dcmerge merge`` does, finding the scale, and measuring what comes out."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dcmerge_ext as dcm
from dcmerge_ext.calibration import Grams
from dcmerge_ext.metrics import cos_sim, dir_sim, normalized_accuracy, projected_dir_sim

from . import training
from .data import Splits
from .protocol import Merge, Protocol
from .results import Merged, Place
from .training import Head, Tokens

_NULL = 1e-5
"""Singular values below this fraction of the largest are round-off of the float32 weights that updates are differences of."""


class _Held(NamedTuple):
    """What is measured for one task."""

    head: Head
    validation: Tokens
    test: Tokens


def measure(place: Place, protocol: Protocol, merge: Merge) -> Merged:
    """Merge, look for the best scale on the validation texts, test there and at the default scale."""
    started = time.perf_counter()
    merged, seconds = _merge(place, merge)
    model = training.load_encoder(place.base)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    held = [_held(place, merge.seed, task) for task in merge.tasks]
    tuned = [place.read(merge.seed, f"{merge.kind}-{task}") for task in merge.tasks]

    def accuracies(scale: float, part: str) -> list[float]:
        # base + scale * update is linear in the scale: one merge serves the whole search
        model.load_state_dict({name: torch.lerp(weight, merged[name], scale) for name, weight in base.items()})
        return [training.accuracy(model, task.head, getattr(task, part)) for task in held]

    def validate(scale: float) -> float:
        return normalized_accuracy(accuracies(scale, "validation"), [record["validation"] for record in tuned])

    default = merge.default_scale
    multiples = [1.0] if merge.variant.method == "averaging" else protocol.multiples  # scaled, it is task arithmetic
    curve = search(validate, [default * m for m in multiples], protocol.extensions)
    scale = max(curve, key=lambda s: curve[s])
    best = accuracies(scale, "test")
    at_default = best if scale == default else accuracies(default, "test")
    of_tuned = [record["test"] for record in tuned]
    names = [name for name in base if merged[name].ndim == 2 and not torch.equal(merged[name], base[name])]
    directions, projected, cosines = _similarities(
        {name: merged[name] - base[name] for name in names},
        [_task_components(place.base, place.tuned(merge.seed, merge.kind, task)) for task in merge.tasks],
        {name: _task_rank(merge, base[name]) for name in names},
    )
    return Merged(
        label=merge.variant.label,
        method=merge.variant.method,
        options=merge.variant.options,
        kind=merge.kind,
        seed=merge.seed,
        tasks=list(merge.tasks),
        scales=list(curve),
        curve=list(curve.values()),
        scale=scale,
        accuracies=best,
        normalized=normalized_accuracy(best, of_tuned),
        default_scale=default,
        accuracies_at_default=at_default,
        normalized_at_default=normalized_accuracy(at_default, of_tuned),
        dir_sim=directions,
        projected_dir_sim=projected,
        cos_sim=cosines,
        merge_seconds=seconds,
        seconds=time.perf_counter() - started,
    )


def search(score: Callable[[float], float], scales: Sequence[float], extensions: int) -> dict[float, float]:
    """Scale -> score, in the order of the scales; further ones at the same ratio while the best lies at an end."""
    found = {scale: score(scale) for scale in sorted(scales)}
    if len(found) == 1:
        return found
    for _ in range(extensions):
        order = sorted(found)
        best = max(order, key=lambda scale: found[scale])
        if best == order[-1]:
            beyond = best * best / order[-2]
        elif best == order[0]:
            beyond = best * best / order[1]
        else:
            break
        found[beyond] = score(beyond)
    return dict(sorted(found.items()))


def merged_checkpoint(place: Place, merge: Merge, out: Path, scale: float) -> float:
    """Write the merged model to ``out``, from the saved models or adapters; returns the seconds it took."""
    options: dict[str, Any] = dict(merge.variant.options)
    if merge.variant.method == "esm":
        options["activations"] = [_grams(place, merge, task) for task in merge.tasks]
    tasks = [place.tuned(merge.seed, merge.kind, task) for task in merge.tasks]
    report = dcm.merge_checkpoints(place.base, tasks, out, merge.variant.method, scale, device="cpu", **options)
    return report.seconds


def _merge(place: Place, merge: Merge) -> tuple[dict[str, Tensor], float]:
    """base + 1.0 * merged update, and the seconds it took from files to file."""
    with tempfile.TemporaryDirectory(prefix="merged-", dir=place.out) as folder:
        out = Path(folder, "model")
        seconds = merged_checkpoint(place, merge, out, 1.0)
        return {name: weight.clone() for name, weight in load_file(out / "model.safetensors").items()}, seconds


def _grams(place: Place, merge: Merge, task: str) -> Grams:
    """Activations of a fine-tuned model on a few training texts."""
    model = training.load_tuned(place.base, place.tuned(merge.seed, merge.kind, task))
    tokens = training.tokenise(Splits.load(place.data(merge.seed, task)).train)
    return Grams.of(training.calibrate(model, tokens), task)


@functools.lru_cache(maxsize=64)
def _held_at(head: Path, data: Path) -> _Held:
    splits = Splits.load(data)
    return _Held(Head.load(head), training.tokenise(splits.validation), training.tokenise(splits.test))


def _held(place: Place, seed: int, task: str) -> _Held:
    return _held_at(place.head(seed, task), place.data(seed, task))


def _task_rank(merge: Merge, weight: Tensor) -> int:
    """Components that count as the task's: those that SVD-based methods keep by default."""
    return training.LORA_RANK if merge.kind == "lora" else max(1, min(weight.shape) // len(merge.tasks))


class _TaskComponents(NamedTuple):
    updates: dict[str, Tensor]
    components: dict[str, dcm.Components]


@functools.lru_cache(maxsize=8)
def _task_components(base: Path, tuned: Path) -> _TaskComponents:
    """The updates of a fine-tuned model's matrices, and all their components."""
    start, end = (_matrices(model) for model in (training.load_encoder(base), training.load_tuned(base, tuned)))
    updates = {name: end[name] - weight for name, weight in start.items() if not torch.equal(end[name], weight)}
    return _TaskComponents(updates, {name: _components(update) for name, update in updates.items()})


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.state_dict().items() if weight.ndim == 2}


def _components(update: Tensor) -> dcm.Components:
    # in float64: LAPACK fails on some float32 matrices whose singular values are all alike, as isotropic merging makes them
    return dcm.truncated_svd(update.double(), min(update.shape))


def _similarities(
    merged: dict[str, Tensor], tasks: Sequence[_TaskComponents], ranks: dict[str, int]
) -> tuple[float, float, float]:
    """DirSim, DirSim in the task's space, CosSim: means over matrices and tasks."""
    found = []
    for name, update in merged.items():
        whole = _components(update)
        for task in tasks:
            own = dcm.Components(*_leading(task.components[name], ranks[name]))
            found.append(
                (
                    float(dir_sim(own, whole, tol=_NULL)),
                    float(projected_dir_sim(own, whole, tol=_NULL)),
                    float(cos_sim(task.updates[name], update)),
                )
            )
    directions, projected, cosines = (fmean(values) for values in zip(*found, strict=True))
    return directions, projected, cosines


def _leading(components: dcm.Components, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = components
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]

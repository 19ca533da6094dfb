"""The methods of this package as algorithms of fusion_bench (0.2.33): classes for ``_target_``, and for Python.

:class:`TaskSingularVectorMerging`, :class:`IsotropicMergingInCommonSubspace` and
:class:`IsotropicMergingInCommonAndTaskSubspace` take the arguments of fusion_bench's classes of these names and return the
same models. :class:`Merge` is any method of this package, :class:`DCMerge` that one. YAML files for fusion_bench's command
are in ``fusion_bench_config``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    from fusion_bench import BaseAlgorithm, BaseModelPool
    from fusion_bench.method.isotropic_merging import iso as theirs_iso
    from fusion_bench.method.task_singular_vector import TSVM as theirs_tsvm
except ImportError as error:
    raise ImportError(f"dcmerge_ext.integrations.fusion_bench needs fusion_bench ({error})") from error

from dcmerge_ext.checkpoints.state_dicts import merge_state_dicts
from dcmerge_ext.errors import InputError
from dcmerge_ext.methods.base import Context
from dcmerge_ext.methods.iso_c import IsoC
from dcmerge_ext.methods.iso_cts import IsoCTS
from dcmerge_ext.methods.registry import create
from dcmerge_ext.methods.tsv_m import TsvM
from dcmerge_ext.precision import without_autocast
from dcmerge_ext.updates import Updates

logger = logging.getLogger(__name__)

_State = Mapping[str, Tensor]


class Merge(BaseAlgorithm):  # type: ignore[misc]
    """Merge a model pool by a method of this package.

    Args:
        method: as in :func:`dcmerge_ext.merge_state_dicts`.
        scaling_factor: coefficient of the merged update. None: the method's default.
        weights: one per model of the pool, in its order. None: 1.
        exclude_keys: names of tensors that take the mean of the updates, times the scaling factor.
        options: of the method (``dcmerge methods NAME``).
    Raises:
        OptionError: an unknown option or value.
    """

    def __init__(
        self,
        method: str,
        scaling_factor: float | None = None,
        weights: Sequence[float] | None = None,
        exclude_keys: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._method = create(method, {name: _plain(value) for name, value in options.items()})
        self._options = {name: _plain(value) for name, value in options.items()}
        self.method = method
        self.scaling_factor = scaling_factor
        self.weights = _plain(weights)
        self.exclude_keys = list(exclude_keys or ())

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """The pool's pretrained model with the merged weights. Computes where its weights are.

        Raises:
            InputError: models that do not fit together, NaN or Inf, an excluded name that the model has not.
        """
        model: nn.Module = modelpool.load_pretrained_model()
        base = model.state_dict()
        if unknown := [name for name in self.exclude_keys if name not in base]:
            raise InputError(f"exclude_keys: the pretrained model has no {unknown[0]!r}")
        names = list(modelpool.model_names)
        tasks = [modelpool.load_model(name).state_dict() for name in names]
        scale = self._method.default_scale(len(tasks)) if self.scaling_factor is None else self.scaling_factor
        excluded = set(self.exclude_keys)
        merged: dict[str, Tensor] = {}
        for chosen, method, options in (
            (base.keys() - excluded, self.method, self._options),
            (excluded, "averaging", {}),
        ):
            if chosen:
                parts = [{name: state[name] for name in state if name in chosen} for state in (base, *tasks)]
                merged |= merge_state_dicts(parts[0], parts[1:], method, scale, self.weights, **options)
        model.load_state_dict(merged)
        return model


class DCMerge(Merge):
    """DC-Merge (arXiv 2603.06242); arguments as of :class:`Merge`."""

    def __init__(
        self,
        scaling_factor: float | None = None,
        weights: Sequence[float] | None = None,
        exclude_keys: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__("dc_merge", scaling_factor, weights, exclude_keys, **options)


class TaskSingularVectorMerging(theirs_tsvm.TaskSingularVectorMerging):  # type: ignore[misc]
    """TSV-M with the arguments and the result of fusion_bench's class.

    ``return_single_task_models`` runs fusion_bench's own code, with a warning.
    """

    def run(self, modelpool: BaseModelPool) -> Any:
        """The merged model, or fusion_bench's dictionary of models."""
        if self.return_single_task_models:
            logger.warning("return_single_task_models: merged by fusion_bench's own code")
            return super().run(modelpool)
        model, task_vectors = self.load_pretrained_model_and_task_vectors(modelpool)

        def method_for(shape: torch.Size) -> TsvM | IsoC | IsoCTS | None:
            rank = int(min(shape) * (1 / len(task_vectors)))  # as there, rounding included
            return TsvM(rank=rank) if rank else None

        def by_them(part: list[_State]) -> _State:
            found: _State = theirs_tsvm.TSVM_utils.compute_and_sum_svd_mem_reduction(
                part, exclude_keys=self.exclude_keys, accelerator=self.fabric.device
            )
            return found

        scale = 1.0 if self.alpha is None or isinstance(self.alpha, Iterable) else float(self.alpha)
        _apply(model, task_vectors, scale, method_for, by_them, self.exclude_keys, self.fabric.device)
        return model


class IsotropicMergingInCommonSubspace(theirs_iso.IsotropicMergingInCommonSubspace):  # type: ignore[misc]
    """Iso-C with the arguments and the result of fusion_bench's class."""

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """The merged model."""
        model, task_vectors = _load(modelpool)

        def by_them(part: list[_State]) -> _State:
            found: _State = theirs_iso.iso_c(part, self.fabric.device, self.exclude_keys)
            return found

        _apply(
            model,
            task_vectors,
            self.scaling_factor,
            lambda _: IsoC(mean_over="min_dim"),
            by_them,
            self.exclude_keys or (),
            self.fabric.device,
        )
        return model


class IsotropicMergingInCommonAndTaskSubspace(theirs_iso.IsotropicMergingInCommonAndTaskSubspace):  # type: ignore[misc]
    """Iso-CTS with the arguments and the result of fusion_bench's class."""

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """The merged model."""
        model, task_vectors = _load(modelpool)
        tasks, gamma = len(task_vectors), self.common_space_fraction

        def method_for(shape: torch.Size) -> TsvM | IsoC | IsoCTS | None:
            q = min(shape)
            own = round((q - int(q * gamma)) / tasks)
            if own * tasks > q or not 0 <= gamma <= 1:
                return None
            return IsoCTS(gamma=gamma, mean_over="min_dim")

        def by_them(part: list[_State]) -> _State:
            found: _State = theirs_iso.iso_cts(part, gamma, self.fabric.device, self.exclude_keys)
            return found

        _apply(
            model,
            task_vectors,
            self.scaling_factor,
            method_for,
            by_them,
            self.exclude_keys or (),
            self.fabric.device,
        )
        return model


def _load(modelpool: BaseModelPool) -> tuple[nn.Module, list[_State]]:
    """The pretrained model and a task vector per model."""
    model = modelpool.load_pretrained_model()
    base = model.state_dict()
    task_vectors = []
    with torch.no_grad():
        for name in modelpool.model_names:
            task_vectors.append(theirs_iso.state_dict_sub(modelpool.load_model(name).state_dict(), base))
    theirs_iso.check_parameterNamesMatch(task_vectors)
    return model, task_vectors


def _apply(
    model: nn.Module,
    task_vectors: list[_State],
    scale: float,
    method_for: Callable[[torch.Size], TsvM | IsoC | IsoCTS | None],
    by_them: Callable[[list[_State]], _State],
    exclude_keys: Sequence[str],
    device: torch.device,
) -> None:
    """Add scale * merged to the model: matrices merged by us where there is a method, everything else by fusion_bench."""
    state = model.state_dict()
    arbitrary = []
    with torch.no_grad():
        for key, first in task_vectors[0].items():
            matrix = first.ndim == 2 and first.is_floating_point() and key not in exclude_keys
            method = method_for(first.shape) if matrix else None
            if method is None:
                merged = by_them([{key: vector[key]} for vector in task_vectors])[key]
            else:
                update, made_up = _merged(method, key, [vector[key].to(device) for vector in task_vectors])
                merged = update.to(first)
                if made_up:
                    arbitrary.append(key)
            state[key] = state[key] + scale * merged
        model.load_state_dict(state)
    if arbitrary:
        logger.warning(
            "%d matrices, the first of them %s: updates of low rank leave fusion_bench's result to the arbitrary null vectors "
            "of an SVD; these take no part here",
            len(arbitrary),
            arbitrary[0],
        )


@without_autocast
def _merged(method: TsvM | IsoC | IsoCTS, key: str, updates: list[Tensor]) -> tuple[Tensor, bool]:
    """The merged update, and whether an SVD would fill it up with arbitrary vectors."""
    context = Context(len(updates), key)
    merged = method.merge(Updates.of(updates, name=key), context)
    assert isinstance(merged, Tensor)
    facts = context.facts
    kept, slots = (min(facts["rank"]), method.rank) if isinstance(method, TsvM) else (facts["rank"], min(merged.shape))
    dropped = sum(facts[side]["dropped"] for side in ("cover_u", "cover_v") if side in facts)
    return merged, kept != slots or dropped > 0


def _plain(value: Any) -> Any:
    """A list of a configuration (omegaconf) as a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

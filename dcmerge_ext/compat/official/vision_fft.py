"""vision_fft_merge/src/utils/DC_utils.py of the DC-Merge authors, and TSV-M of the TSVM_utils.py beside it.

Every function takes the task vectors and the configuration of their script. Of a task vector it reads ``vector``, a
mapping from names to tensors; of the configuration, by attribute or by key, ``DATASETS`` (its length is T) and
``device``. Matrices are the 2-D tensors without "text_projection" in their name; all others take the mean. The result
is a dict in the order of the first task vector's names, on ``device``, in the dtypes of the first task vector. Inputs
stay as they are. With more task vectors than DATASETS the rest is ignored, as theirs does.

All raise InputError for fewer task vectors than DATASETS, shapes that differ or non-finite values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dcmerge_ext.compat.official.shared import keep_topk_percent, merged_matrix, ties_small, wudi_of
from dcmerge_ext.errors import InputError

__all__ = [
    "compute_and_sum_svd_mem_reduction",
    "dc_merge",
    "get_redundant_task_vector",
    "iso_cts",
    "keep_topk_percent",
    "ties_small",
    "wudi_merge",
]

_WUDI_WEIGHTS = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class TaskVector(Protocol):
    """What is read of their ``NonLinearTaskVector``."""

    @property
    def vector(self) -> Mapping[str, Tensor]: ...


def dc_merge(task_vectors: Sequence[TaskVector], config: Any) -> dict[str, Tensor]:
    """DC-Merge of full fine-tunes (arXiv 2603.06242): no smoothing, 0.1 % of the q x q entries kept, T blocks.

    Mirrors ``dc_merge``; runs ``methods.dc_merge(official="fft")``. int(q / T) components per task, and exactly 0 where
    that is none. Differs where theirs is arbitrary: null components, dependent bases, and round-off among the kept.
    """

    def merge(key: str, updates: list[Tensor]) -> Tensor:
        q, tasks = min(updates[0].shape), len(updates)
        if not _components(q, tasks):
            return torch.zeros_like(updates[0])
        # their mask has blocks of q // T, which may be one more than the int(q * (1 / T)) components (T = 49)
        return merged_matrix(key, updates, "dc_merge", official="fft", block_size=q // tasks)

    return _merge(task_vectors, config, merge)


def compute_and_sum_svd_mem_reduction(task_vectors: Sequence[TaskVector], config: Any) -> dict[str, Tensor]:
    """TSV-M of full fine-tunes (arXiv 2412.00081), int(q / T) components per task, exactly 0 where that is none.

    Mirrors the function of that name in TSVM_utils.py; runs ``methods.tsv_m``. Differs where theirs is arbitrary: null
    components and dependent bases.
    """

    def merge(key: str, updates: list[Tensor]) -> Tensor:
        if not _components(min(updates[0].shape), len(updates)):
            return torch.zeros_like(updates[0])
        return merged_matrix(key, updates, "tsv_m")

    return _merge(task_vectors, config, merge)


def iso_cts(task_vectors: Sequence[TaskVector], config: Any, common_space_fraction: float = 0.8) -> dict[str, Tensor]:
    """Iso-CTS of full fine-tunes (arXiv 2502.04959).

    Mirrors ``iso_cts``; runs ``methods.iso_cts``. Differs where theirs is arbitrary: null components and dependent bases.
    More task vectors than DATASETS are an InputError: theirs would add all of them up and keep the directions of some.
    """
    if len(task_vectors) > len(_setting(config, "DATASETS")):
        raise InputError(
            f"iso_cts: {len(task_vectors)} task vectors for {len(_setting(config, 'DATASETS'))} DATASETS; give one each"
        )

    def merge(key: str, updates: list[Tensor]) -> Tensor:
        return merged_matrix(key, updates, "iso_cts", gamma=common_space_fraction, mean_over="min_dim")

    return _merge(task_vectors, config, merge)


def wudi_merge(task_vectors: Sequence[TaskVector], config: Any) -> dict[str, Tensor]:
    """WUDI-Merging (arXiv 2503.08099) of the attention and MLP weights of CLIP; every other tensor takes the mean.

    Mirrors ``wudi_merge``; runs ``methods.wudi`` for ``config.method.iter_num`` steps. Differs for an update that is
    zero, which takes no part (theirs: NaN everywhere).
    """
    steps = _setting(_setting(config, "method"), "iter_num")

    def merge(key: str, updates: list[Tensor]) -> Tensor:
        return wudi_of(updates, steps, key).to(updates[0].device)

    return _merge(task_vectors, config, merge, lambda key: any(name in key for name in _WUDI_WEIGHTS))


def get_redundant_task_vector(vectors: Tensor, device: torch.device | str, iter_num: int = 300) -> Tensor:
    """WUDI of T stacked updates (T, m, n) of one matrix, (m, n) on ``device``; as in :func:`wudi_merge`."""
    return wudi_of(vectors.unbind(), iter_num).to(device)


def _merge(
    task_vectors: Sequence[TaskVector],
    config: Any,
    merge: Callable[[str, list[Tensor]], Tensor],
    applies: Callable[[str], bool] = lambda key: True,
) -> dict[str, Tensor]:
    tasks, device = len(_setting(config, "DATASETS")), _setting(config, "device")
    if not 0 < tasks <= len(task_vectors):
        raise InputError(f"{len(task_vectors)} task vectors for {tasks} DATASETS; give one each, and at least one")
    vectors = [_vector(i, task) for i, task in enumerate(task_vectors[:tasks])]
    for i, vector in enumerate(vectors):
        if missing := vectors[0].keys() - vector.keys():
            raise InputError(
                f"task vector {i} has no {min(missing)!r}, which task vector 0 has; they must come from one base"
            )
    merged = {}
    for key in vectors[0]:
        updates = [vector[key].to(device) for vector in vectors]
        matrix = updates[0].ndim == 2 and "text_projection" not in key and applies(key)
        merged[key] = merge(key, updates) if matrix else merged_matrix(key, updates, "averaging")
    return merged


def _vector(i: int, task: TaskVector) -> Mapping[str, Tensor]:
    vector = getattr(task, "vector", None)
    if not isinstance(vector, Mapping):
        raise InputError(
            f"task vector {i}: needs an object whose attribute vector maps names to tensors, got a {type(task).__name__}"
        )
    return vector


def _components(q: int, tasks: int) -> int:
    """Kept per task: a float product, truncated."""
    return int(q * (1 / tasks))


def _setting(config: Any, name: str) -> Any:
    try:
        return config[name] if isinstance(config, Mapping) else getattr(config, name)
    except (AttributeError, KeyError):
        raise InputError(f"config has no {name}; DATASETS, device and, for WUDI, method.iter_num are needed") from None

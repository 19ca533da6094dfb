"""mergekit's ``ties`` with its parameters and its results: thresholds by selection instead of by sorting, one pass of election."""

from __future__ import annotations

from typing import Any

import torch
from mergekit.merge_methods import TensorGroup
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.updates import compute_dtype, count_nonfinite

PARAMETERS = frozenset({"weight", "density", "normalize", "rescale", "lambda", "int8_mask"})
"""Of mergekit's ``ties``; ``int8_mask`` changes how it stores its mask, and no result."""
_TOO_SMALL = 1e-7
"""L1 norms below this are not rescaled."""


def merge_ties(group: TensorGroup, **parameters: Any) -> Tensor:
    """One tensor by TIES-Merging (arXiv 2306.01708) as mergekit understands it: trimmed tensor by tensor.

    Per task: the max(1, int(density N)) largest magnitudes of the update survive, multiplied by the weight. Per element:
    the sign of the weighted sum is elected, + where it is 0; the entries that agree are added and, with ``normalize``,
    divided by the sum of their weights. Updates, thresholds and weighted updates are rounded to the dtype of the tensors
    as mergekit rounds them, so that the votes are the same; the rest is computed in at least single precision.

    Where entries tie at the threshold, those that come first in the tensor survive; mergekit's choice is that of an
    unstable sort. Cost: O(N) per task, where mergekit sorts. Memory: one copy of every task in at least single precision.

    Raises:
        InputError: NaN or Inf, naming model and tensor.   OptionError: a parameter that mergekit 0.1.5 does not have.
    """
    if unknown := sorted(set(parameters) - PARAMETERS):
        raise OptionError(
            f"dcmerge_ties does not know {', '.join(unknown)}: this version of mergekit is too new for it"
        )
    base: Tensor = group.base.tensor
    tasks = group.non_base
    if not tasks or base.numel() == 0:
        return base
    weights = torch.tensor(parameters["weight"].values_for(tasks), dtype=base.dtype, device=base.device)
    stack = base.new_empty((len(tasks), 1, base.numel()), dtype=compute_dtype(base.dtype))
    for row, weight, entry in zip(stack.squeeze(1), weights, tasks, strict=True):
        if row.dtype == base.dtype:
            torch.sub(entry.tensor, base, out=row.view(base.shape))
        else:
            row.copy_((entry.tensor - base).reshape(-1))
        if bad := count_nonfinite(row):
            raise _nonfinite(group, entry, bad)
        before = _l1(row, base.dtype) if parameters["rescale"] else None
        _trim(row, parameters["density"][entry.id])
        if before is not None:
            after = _l1(row, base.dtype)
            if before >= _TOO_SMALL and after >= _TOO_SMALL:
                _multiply(row, before / after)
        if weight != 1:
            _multiply(row, weight)
    merged = _elected(stack, weights.to(stack.dtype), normalize=parameters["normalize"]).reshape(base.shape)
    if parameters["lambda"] != 1:
        merged.mul_(parameters["lambda"])
    result = merged.add_(base).to(base.dtype)
    if count_nonfinite(result):
        kind = str(base.dtype).removeprefix("torch.")
        raise InputError(
            f"tensor {group.metadata.name!r}: values overflow {kind}; set dtype: float32 or a smaller lambda"
        )
    return result


def _trim(row: Tensor, density: float) -> None:
    """Set all but the largest magnitudes of (N,) to 0."""
    if density >= 1:
        return
    if density <= 0:
        row.zero_()
        return
    count = max(1, int(density * row.numel()))
    threshold = ops.kth_magnitude(row, count)
    if threshold == 0:
        return
    # what exceeds the number below the threshold survives: one pass, where a mask takes four
    torch.hardshrink(row, float(torch.nextafter(threshold, torch.zeros_like(threshold))), out=row)
    if surplus := int(row.count_nonzero()) - count:
        tied = (row.abs() == threshold).nonzero().squeeze(-1)
        row[tied[len(tied) - surplus :]] = 0


def _l1(row: Tensor, dtype: torch.dtype) -> Tensor:
    return row.to(dtype).abs().sum()


def _multiply(row: Tensor, factor: Tensor) -> None:
    """In place, rounded to the dtype of the factor: a product of two of half precision is exact in ``row``."""
    row.mul_(factor)
    if row.dtype != factor.dtype:
        row.copy_(row.to(factor.dtype))


def _elected(stack: Tensor, weights: Tensor, *, normalize: bool) -> Tensor:
    """(N,): of the weighted, trimmed updates ``stack`` (T, 1, N), the sum of those that agree, or their weighted mean.

    Overwrites ``stack``.
    """
    if not normalize:
        return ops.elect(stack, zero_sum=1, reduce="sum").squeeze(0)
    equal = bool((weights == weights[0]).all())
    merged = ops.elect(stack, zero_sum=1, reduce="mean" if equal else "sum").squeeze(0)
    if equal:
        return merged if weights[0] in (0, 1) else merged.div_(weights[0])
    sign, total = merged.sign(), torch.zeros_like(merged)
    for row, weight in zip(stack.squeeze(1), weights.tolist(), strict=True):
        total.add_(row.mul_(sign).gt_(0), alpha=weight)
    total[total == 0] = 1
    return merged.div_(total)


def _nonfinite(group: TensorGroup, entry: Any, bad: int) -> InputError:
    """The error that names the model with NaN or Inf."""
    name = group.metadata.name
    for where, held in ((group.base, "of the base "), (entry, "")):
        if found := count_nonfinite(where.tensor):
            return InputError(
                f"{where.id}: tensor {name!r} {held}holds {found} NaN or Inf values; repair the model or leave it out"
            )
    kind = str(entry.tensor.dtype).removeprefix("torch.")
    return InputError(f"{entry.id}: {bad} values of the update of tensor {name!r} overflow {kind}; set dtype: float32")

"""The native CPU core as a backend: the only file with data pointers.

Every function takes what :mod:`dcmerge_ext.ops` has validated: contiguous float32 or float64 CPU tensors. Outputs are
allocated by torch; each operand is bound to a name that outlives the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcmerge_ext import reference
from dcmerge_ext.reference import newton_schulz, smooth_energy, svd

__all__ = ["newton_schulz", "smooth_energy", "svd"]  # torch does these well on a CPU

prefers_products = False
_LARGEST_CORE, _MOST_COLUMNS = 768, 64
"""Order k and columns per task up to which the fused projection beats BLAS products and one selection per core."""

try:
    import dcmerge_ext._cpu as _cpu
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _IMPORT_ERROR: str | None = (
        f"{error}; build it with: pip install . (where that has been done, Python found a checkout first: leave its folder)"
    )
else:
    _IMPORT_ERROR = None


def loaded() -> bool:
    return _IMPORT_ERROR is None


def why_not() -> str:
    return _IMPORT_ERROR or ""


def description() -> str:
    return f"{_cpu.description()}, {torch.get_num_threads()} threads"


def kth_magnitude(x: Tensor, counts: Tensor) -> Tensor:
    rows, length = x.shape
    out = x.new_empty(rows)
    _cpu.kth_magnitude(
        x.data_ptr(), counts.data_ptr(), out.data_ptr(), rows, length, x.element_size(), torch.get_num_threads()
    )
    return out


def magnitude_histogram(x: Tensor, out: Tensor, shift: int, width: int, prefix: int) -> None:
    _cpu.magnitude_histogram(
        x.data_ptr(), out.data_ptr(), x.numel(), shift, width, prefix, x.element_size(), torch.get_num_threads()
    )


def elect(stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, mean: bool) -> Tensor:
    batch, tasks, rows, cols = stack.shape
    out = stack.new_empty(batch, rows, cols)
    sizes = None if blocks is None else torch.tensor(blocks, dtype=torch.int64)
    _cpu.elect(
        stack.data_ptr(),
        0 if thresholds is None else thresholds.data_ptr(),
        out.data_ptr(),
        batch,
        tasks,
        rows,
        cols,
        0 if sizes is None else sizes.data_ptr(),
        0 if sizes is None else sizes.numel(),
        zero_sum,
        mean,
        stack.element_size(),
        torch.get_num_threads(),
    )
    return out


def project(
    left: Tensor, right: Tensor, s: Tensor, ranks: Sequence[int], counts: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, k, _ = left.shape
    if k > _LARGEST_CORE or max(ranks) > _MOST_COLUMNS:
        return reference.project(left, right, s, ranks, counts, sizes, kth_magnitude)
    blocks, thresholds, largest = reference.project_outputs(left, counts, sizes)
    columns, rows = torch.tensor(ranks, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64)
    _cpu.project(
        left.data_ptr(),
        right.data_ptr(),
        s.data_ptr(),
        counts.data_ptr(),
        thresholds.data_ptr(),
        largest.data_ptr(),
        blocks.data_ptr(),
        batch,
        len(ranks),
        k,
        columns.data_ptr(),
        rows.data_ptr(),
        len(sizes),
        left.element_size(),
        torch.get_num_threads(),
    )
    return blocks, thresholds, largest


def rademacher(
    rows: int, cols: int, key: int, task: int, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    _cpu.rademacher(out.data_ptr(), out.numel(), key, task, stream, out.element_size(), torch.get_num_threads())
    return out


def drop(values: Tensor, rate: float, key: int, task: int, stream: int, offset: int) -> Tensor:
    out = torch.empty_like(values)
    _cpu.drop(
        values.data_ptr(),
        out.data_ptr(),
        out.numel(),
        offset,
        round(rate * 2**32),
        1 / (1 - rate),
        key,
        task,
        stream,
        out.element_size(),
        torch.get_num_threads(),
    )
    return out


def orthonormalize(rows: Tensor, worst_pivot: float) -> Tensor | None:
    out = torch.empty_like(rows)
    count, length = rows.shape
    return (
        out
        if _cpu.orthonormalize(rows.data_ptr(), out.data_ptr(), count, length, worst_pivot, rows.element_size())
        else None
    )


def gram(x: Tensor) -> Tensor:
    count, length = x.shape
    row, column = x.stride()
    out = x.new_empty(count, count, dtype=torch.float64)
    _cpu.gram(x.data_ptr(), out.data_ptr(), count, length, row, column, torch.get_num_threads())
    return out


def gram_apply(x: Tensor, a: Tensor, image: Tensor) -> Tensor:
    back = torch.empty_like(x)
    (count, n), m = x.shape, a.shape[0]
    _cpu.gram_apply(x.data_ptr(), a.data_ptr(), image.data_ptr(), back.data_ptr(), count, m, n, torch.get_num_threads())
    return back

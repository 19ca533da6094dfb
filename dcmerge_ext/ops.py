"""The operations that torch does badly for merging, validated once and run by the backend of the tensor's device.

Each has a twin of the same meaning in :mod:`dcmerge_ext.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from dcmerge_ext.backends import for_device
from dcmerge_ext.stages import stage
from dcmerge_ext.tracing import traceable

_COMPUTE_DTYPES = (torch.float32, torch.float64)


@traceable
def kth_magnitude(x: Tensor, counts: int | Tensor) -> Tensor:
    """The ``counts``-th largest magnitude of each row: the threshold that ``|x| >= threshold`` trims by.

    Exact, by radix histogram rather than by sorting. Ties at the threshold are not resolved here: all of them satisfy
    ``>=``.

    Args:
        x: (..., N) floating, N >= 1, finite, any strides. Half precision is selected in float32, exactly.
        counts: int, or integer tensor (...), each in 1 .. N. Those of a tensor on a device are not checked, which would
            wait for it, but clamped to that range.
    Returns:
        (...), in the dtype of ``x``.
    Raises:
        ValueError: an empty row, or a count outside 1 .. N.   TypeError: not floating point.
    """
    _require_floating("kth_magnitude", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"kth_magnitude: needs x (..., N) with N >= 1, got {tuple(x.shape)}")
    leading, length = x.shape[:-1], x.shape[-1]
    rows = _compute(x).reshape(-1, length).contiguous()
    wanted = torch.as_tensor(counts, dtype=torch.int64)
    _require_counts("kth_magnitude", wanted, length)
    if isinstance(counts, int):  # made on the device: a copy to it would wait
        wanted = torch.full((), counts, dtype=torch.int64, device=x.device)
    wanted = wanted.to(x.device).expand(leading).reshape(-1).contiguous()
    with stage("trim", nbytes=rows.nbytes):
        thresholds: Tensor = for_device(x.device).kth_magnitude(rows, wanted)
    return thresholds.reshape(leading).to(x.dtype)


@traceable
def magnitude_histogram(x: Tensor, out: Tensor, *, shift: int, width: int, prefix: int = 0) -> None:
    """Add to ``out`` how often each value of one digit of the magnitude occurs among ``x``.

    The magnitude is the bit pattern without its sign: 31 bits in float32, 63 in float64. An element counts when its
    bits above the digit equal ``prefix``. Two passes (shift 15 width 16, then shift 0 width 15) find an exact order
    statistic of float32 data that is streamed and never held; states of several streams add up.

    Args:
        x: float32 or float64, any shape.
        out: (2**width,) int64, added to in place; on the device of ``x``, or on the CPU, which waits for a device.
        shift: bits below the digit.   width: bits of the digit, 1 .. 16.   prefix: value of the bits above.
    Raises:
        ValueError: the digit lies outside the magnitude, or ``out`` has another size.   TypeError: another dtype.
    """
    bits = {torch.float32: 31, torch.float64: 63}.get(x.dtype)
    if bits is None:
        raise TypeError(f"magnitude_histogram: needs float32 or float64, got {x.dtype}")
    if not (1 <= width <= 16 and shift >= 0 and shift + width <= bits):
        raise ValueError(f"magnitude_histogram: shift {shift} and width {width} leave the {bits} bits of the magnitude")
    if out.shape != (1 << width,) or out.dtype != torch.int64 or not out.is_contiguous():
        raise ValueError(f"magnitude_histogram: out must be a contiguous int64 tensor of {1 << width} counts")
    if not out.is_cpu and out.device != x.device:
        raise ValueError(f"magnitude_histogram: out must lie on the CPU or on {x.device}, got {out.device}")
    with stage("trim", nbytes=x.nbytes):
        for_device(x.device).magnitude_histogram(x.contiguous(), out, shift, width, prefix)


@traceable
def elect(
    stack: Tensor,
    thresholds: Tensor | None = None,
    *,
    blocks: Sequence[int] | None = None,
    zero_sum: int = 0,
    reduce: str = "mean",
) -> Tensor:
    """Trim, elect a sign, merge the tasks that agree with it, and mask: in one pass over the stack.

    Per element: entries with ``|x| < threshold`` of their task count as 0; the elected sign is the sign of the sum over
    the tasks; the result is the mean (or sum) of the nonzero entries of that sign. TIES-Merging (arXiv 2306.01708,
    section 4) and DC-Merge (arXiv 2603.06242, section 3.3) differ only where the sum is exactly 0.

    Args:
        stack: (..., T, rows, cols), T >= 1, finite, any strides. Merged in float32, or float64 for float64.
        thresholds: (..., T), or None to trim nothing.
        blocks: sizes of the diagonal blocks kept by the structural mask of DC-Merge (section 3.4), adding up to
            rows = cols; everything outside is 0. None: no mask.
        zero_sum: where the sum is exactly 0: 0 gives 0 (DC-Merge); +1 or -1 elects that sign (TIES: the majority of
            the whole model).
        reduce: "mean" over the agreeing tasks, or "sum".
    Returns:
        (..., rows, cols), in the dtype of ``stack``.
    Raises:
        ValueError: shapes, blocks or choices that do not fit.   TypeError: not floating point.
    """
    _require_floating("elect", stack)
    if stack.ndim < 3 or stack.shape[-3] == 0:
        raise ValueError(f"elect: needs stack (..., T, rows, cols) with T >= 1, got {tuple(stack.shape)}")
    *leading, tasks, rows, cols = stack.shape
    if blocks is not None and (rows != cols or sum(blocks) != rows or min(blocks, default=0) < 0):
        raise ValueError(f"elect: blocks must be sizes adding up to {rows} = {cols}, got {list(blocks)}")
    if zero_sum not in (-1, 0, 1) or reduce not in ("mean", "sum"):
        raise ValueError(f"elect: zero_sum must be -1, 0 or 1 and reduce 'mean' or 'sum', got {zero_sum!r}, {reduce!r}")
    batched = _compute(stack).reshape(math.prod(leading), tasks, rows, cols).contiguous()
    limits = None
    if thresholds is not None:
        if thresholds.shape != (*leading, tasks):
            raise ValueError(f"elect: thresholds must be {(*leading, tasks)}, got {tuple(thresholds.shape)}")
        limits = thresholds.to(batched).reshape(-1, tasks).contiguous()
    with stage("elect", nbytes=batched.nbytes * (1 + 1 / tasks)):
        merged: Tensor = for_device(stack.device).elect(batched, limits, blocks, zero_sum, reduce == "mean")
    return merged.reshape(*leading, rows, cols).to(stack.dtype)


def project(
    left: Tensor, right: Tensor, s: Tensor, *, ranks: Sequence[int], counts: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The tasks' cores M_i = left[:, I_i] diag(s[I_i]) right[:, I_i]', of which only the diagonal blocks are kept.

    (DC-Merge, arXiv 2603.06242, section 3.3.) Trimming needs the magnitudes of all k^2 entries of each core, the merge
    after the structural mask only those inside the diagonal blocks: no more than one core exists at a time.

    Args:
        left, right: (..., k, k), float32 or float64: (U'U)^(1/2) and (V'V)^(1/2).   s: (..., k), same dtype.
        ranks: columns I_i of each of the T tasks, one after the other, adding up to k.
        counts: (..., T) int64: how many entries of each core trimming keeps, 1 .. k^2, clamped on a device.
        sizes: of the diagonal blocks, adding up to k.
    Returns:
        blocks (..., T, sum of sizes squared): of each core the blocks, row-major, one after the other.
        thresholds (..., T): the counts-th largest magnitude of each core.   largest (..., T): the largest.
    Raises:
        ValueError: shapes, dtypes, sums or counts that differ from that.
    """
    *leading, k, _ = left.shape if left.ndim >= 2 else (0, 0)
    tasks = len(ranks)
    if left.shape != (*leading, k, k) or right.shape != left.shape or s.shape != (*leading, k) or not k:
        shapes = ", ".join(str(tuple(x.shape)) for x in (left, right, s))
        raise ValueError(f"project: needs left and right (..., k, k) and s (..., k) with k >= 1, got {shapes}")
    if len({left.dtype, right.dtype, s.dtype}) > 1 or left.dtype not in _COMPUTE_DTYPES:
        dtypes = ", ".join(str(x.dtype) for x in (left, right, s))
        raise ValueError(f"project: needs one dtype, float32 or float64, got {dtypes}")
    for name, parts in (("ranks", ranks), ("sizes", sizes)):
        if sum(parts) != k or min(parts, default=0) < 0:
            raise ValueError(f"project: {name} must not be negative and add up to k = {k}, got {list(parts)}")
    if counts.shape != (*leading, tasks) or counts.dtype != torch.int64:
        raise ValueError(f"project: counts must be int64 {(*leading, tasks)}, got {counts.dtype} {tuple(counts.shape)}")
    _require_counts("project", counts, k * k)
    batch = math.prod(leading)
    u, v = (x.detach().reshape(batch, k, k).contiguous() for x in (left, right))
    values, wanted = s.detach().reshape(batch, k).contiguous(), counts.to(s.device).reshape(batch, tasks).contiguous()
    with stage("project", 2.0 * batch * k**3):
        found = for_device(left.device).project(u, v, values, ranks, wanted, sizes)
    blocks, thresholds, largest = (x.reshape(*leading, *x.shape[1:]) for x in found)
    return blocks, thresholds, largest


@traceable
def rademacher(
    rows: int,
    cols: int,
    *,
    seed: int,
    key: str = "",
    task: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A matrix of random signs that depends on its arguments alone, never on threads, device or global generators.

    Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11): element e in row-major order takes one bit of block e // 128,
    +1 where it is 0. Hence the first rows of a taller matrix are those of a shorter one of the same width; matrices
    that must be independent differ in seed, key, task or stream.

    Args:
        rows, cols: at least 0.
        seed: 0 .. 2**64-1.   key: a name, usually the tensor's; with ``seed`` it makes Philox's key by xxh3-64.
        task: 0 .. 2**32-1, one update of that tensor.   stream: 0 .. 2**32-1, one of several matrices for it.
        dtype: floating, half precision included.   device: where the matrix is drawn.
    Returns:
        (rows, cols) of +1 and -1.
    Raises:
        ValueError: a number outside its range.   TypeError: a dtype that is not floating point.
    """
    for name, value, bits in (("seed", seed, 64), ("task", task, 32), ("stream", stream, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"rademacher: {name} must lie in 0 .. 2**{bits}-1, got {value}")
    if min(rows, cols) < 0:
        raise ValueError(f"rademacher: rows and cols must not be negative, got {rows} x {cols}")
    if not dtype.is_floating_point:
        raise TypeError(f"rademacher: needs a floating dtype, got {dtype}")
    device = torch.device(device)
    computed = dtype if dtype in _COMPUTE_DTYPES else torch.float32
    hashed = xxhash.xxh3_64_intdigest(key.encode(), seed=seed)
    signs: Tensor = for_device(device).rademacher(rows, cols, hashed, task, stream, computed, device)
    return signs.to(dtype)


def orthonormalize(rows: Tensor, *, worst_pivot: float = 0.0) -> Tensor | None:
    """An orthonormal basis of the span of a few long rows: L^-1 Y with L L' = Y Y', one pass of CholeskyQR in float64.

    Args:
        rows: (count, length), float32 or float64, finite.
        worst_pivot: smallest diagonal entry of L, relative to the largest, of rows that count as independent. At 0,
            round-off decides whether exactly dependent rows are told from nearly dependent ones.
    Returns:
        (count, length), rows orthonormal to float32's eps down to pivots of 1e-4; None where the rows are dependent.
    Raises:
        ValueError: not a matrix.   TypeError: another dtype.
    """
    if rows.ndim != 2:
        raise ValueError(f"orthonormalize: needs rows (count, length), got {tuple(rows.shape)}")
    if rows.dtype not in _COMPUTE_DTYPES:
        raise TypeError(f"orthonormalize: needs float32 or float64, got {rows.dtype}")
    basis: Tensor | None = for_device(rows.device).orthonormalize(rows.contiguous(), worst_pivot)
    return basis


def gram_apply(x: Tensor, a: Tensor, image: Tensor) -> Tensor:
    """A few rows through A' and back, ``image = x a'`` and ``image a``, reading ``a`` once: a step of a Krylov method.

    Args:
        x: (count, n) float32, contiguous.   a: (m, n) float32, contiguous.   image: (count, m), contiguous, written.
    Returns:
        (count, n).
    Raises:
        ValueError: shapes, dtypes or strides that differ from that.
    """
    shapes = x.ndim == a.ndim == image.ndim == 2 and x.shape[1] == a.shape[1] and image.shape == (len(x), len(a))
    fit = all(t.dtype == torch.float32 and t.is_contiguous() and t.device == a.device for t in (x, a, image))
    if not (shapes and fit):
        raise ValueError(
            "gram_apply: needs contiguous float32 x (count, n), a (m, n) and image (count, m) on one device, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype} {t.device}" for t in (x, a, image))
        )
    back: Tensor = for_device(a.device).gram_apply(x, a, image)
    return back


def _require_counts(name: str, counts: Tensor, most: int) -> None:
    """Counts on a device are left to its kernels, which clamp them: to look would wait for it."""
    if counts.is_cpu and counts.numel() and not 1 <= int(counts.min()) <= int(counts.max()) <= most:
        raise ValueError(f"{name}: counts must lie in 1 .. {most}, got {int(counts.min())} .. {int(counts.max())}")


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype in _COMPUTE_DTYPES else x.float()


def _require_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: needs a floating tensor, got {x.dtype}")

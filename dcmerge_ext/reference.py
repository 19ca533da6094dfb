"""The operations of :mod:`dcmerge_ext.ops` in plain torch, on any device: oracle, specification and last resort."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
CHUNK = 1 << 17
"""Elements converted to float64 at a time: 1 MiB, a second-level cache."""
prefers_products = False


def kth_magnitude(x: Tensor, counts: Tensor) -> Tensor:
    descending = x.abs().sort(dim=-1, descending=True).values
    return descending.gather(-1, (counts.clamp(1, x.shape[-1]) - 1).unsqueeze(-1)).squeeze(-1)


def magnitude_histogram(x: Tensor, out: Tensor, shift: int, width: int, prefix: int) -> None:
    integers = torch.int32 if x.dtype == torch.float32 else torch.int64
    key = x.reshape(-1).view(integers) & torch.iinfo(integers).max
    digits = (key[key >> (shift + width) == prefix] >> shift) & ((1 << width) - 1)
    out += torch.bincount(digits, minlength=1 << width).to(out.device)


def elect(stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, mean: bool) -> Tensor:
    if thresholds is not None:
        stack = torch.where(stack.abs() >= thresholds[..., None, None], stack, 0)
    sign = torch.zeros_like(stack[:, 0])
    for task in stack.unbind(1):  # a plain loop: the order of summation is part of the contract
        sign += task
    sign = torch.where(sign == 0, zero_sum, sign.sign())
    total, votes = torch.zeros_like(sign), torch.zeros_like(sign)
    for task in stack.unbind(1):
        agrees = (task != 0) & (task.sign() == sign)
        total += torch.where(agrees, task, 0)
        votes += agrees
    merged = total / votes.clamp(min=1) if mean else total
    if blocks is not None:
        block = torch.repeat_interleave(
            torch.arange(len(blocks), device=stack.device), torch.tensor(blocks, device=stack.device)
        )
        merged = torch.where(block[:, None] == block, merged, 0)
    return merged


def project_outputs(left: Tensor, counts: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What ``project`` fills: blocks, thresholds, largest."""
    blocks = left.new_empty(*counts.shape, sum(size * size for size in sizes))
    return blocks, left.new_empty(counts.shape), left.new_empty(counts.shape)


def project(
    left: Tensor,
    right: Tensor,
    s: Tensor,
    ranks: Sequence[int],
    counts: Tensor,
    sizes: Sequence[int],
    kth: Callable[[Tensor, Tensor], Tensor] = kth_magnitude,
) -> tuple[Tensor, Tensor, Tensor]:
    ends = list(itertools.accumulate(sizes))
    blocks, thresholds, largest = project_outputs(left, counts, sizes)
    core = left.new_empty(left.shape[1:])  # one at a time: T of them would be the largest thing in memory
    for matrix, (u, v, values) in enumerate(zip(left, right, s, strict=True)):
        columns = (torch.split(side, list(ranks), dim=-1) for side in (u * values, v))
        for task, (mine, other) in enumerate(zip(*columns, strict=True)):
            torch.mm(mine, other.mT, out=core)
            thresholds[matrix, task] = kth(core.view(1, -1), counts[matrix, task].reshape(1))[0]
            low, high = core.aminmax()
            largest[matrix, task] = torch.maximum(-low, high)
            parts = (core[end - size : end, end - size : end] for end, size in zip(ends, sizes, strict=True))
            torch.cat([part.reshape(-1) for part in parts], out=blocks[matrix, task])
    return blocks, thresholds, largest


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, S, Vh


def newton_schulz(X: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """X <- X + X (a I + b G + c G^2), G = X'X, for each (a, b, c)."""
    for a, b, c in coefficients:
        gram = X.mT @ X
        correction = b * gram if c == 0 else b * gram + c * (gram @ gram)
        correction.diagonal(dim1=-2, dim2=-1).add_(a)
        X = X + X @ correction
    return X


def smooth_energy(S: Tensor, kind: str, parameter: float) -> Tensor:
    live = S > 0
    count = live.sum(-1, keepdim=True).clamp(min=1)
    energy = S.sum(-1, keepdim=True)
    if kind == "linear":
        last = torch.where(live, S, torch.inf).amin(-1, keepdim=True)
        ratio = (S[..., :1] / last).clamp(max=parameter)
        step = torch.arange(S.shape[-1], dtype=S.dtype, device=S.device) / (count - 1).clamp(min=1)
        weight = torch.where(live, ratio + (1 - ratio) * step, 0)
        total = weight.sum(-1, keepdim=True)
        return energy * weight / torch.where(total > 0, total, 1)
    mean = torch.where(live, energy / count, 0)
    return mean if kind == "average" else parameter * S + (1 - parameter) * mean


def rademacher(
    rows: int, cols: int, key: int, task: int, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    block = torch.arange(-(-rows * cols // 128), device=device)
    counter = [block & _WORD, block >> 32, torch.full_like(block, task), torch.full_like(block, stream)]
    words = torch.stack(philox(counter, key), dim=-1)
    bits = words[..., None] >> torch.arange(32, device=device) & 1
    return (1 - 2 * bits).flatten()[: rows * cols].reshape(rows, cols).to(dtype)


def philox(counter: Sequence[Tensor], key: int) -> list[Tensor]:
    """Philox4x32-10: the four words of many counters in, four random words out, each int64 in 0 .. 2**32-1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(10):
        # int64 products wrap modulo 2**64, which leaves the bits of the unsigned product; the mask undoes the sign
        # that the shift copies.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def drop(values: Tensor, rate: float, key: int, task: int, stream: int, offset: int) -> Tensor:
    given, out = values.reshape(-1), torch.empty_like(values)
    kept, dropped_below, gain = out.view(-1), round(rate * 2**32), 1 / (1 - rate)
    # each of a hundred steps over the blocks should find them in the second-level cache; a GPU wants long ones
    run = 1 << (15 if values.device.type == "cpu" else 22)
    for begin in range(0, given.numel(), run):
        part = given[begin : begin + run]
        first = offset + begin
        block = torch.arange(first // 4, -(-(first + len(part)) // 4), device=values.device)
        counter = [block & _WORD, block >> 32, torch.full_like(block, task), torch.full_like(block, stream)]
        words = torch.stack(philox(counter, key), dim=-1).flatten()[first % 4 :][: len(part)]
        kept[begin : begin + run] = (words >= dropped_below).to(values.dtype).mul_(gain).mul_(part)
    return out


def orthonormalize(rows: Tensor, worst_pivot: float) -> Tensor | None:
    if len(rows) == 0:
        return torch.empty_like(rows)
    wide = rows.double()
    L, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
    smallest, largest = L.diagonal().aminmax()
    if int(failed) or not float(smallest) > worst_pivot * float(largest):
        return None
    basis: Tensor = torch.linalg.solve_triangular(L, wide, upper=False)
    return basis.to(rows.dtype).contiguous()  # LAPACK leaves columns behind


def gram(x: Tensor) -> Tensor:
    total = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for piece in torch.split(x, max(64, CHUNK // max(len(x), 1)), dim=1):
        wide = piece.double()
        total.addmm_(wide, wide.mT)
    return total


def gram_apply(x: Tensor, a: Tensor, image: Tensor) -> Tensor:
    torch.mm(x, a.mT, out=image)
    return image @ a

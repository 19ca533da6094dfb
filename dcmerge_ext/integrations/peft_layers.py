"""The LoRA layers of a PEFT model: their adapters as updates, and PEFT's elementwise combinations without its full SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import Tensor, nn

from dcmerge_ext import ops
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update, concatenate
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.svd import truncated_svd
from dcmerge_ext.updates import compute_dtype, count_nonfinite

_PANEL = 1 << 16
"""Entries of one task that an election on a CPU looks at together: they stay in cache, and in one thread."""


def lora_layers(model: LoraModel) -> dict[str, LoraLayer]:
    """Path -> layer, for every module that PEFT has wrapped."""
    return {name: module for name, module in model.model.named_modules() if isinstance(module, LoraLayer)}


def factors(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    """lora_A (r, in, *kernel) and lora_B (out, r, 1 ..) of an adapter, an embedding's too; None where it has none."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


def is_embedding(layer: LoraLayer) -> bool:
    return len(layer.lora_embedding_A) > 0


def read_update(name: str, layer: LoraLayer, adapter: str, *, scaled: bool = True) -> LowRank | None:
    """scaling * B A in the compute dtype, (out, in), kernels flattened; (dim, num_embeddings) of an embedding.

    Raises:
        InputError: factors that do not fit together, NaN or Inf, naming adapter and module.
    """
    found = factors(layer, adapter)
    if found is None:
        return None
    a, b = (x.detach().flatten(1) for x in found)
    where = f"adapter {adapter!r}, module {name!r}"
    if a.shape[0] != b.shape[1]:
        raise InputError(f"{where}: lora_A {tuple(found[0].shape)} and lora_B {tuple(found[1].shape)} do not fit")
    dtype = compute_dtype(torch.promote_types(a.dtype, b.dtype))
    update = LowRank(b.to(dtype), a.to(dtype))
    if bad := count_nonfinite(update):
        raise InputError(f"{where}: its factors hold {bad} NaN or Inf values; repair or leave out that adapter")
    return update * layer.scaling[adapter] if scaled else update


def read_updates(
    layers: dict[str, LoraLayer], adapters: Sequence[str], *, scaled: bool = True
) -> dict[str, list[LowRank | None]]:
    """Path -> one update per adapter (None: it does not touch the module), for modules that any of them touches.

    Raises:
        InputError: as :func:`read_update`, or updates of one module whose shapes differ.
    """
    read: dict[str, list[LowRank | None]] = {}
    for name, layer in layers.items():
        updates = [read_update(name, layer, adapter, scaled=scaled) for adapter in adapters]
        shapes = {a: tuple(u.shape) for a, u in zip(adapters, updates, strict=True) if u is not None}
        if len(set(shapes.values())) > 1:
            listing = ", ".join(f"{adapter!r} {shape}" for adapter, shape in shapes.items())
            raise InputError(f"module {name!r}: the adapters update matrices of different shapes: {listing}")
        if shapes:
            read[name] = updates
    return read


def weighted_sum(updates: Sequence[LowRank | None], weights: Sequence[float]) -> LowRank:
    """Exactly, in factors: rank the sum of the ranks."""
    parts = [u * w for u, w in zip(updates, weights, strict=True) if u is not None]
    dtype = max((part.dtype for part in parts), key=lambda d: d.itemsize)
    return concatenate([part.to(dtype) for part in parts])


def truncated(update: Update, rank: int) -> LowRank:
    """The leading components, at most ``rank``, as PEFT divides them: (U S) Vh. Factors that are no wider stay as they are."""
    if isinstance(update, LowRank) and update.rank <= rank:
        return update
    U, S, Vh = truncated_svd(update, min(rank, *update.shape[-2:]))
    return LowRank(U * S[..., None, :], Vh).to(compute_dtype(update.dtype))


def laid_out(update: LowRank | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors in the shapes of ``a`` and ``b``, padded with zeros; None is the zero update."""
    dtype = torch.float32 if update is None else update.dtype
    new_a, new_b = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (a, b))
    if update is not None:
        new_a.flatten(1)[: update.rank] = update.right
        new_b.flatten(1)[:, : update.rank] = update.left
    return new_a, new_b


def widen(layer: LoraLayer, adapter: str) -> None:
    """Pad factors narrower than the adapter's rank with zeros: PEFT would not load them again."""
    for dim, parameter in enumerate(factors(layer, adapter) or ()):
        missing = layer.r[adapter] - parameter.shape[dim]
        if missing > 0:
            shape = list(parameter.shape)
            shape[dim] = missing
            parameter.data = torch.cat([parameter.data, parameter.data.new_zeros(shape)], dim=dim)


def elementwise(
    kind: str,
    layer: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    density: float,
    majority_sign_method: Any,
) -> Tensor:
    """The dense (out, in) combination that PEFT's ``*_svd`` types decompose, entry by entry the same.

    The dense updates are PEFT's, half precision included, and dropped entries are drawn by PEFT's own function, so that
    the random generator gives the same masks. Trimming finds the threshold instead of sorting; what follows it is
    PEFT's functions on panels of rows.
    """
    present = [(a, w) for a, w in zip(adapters, weights, strict=True) if factors(layer, a) is not None]
    deltas = [layer.get_delta_weight(adapter).detach() for adapter, _ in present]
    if kind.startswith("dare"):
        kept = [prune(delta, density, method="random", rescale=True) for delta in deltas]
    else:
        kept = [_trim(delta, density) for delta in deltas]
    matrices = [x.flatten(1) for x in kept]
    factor = torch.tensor([w for _, w in present], device=matrices[0].device)[:, None, None]
    rows, cols = matrices[0].shape
    merged = torch.empty(rows, cols, dtype=torch.promote_types(matrices[0].dtype, factor.dtype), device=factor.device)

    def combine(panel: slice) -> None:
        stack = torch.stack([x[panel] for x in matrices])
        if "ties" in kind:
            agreeing = calculate_majority_sign_mask(stack, method=majority_sign_method)
            merged[panel] = disjoint_merge(stack * factor, agreeing)
        else:
            merged[panel] = (stack * factor).sum(dim=0)

    if merged.is_cpu:
        step = max(1, _PANEL // cols)
        side_by_side(combine, [slice(begin, begin + step) for begin in range(0, rows, step)], each=1)
    else:
        combine(slice(None))
    transposed = is_embedding(layer) or getattr(layer, "fan_in_fan_out", False)
    return merged.T if transposed else merged


def _trim(delta: Tensor, density: float) -> Tensor:
    """PEFT's magnitude pruning. It keeps exactly int(density * N) entries: where several tie for the last places, the
    choice is torch.topk's, and is left to it.
    """
    count = int(density * delta.numel())
    if not (0 < density < 1 and count):
        return prune(delta, density, method="magnitude")
    keep = delta.abs() >= ops.kth_magnitude(delta.reshape(-1), count)
    if int(torch.count_nonzero(keep)) != count:
        return prune(delta, density, method="magnitude")
    return delta * keep

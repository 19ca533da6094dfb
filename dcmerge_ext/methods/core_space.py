"""Core Space: LoRA updates as small matrices in two bases that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.linalg.polar import default_tolerance
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.apply import merge_with
from dcmerge_ext.methods.averaging import Averaging
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.dare import Dare
from dcmerge_ext.methods.iso_c import flattened
from dcmerge_ext.methods.knots import ROUND_OFF
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.stacks import dense_update
from dcmerge_ext.methods.sums import zero_update
from dcmerge_ext.methods.task_arithmetic import TaskArithmetic
from dcmerge_ext.methods.ties import Ties
from dcmerge_ext.methods.tsv_m import TsvM
from dcmerge_ext.svd import Components
from dcmerge_ext.svd.dense import svd
from dcmerge_ext.svd.factors import thin_qr
from dcmerge_ext.updates import Updates, UpdateSpec


class CoreSpace(Method, frozen=True):
    """Write LoRA updates as small cores in two shared bases, merge the cores by another method, map back (Core Space).

    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786. Per matrix,
    Delta_i = B_i A_i, k the sum of the ranks (m x k and n x k bases, at most m and n wide):
        U = left singular vectors of [B_1 .. B_T],   V = right singular vectors of [A_1; ..; A_T]
        C_i = U' B_i A_i V        k x k;             merged = U C V',   C merged from the C_i by ``aggregate``
    Nothing is lost: U C_i V' = Delta_i. So ``sum`` is task arithmetic, ``tsv_m`` of adapters of one rank TSV-M, and
    ``sum`` made isotropic Iso-C; the rules that look at entries (ties, dare) depend on the bases. Ranks may differ.

    Defaults: TSV-M with isotropic cores, the pair that the authors' instructions run; their function leaves isotropy out
    unless told. Scale: 1; the authors search 0.1, 0.2 .. 9.9 on validation data. Their centred merge of truncated cores
    (CART) is not offered. The result is a LowRank of rank k. Cost per matrix: 8 (m + n) k^2 flops, then k x k work, all
    in float64.

    For LoRA updates only: a dense update has no factors. The bases are those of the factors as they are stored (a scale
    or weight lies on the smaller one): other factors of the same update give other entries. Deviations from the
    published code: entries of the cores at the level of round-off are 0 and do not count in means; null directions, of
    adapters that share some, take no part and add nothing made up when cores become isotropic, where the mean is over the
    directions that are not null; a task that does not touch a matrix does not count in TSV-M's int(k / T). Entrywise rules
    of cores with singular values that repeat give one of several results.
    """

    name = "core_space"
    paper = "https://arxiv.org/abs/2509.17786"
    keeps_rank = True

    aggregate: Annotated[
        Literal["sum", "mean", "ties", "dare", "dare_ties", "tsv_m"],
        Meta(
            description="of the cores, matrix by matrix: task arithmetic, averaging, TIES, DARE, DARE then TIES, TSV-M"
        ),
    ] = "tsv_m"
    isotropic: Annotated[
        bool, Meta(description="give all singular values of the merged core their mean, as Iso-C does")
    ] = True
    keep: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(
            description="aggregate=ties and dare_ties: fraction of each core that survives trimming. None: 0.1, as coded"
        ),
    ] = None
    rate: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        Meta(description="aggregate=dare and dare_ties: probability of dropping an entry. None: 0.3, as coded"),
    ] = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="aggregate=dare and dare_ties: of the masks")] = 0

    def __post_init__(self) -> None:
        for option, owners in (("keep", ("ties", "dare_ties")), ("rate", ("dare", "dare_ties"))):
            if getattr(self, option) is not None and self.aggregate not in owners:
                names = " or ".join(map(repr, owners))
                raise ValueError(f"{option} belongs to aggregate={names}, and aggregate is {self.aggregate!r}")

    @property
    def _rule(self) -> Method:
        keep, rate = 0.1 if self.keep is None else self.keep, 0.3 if self.rate is None else self.rate
        rules: dict[str, Method] = {
            "sum": TaskArithmetic(),
            "mean": Averaging(),
            "ties": Ties(keep=keep),
            "dare": Dare(rate=rate, seed=self.seed),
            "dare_ties": Dare(aggregate="ties", rate=rate, keep=keep, seed=self.seed),
            "tsv_m": TsvM(),
        }
        return rules[self.aggregate]

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"core_space merges matrices (..., m, n), got an update of shape {specs[0].shape}")
        if dense := [i for i, spec in enumerate(specs) if spec.rank is None]:
            raise OptionError(
                f"core_space merges LoRA updates only, and update {dense[0]} is dense; "
                "choose another method, for such tensors alone by an override"
            )

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        return min(*specs[0].shape[-2:], sum(spec.rank or 0 for spec in specs))

    def merge(self, updates: Updates, ctx: Context) -> Update:
        factors = {i: u for i, u in enumerate(updates) if isinstance(u, LowRank) and u.rank}
        if 0 in updates.shape or not factors:
            return zero_update(updates)
        eps = torch.finfo(updates.dtype).eps
        ranks = [u.rank for u in factors.values()]
        U, S, coordinates = _basis(torch.cat([u.left for u in factors.values()], dim=-1), eps)
        V, St, others = _basis(torch.cat([u.right for u in factors.values()], dim=-2).mT, eps)
        pairs = zip(torch.split(coordinates, ranks, dim=-1), torch.split(others, ranks, dim=-1), strict=True)
        round_off = (S[..., :1] * St[..., :1])[..., None] * (ROUND_OFF * torch.finfo(S.dtype).eps)
        products = (left @ right.mT for left, right in pairs)
        cores = {i: C.masked_fill(C.abs() <= round_off, 0) for i, C in zip(factors, products, strict=True)}
        ctx.facts["core"] = [int((values > 0).sum(-1).amax()) for values in (S, St)]
        core = self._merge_cores(cores, len(updates), ctx, eps)
        if U.shape[-1] <= V.shape[-1]:
            return LowRank(U, core @ V.mT).to(updates.dtype)
        return LowRank(U @ core, V.mT).to(updates.dtype)

    def _merge_cores(self, cores: dict[int, Tensor], tasks: int, ctx: Context, eps: float) -> Tensor:
        """(..., k, k) of each touching task -> (..., k, k), one matrix of the batch at a time: that is the rules' scope."""
        *leading, rows, cols = next(iter(cores.values())).shape
        flat = {i: core.reshape(-1, rows, cols) for i, core in cores.items()}
        merged = []
        for j in range(math.prod(leading)):
            each = {i: core[j] for i, core in flat.items()}
            some = next(iter(each.values()))
            untouched = LowRank(some.new_zeros(rows, 0), some.new_zeros(0, cols))
            key = f"{ctx.key}[{j}]" if leading else ctx.key
            found = merge_with(self._rule, {key: [each.get(i, untouched) for i in range(tasks)]}, None)[key]
            merged.append(dense_update(found))
            if self.isotropic:
                merged[-1] = _isotropic(merged[-1], list(each.values()), eps, ctx.facts)
        return torch.stack(merged).reshape(*leading, rows, cols)

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        *leading, m, n = specs[0].shape
        k = sum(spec.rank or 0 for spec in specs)
        return float(math.prod(leading) * (8 * (m + n) * k * k + (60 + 2 * len(specs)) * k**3))

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        *leading, m, n = specs[0].shape
        k = sum(spec.rank or 0 for spec in specs)
        return math.prod(leading) * (8 * (m + n) * k + (12 + 4 * len(specs)) * k * k) + 1


core_space = register(CoreSpace)


def _basis(factors: Tensor, eps: float) -> Components:
    """Left singular vectors of (..., m, k), singular values with null ones 0, and the coordinates of the columns.

    In float64, in a basis of min(m, k) vectors.
    """
    Q, R = thin_qr(factors.double())
    u, values, vh = svd(R)
    null = values <= eps * factors.shape[-1] ** 0.5 * values[..., :1]
    values = values.masked_fill(null, 0)
    return Components(Q @ u, values, values[..., None] * vh)


def _isotropic(core: Tensor, cores: Sequence[Tensor], eps: float, facts: dict[str, Any]) -> Tensor:
    """mean(s) U V' of one core, over the directions that are not null.

    Null is what round-off of the cores explains: where tasks cancel, they leave no direction.
    """
    tolerance = default_tolerance(core.shape[-2], core.shape[-1], core.dtype)
    if size := float(torch.linalg.matrix_norm(core)):
        scale = math.hypot(*(float(torch.linalg.matrix_norm(c)) for c in cores))
        tolerance = min(1.0, max(tolerance, eps * core.shape[-1] ** 0.5 * scale / size))
    return flattened(core, tolerance, "rank", facts)

"""KnOTS: TIES or DARE-TIES in the basis that the stacked updates share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.dare import Dare
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.stacks import dense_update
from dcmerge_ext.methods.sums import zero_update
from dcmerge_ext.methods.ties import Ties
from dcmerge_ext.svd import cost, decompose
from dcmerge_ext.svd.dense import svd
from dcmerge_ext.svd.factors import thin_qr
from dcmerge_ext.updates import Updates, UpdateSpec

ROUND_OFF = 16
"""Of a coordinate, in eps of the largest singular value."""
_MOST_KEPT = 64 << 20
"""Bytes of k x k matrices of LowRank stacks kept from one pass to the next; further ones are decomposed again."""


class Knots(Method, frozen=True):
    """Bring all updates into one basis by the SVD of their concatenation, merge by TIES there (KnOTS-TIES).

    Source: Stoica et al., Model merging with SVD to tie the Knots, arXiv 2410.19735. Per matrix
        [Delta_1 .. Delta_T] = U diag(s) [V_1' .. V_T'],   M_i = diag(s) V_i' = U' Delta_i        k x n
    then TIES-Merging of the M_i over the whole model, one vector per task as in the published code: int(N keep) + 1 of
    its N entries survive. merged = U M. With aggregate=dare_ties entries of M_i are dropped at random first, and nothing
    is trimmed unless told. Untrimmed sums would give task arithmetic.

    LowRank updates, what the method is meant for, give a LowRank of rank k = min(m, sum of the ranks): with thin QRs
    B = [B_1 .. B_T] = Q R and A_i = L_i Q_i the SVD is that of the k x k matrix R blockdiag(L_i), in float64, and
    M_i = u' R_i A_i. Dense updates are stacked as they are, at the cost of an SVD of m x T n.

    Scale: the published configurations for eight ViT-B/32 adapters have 0.6 with TIES and 0.7 with DARE-TIES, 0.5 for
    Llama-3-8B with nothing trimmed; they ignore lora_alpha. Cost of each pass (four over float32, six over float64, two
    where nothing is trimmed): 2 n k^2 flops for the M_i, which are held for one matrix; of the first one 4 (m + n) k^2 and
    the k x k SVD (of each pass where those of all matrices take more than 64 MiB), of the last one 2 m k^2.

    Deviations from the published code: singular values count as null relative to the largest rather than below 1e-5
    (``cutoff``), so that the method does not depend on the unit of the weights; entries of M_i at the level of round-off
    are 0 and do not count in means; those that equal the threshold up to round-off survive with it. Where singular values
    of the stack repeat, its basis and the result are one of several; where tasks cancel in an entry of M_i, its round-off
    elects the sign. Tensors that are not matrices take the mean; the published code leaves them as they are.
    """

    name = "knots"
    paper = "https://arxiv.org/abs/2410.19735"
    scope = "model"
    keeps_rank = True

    aggregate: Annotated[
        Literal["ties", "dare_ties"], Meta(description="of the aligned updates M_i: KnOTS-TIES or KnOTS-DARE-TIES")
    ] = "ties"
    keep: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(
            description="fraction of each task's aligned entries that survives trimming. None: published for ViT, 0.2 with "
            "ties and 1 with dare_ties (1 with both for Llama)"
        ),
    ] = None
    rate: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        Meta(description="aggregate=dare_ties: probability of dropping an entry. None: 0.1, as published"),
    ] = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="aggregate=dare_ties: of the random masks")] = 0
    share: Annotated[
        Literal["output", "input"],
        Meta(
            description="side on which the tasks get one basis: output, updates stacked side by side (published default); "
            "input, on top of each other"
        ),
    ] = "output"
    cutoff: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="singular values of the stack at or below this are null and take no part; the published code's is "
            "1e-5. None: round-off, relative to the largest"
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.aggregate != "dare_ties":
            raise ValueError(f"rate belongs to aggregate='dare_ties', and aggregate is {self.aggregate!r}")

    @property
    def _rule(self) -> Ties | Dare:
        if self.aggregate == "ties":
            return Ties(keep=0.2 if self.keep is None else self.keep)
        return Dare(
            aggregate="ties",
            rate=0.1 if self.rate is None else self.rate,
            keep=1.0 if self.keep is None else self.keep,
            seed=self.seed,
        )

    def default_scale(self, num_tasks: int) -> float:
        if num_tasks == 1:
            return 1.0
        return 0.6 if self.aggregate == "ties" else 0.7

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"knots merges matrices (..., m, n), got an update of shape {specs[0].shape}")

    def num_surveys(self, dtype: torch.dtype) -> int:
        return self._rule.num_surveys(dtype)

    def begin(self, num_tasks: int, dtype: torch.dtype) -> _State:
        return _State(self._rule.begin(num_tasks, dtype), {})

    def survey(self, key: str, updates: Updates, state: _State) -> None:
        if 0 in updates.shape or all(spec.rank == 0 for spec in updates.specs):
            return
        aligned = _align(key, self._facing(updates), self.cutoff, state)
        if 0 not in aligned.updates.shape:
            self._rule.survey(key, aligned.updates, state.rule)

    def finish(self, state: _State) -> _State:
        return replace(state, rule=self._rule.finish(state.rule))

    def merge(self, updates: Updates, ctx: Context) -> Update:
        if 0 in updates.shape or all(spec.rank == 0 for spec in updates.specs):
            return zero_update(updates)
        state: _State = ctx.state
        basis, live, aligned, round_off = _align(ctx.key, self._facing(updates), self.cutoff, state)
        ctx.facts["rank"] = int(live.sum(-1).amax())
        merged = torch.zeros(*live.shape, aligned.shape[-1], dtype=updates.dtype, device=live.device)
        if 0 not in aligned.shape:
            merged[live] = dense_update(
                self._rule.merge(aligned, replace(ctx, state=self._lenient(state.rule, round_off)))
            )
        found = LowRank(basis().to(updates.dtype), merged)
        found = found if self.share == "output" else found.mT
        return found if updates.all_lowrank else found.dense()

    def _lenient(self, state: Any, round_off: float) -> Any:
        """Thresholds lowered by what the M_i may differ between two passes: what a survey counted must survive."""
        thresholds = state.thresholds * (1 - 4 * torch.finfo(state.thresholds.dtype).eps)
        rescaled = 1 / (1 - (self._rule.rate if isinstance(self._rule, Dare) else 0))
        return replace(state, thresholds=(thresholds - rescaled * round_off).clamp(min=0))

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        m, n = specs[0].shape[-2:] if self.share == "output" else specs[0].shape[:-3:-1]
        return min(m, sum(min(spec.rank or 0, n) for spec in specs))

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        *leading, m, n = specs[0].shape
        tasks = sum(spec.rank != 0 for spec in specs)
        if all(spec.rank is not None for spec in specs):
            k = sum(spec.rank or 0 for spec in specs)
            one = 4.0 * (m + n) * k * k + 25 * k**3 + 2 * n * k * k
        else:
            one = cost.plan(m, tasks * n, min(m, tasks * n)).cost
        return float((1 + self.num_surveys(torch.float32)) * math.prod(leading) * one)

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        *leading, m, n = specs[0].shape
        tasks = max(1, sum(spec.rank != 0 for spec in specs))
        if all(spec.rank is not None for spec in specs):
            k = sum(spec.rank or 0 for spec in specs)
            return math.prod(leading) * (8 * (m + n) * k + 12 * k * k + (tasks + 3) * k * n)
        return math.prod(leading) * 5 * tasks * m * n

    def _facing(self, updates: Updates) -> Updates:
        """The updates with the side that gets the shared basis on the left."""
        if self.share == "output":
            return updates
        *leading, m, n = updates.shape
        return Updates([spec._replace(shape=(*leading, n, m)) for spec in updates.specs], lambda i: updates[i].mT)


knots = register(Knots)


class _Core(NamedTuple):
    """The stack [B_1 A_1 .. B_T A_T] = U diag(s) V' with B = [B_1 .. B_T] = Q R, in float64: U = Q rotation."""

    rotation: Tensor
    values: Tensor
    """s; null components have 0."""
    coordinates: Tensor
    """U'B = rotation' R, so that M_i = coordinates_i A_i."""


@dataclass
class _State:
    """A :class:`~dcmerge_ext.methods.base.SurveyState`: that of the rule for the M_i, and cores by name."""

    rule: Any
    cores: dict[str, _Core]

    def fork(self) -> _State:
        return replace(self, rule=self.rule.fork())

    def join(self, share: _State) -> None:
        self.rule.join(share.rule)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to other processes: they compute the cores that they need."""
        return {"rule": self.rule, "cores": {}}

    def keep(self, key: str, core: _Core) -> None:
        cores = [core, *self.cores.values()]
        if sum(part.nbytes for kept in cores for part in kept) <= _MOST_KEPT:
            self.cores[key] = core


class _Aligned(NamedTuple):
    basis: Callable[[], Tensor]
    """Computes U (..., m, k)."""
    live: Tensor
    """(..., k): which of its columns are not null."""
    updates: Updates
    """T updates (L, n): the rows of M_i that are not null, of all matrices of the batch."""
    round_off: float
    """Of their entries: BLAS may add in another order where memory is aligned differently."""


def _align(key: str, updates: Updates, cutoff: float | None, state: _State) -> _Aligned:
    """The SVD of the updates side by side, those of rank 0 left out."""
    touching = [i for i, spec in enumerate(updates.specs) if spec.rank != 0]
    loaded = [updates[i] for i in touching]
    n = updates.shape[-1]
    if updates.all_lowrank:
        factors = [u for u in loaded if isinstance(u, LowRank)]
        core = state.cores.get(key) or _core(factors, torch.finfo(updates.dtype).eps)
        state.keep(key, core)
        values = core.values
        parts = [
            coordinates @ u.right.double()
            for coordinates, u in zip(
                torch.split(core.coordinates, [u.rank for u in factors], -1), factors, strict=True
            )
        ]

        def basis() -> Tensor:
            return thin_qr(_side_by_side(factors))[0] @ core.rotation
    else:
        stack = torch.cat([dense_update(u).to(updates.dtype) for u in loaded], dim=-1)
        found, _ = decompose(stack, min(stack.shape[-2:]))
        left, values, right = found
        parts = list(torch.split(values[..., None] * right, n, dim=-1))

        def basis() -> Tensor:
            return left

    live = values > (cutoff or 0)
    round_off = values[..., :1, None] * (ROUND_OFF * torch.finfo(values.dtype).eps)
    rows = {
        i: _rows(part.to(updates.dtype), live, round_off.to(updates.dtype))
        for i, part in zip(touching, parts, strict=True)
    }
    shape = (int(live.sum()), n)
    none = LowRank(values.new_zeros(shape[0], 0), values.new_zeros(0, n)).to(updates.dtype)
    specs = [UpdateSpec(shape, None if i in rows else 0, updates.dtype) for i in range(len(updates))]
    return _Aligned(basis, live, Updates(specs, lambda i: rows.get(i, none)), float(round_off.amax()))


def _rows(part: Tensor, live: Tensor, round_off: Tensor) -> Tensor:
    """Those of M_i that are not null, without their round-off."""
    part = part.masked_fill(part.abs() <= round_off, 0)
    return part.reshape(-1, part.shape[-1]) if bool(live.all()) else part[live]


def _side_by_side(factors: Sequence[LowRank]) -> Tensor:
    return torch.cat([u.left for u in factors], dim=-1).double()


def _core(factors: Sequence[LowRank], eps: float) -> _Core:
    _, R = thin_qr(_side_by_side(factors))
    blocks = torch.split(R, [u.rank for u in factors], dim=-1)
    triangles = [thin_qr(u.right.double().mT)[1] for u in factors]
    u, values, _ = svd(torch.cat([block @ L.mT for block, L in zip(blocks, triangles, strict=True)], dim=-1))
    null = values <= eps * R.shape[-1] ** 0.5 * values[..., :1]  # the factors carry their dtype's round-off
    return _Core(u, values.masked_fill(null, 0), u.mT @ R)

"""ESM: the principal directions of what each update does to a layer's outputs, made orthonormal together."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.calibration.grams import Gram, Grams, find_gram, open_grams
from dcmerge_ext.errors import ConvergenceError, InputError, OptionError
from dcmerge_ext.linalg.polar import polar_with_values
from dcmerge_ext.lowrank import LowRank, Update, times
from dcmerge_ext.methods.base import Context, Method, Preset
from dcmerge_ext.methods.cover import Cover, basis_facts
from dcmerge_ext.methods.cover_method import cover_flops, cover_workspace
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.spectral import Rank, check_ranks, component_ranks, components_of
from dcmerge_ext.methods.sums import mean_instead, zero_update
from dcmerge_ext.methods.tsv_m import TsvM
from dcmerge_ext.products import wide_product
from dcmerge_ext.svd.dense import eigh
from dcmerge_ext.svd.factors import thin_qr
from dcmerge_ext.updates import Updates, UpdateSpec

logger = logging.getLogger(__name__)

_WORST_PIVOT = 1e-6
"""Smallest pivot of a Cholesky factor, relative to the largest, of a Gram matrix that counts as definite."""


class Esm(Method, frozen=True):
    """Keep each task's main directions of output shift, seen on a few samples, and make them orthonormal together (ESM).

    Source: arXiv 2602.20208, Essential Subspace Merging, with what its published code adds. Needs, per task, the Gram
    matrices X'X of the layers' inputs X (tokens x n) in the fine-tuned model, from at most 32 unlabelled samples:
    `dcmerge calibrate`. Per m x n matrix and task, k = int(m / T), m the outputs:
        X Delta_t' = . diag(s) P'              not centred; P m x k, s^2 the shifts' energies
        e = s^0.3 / mean(s^0.3)                energies to the power 0.15
        P_t = P diag(e),   A_t = (|Delta_t| / mean_t |Delta_t|)^2 diag(e) P' Delta_t
        P = [P_1 .. P_T],  A = [A_1; ..; A_T], columns of A times (their norm / mean norm)^2
        merged = 2 mean(sv(P)) mean(sv(A)) polar(P) polar(A)
    then each matrix times (its norm / mean norm over its family)^2, a family being the matrices whose names differ in the
    layer's number alone: the first part of the name that is a number. This needs a second pass. ``variant`` = roberta, the
    authors' code for text encoders: no factors from norms of tasks and columns, no 2.

    A matrix without activations (embeddings, or left out at calibration) is merged by TSV-M, with its singular values
    times mean(sv(U)) mean(sv(V)) for roberta, and takes part in the scaling of layers. The published code for CLIP has
    activations for in_proj, c_fc and c_proj alone. Without any files esm is TSV-M, nothing else, with a warning.

    X itself is not needed: P and s are the left singular vectors and values of Delta_t R with R R' = X'X. Their scale
    cancels. LowRank updates keep all their directions by default and give a LowRank of rank k, the sum of the r_t.
    Scale: 1; the authors search 0.1, 0.2 .. 3.0 on validation data (roberta: up to 20). Their scale for CLIP is that of
    the matrices with activations alone, all others have 1. ESM++, which routes inputs, is not offered. Cost per matrix,
    twice with ``layer_scaling``: per task a Cholesky factor n x n, 2 m n^2 flops and a truncated SVD (of LowRank updates 2 n^2 r flops and small matrices); polar factors of
    m x T k and T k x n; 4 k T m n flops for products.

    Deviations from the published code, where its result is arbitrary: directions in which no output shifts take no part
    (it pads P with the identity where there are fewer tokens than outputs), and neither does a task that shifts none;
    means over k count the null ones, as published. Directions that tasks share add nothing made up (partial isometry),
    |Delta_t| is the norm of the whole update, and fewer rows or columns than tasks give the mean, with a warning. The
    singular values of A fall further than those of a basis: where float32 cannot tell the weakest from round-off, the
    matrix is merged in float64, at about four times the time.
    ``eigenvalue_power`` = 0 gives the paper's bases, up to a factor per matrix.
    """

    name = "esm"
    paper = "https://arxiv.org/abs/2602.20208"
    scope = "model"
    keeps_rank = True
    presets: ClassVar = {
        "vit": Preset({"variant": "vit"}, "apply", r"text_projection"),
        "roberta": Preset({"variant": "roberta"}),
    }

    official: Annotated[
        Literal["vit", "roberta"] | None,
        Meta(description="the authors' settings for CLIP (text projections take the mean) and for RoBERTa"),
    ] = None
    activations: Annotated[
        tuple[str | Grams, ...] | None,
        Meta(
            description="one file of `dcmerge calibrate` per task, in the order of the tasks; in Python also "
            "Grams.of(collect_grams(...))"
        ),
    ] = None
    variant: Annotated[
        Literal["vit", "roberta"],
        Meta(
            description="vit: tasks and columns weighted by their norms, times 2; roberta: neither, as coded for text"
        ),
    ] = "vit"
    rank: Annotated[
        Rank | tuple[Rank, ...] | None,
        Meta(
            description="directions kept per task, or a list with one number per task. None: the numerical rank of a LowRank; "
            "int(m / T) for dense updates (paper and code), m = outputs; TSV-M: int(min(m, n) / T)"
        ),
    ] = None
    eigenvalue_power: Annotated[
        float,
        Meta(ge=0, le=1, description="power of the energies that weights directions; published code: 0.15, paper: 0"),
    ] = 0.15
    layer_scaling: Annotated[
        bool, Meta(description="multiply each matrix by (its norm / mean norm of its family)^2 (paper and code)")
    ] = True
    basis_tol: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(
            description="directions of the concatenated factors with singular values at or below this fraction of the largest "
            "are dropped (the published code keeps all). None: 2 sqrt(max(m, k)) eps in float64; in float32 eps, seen in float64 where float32 does not tell",
        ),
    ] = None
    accuracy: Annotated[Literal["exact", "fast"], Meta(description="of the truncated SVD of dense updates")] = "exact"
    seed: Annotated[int, Meta(ge=0, description="of the random directions of the truncated SVD")] = 0

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"esm merges matrices (..., m, n), got an update of shape {specs[0].shape}")
        check_ranks(specs, num_tasks, self.rank)
        if self.activations is None:
            return
        if len(self.activations) != num_tasks:
            raise OptionError(
                f"activations has {len(self.activations)} entries for {num_tasks} tasks; "
                "give one file of `dcmerge calibrate` per task, in their order"
            )
        for source in self.activations:
            open_grams(source)

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        return self._fallback.merged_rank(specs, num_tasks)

    def num_surveys(self, dtype: torch.dtype) -> int:
        return 0 if self.activations is None else 1

    def begin(self, num_tasks: int, dtype: torch.dtype) -> _Survey | None:
        if self.activations is None:
            logger.warning(
                "esm: no activations are given, so that every matrix is merged by TSV-M; collect them with "
                "`dcmerge calibrate` and set activations"
            )
            return None
        return _Survey(num_tasks)

    def survey(self, key: str, updates: Updates, state: _Survey) -> None:
        if self.layer_scaling:
            state.norms[key] = float(
                torch.linalg.vector_norm(_norm(self._merge(updates, Context(state.num_tasks, key))))
            )
        state.reached = state.reached or self._grams(updates.specs, key) is not None
        if (task := self._lacking(updates.specs, key)) is not None:
            state.lacking[key] = task

    def finish(self, state: _Survey) -> dict[str, float]:
        if state.lacking:
            key = min(state.lacking)
            logger.warning(
                "esm: matrices that not every task has activations for are merged by TSV-M: %d, such as %s, for which task %d "
                "has none",
                len(state.lacking),
                key or "this one",
                state.lacking[key],
            )
        elif not state.reached:
            logger.warning(
                "esm: no matrix has activations, so that TSV-M merges all of them; the names in the files must be those of "
                "the base's tensors"
            )
        return layer_factors(state.norms)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        merged = self._merge(updates, ctx)
        factor: float = (ctx.state or {}).get(ctx.key, 1.0)
        if factor == 1:
            return merged
        ctx.facts["layer_factor"] = factor
        return merged * factor

    def _merge(self, updates: Updates, ctx: Context) -> Update:
        """Before layers are scaled against each other."""
        ranks = component_ranks(updates.specs, ctx.num_tasks, self.rank)
        if ranks is None:
            return mean_instead(self.name, updates, ctx)
        if sum(ranks) == 0 or 0 in updates.shape:
            return zero_update(updates)
        grams = self._grams(updates.specs, ctx.key)
        if grams is None:
            ctx.facts["fallback"] = "tsv_m: no activations"
            return self._fallback.merge(updates, ctx)
        if not next(gram.transposed for gram in grams if gram):
            return self._merge_shifts(updates, grams, ctx)
        specs = [spec._replace(shape=(*spec.shape[:-2], *spec.shape[:-3:-1])) for spec in updates.specs]
        return self._merge_shifts(Updates(specs, lambda i: updates[i].mT), grams, ctx).mT

    def _merge_shifts(self, updates: Updates, grams: Sequence[Gram | None], ctx: Context) -> Update:
        """In float64 where float32 leaves it open whether weak directions are there (see ``polar_decided``)."""
        merged = self._merge_once(updates, grams, ctx)
        dropped = ctx.facts["cover_u"]["dropped"] + ctx.facts["cover_v"]["dropped"]
        if not dropped or self.basis_tol is not None or updates.all_lowrank or updates.dtype == torch.float64:
            return merged
        specs = [spec._replace(dtype=torch.float64) for spec in updates.specs]
        again = Updates(specs, lambda i: updates[i].double())
        return self._merge_once(again, grams, ctx, torch.finfo(updates.dtype).eps).to(updates.dtype)

    def _merge_once(
        self, updates: Updates, grams: Sequence[Gram | None], ctx: Context, round_off: float | None = None
    ) -> Update:
        """``round_off``: that of the entries, where it decides how many directions there are rather than ``basis_tol``."""
        m, n = updates.shape[-2:]
        slots = self._slots(updates.specs, ctx.num_tasks)
        components, ctx.facts["svd"] = components_of(
            Updates(updates.specs, lambda i: _output_shift(updates[i], grams[i])),
            [min(count, m, n) for count in slots],
            accuracy=self.accuracy,
            seed=self.seed,
            key=ctx.key,
        )
        if ctx.facts["svd"].get("ties"):
            logger.warning(
                "%s: energies tie at the cut; one of several equally good truncations is used", ctx.key or self.name
            )
        dtype = torch.float64 if updates.all_lowrank else updates.dtype
        bases, coordinates, norms, counts = [], [], [], []
        tasks = [i for i, count in enumerate(slots) if count]
        for i, (U, S, _) in zip(tasks, components, strict=True):
            P = (U * _energy_weights(S, self.eigenvalue_power, slots[i])[..., None, :]).to(dtype)
            update = updates[i]
            bases.append(P)
            coordinates.append(times(P.mT, update))
            shifts = S[..., 0] > 0
            norms.append(torch.where(shifts, _norm(update), 0))
            counts.append(shifts * slots[i])
        components.clear()
        live = torch.stack([(P != 0).any(-2).sum(-1) for P in bases], dim=-1)
        ctx.facts["rank"] = live.reshape(-1, live.shape[-1]).amax(0).tolist()
        if self.variant == "vit":
            for A, share in zip(coordinates, _relative(torch.stack(norms), over=0), strict=True):
                A *= share.to(dtype)[..., None, None] ** 2
        P, A = torch.cat(bases, dim=-1), torch.cat(coordinates, dim=-2)
        ranks = [None if round_off is None else _independent(rows, round_off) for rows in (P.mT, A)]
        if self.variant == "vit":
            A *= _relative(torch.linalg.vector_norm(A, dim=-2), over=-1)[..., None, :] ** 2
        width = torch.stack(counts).sum(0)
        left, ctx.facts["cover_u"] = self._flat(P, width.clamp(1, m), live, ranks[0])
        right, ctx.facts["cover_v"] = self._flat(A, width.clamp(1, n), live, ranks[1])
        if self.variant == "vit":
            left = left * 2
        return LowRank(left, right).to(updates.dtype) if updates.all_lowrank else left @ right

    def _slots(self, specs: Sequence[UpdateSpec], num_tasks: int) -> list[int]:
        """k of each task, where a component each fits in min(m, n).

        By the number of outputs, whatever that of the inputs: what exceeds min(m, n) is null, and counts in the means.
        """
        m = specs[0].shape[-2]
        slots = component_ranks([spec._replace(shape=(m, m)) for spec in specs], num_tasks, self.rank)
        assert slots is not None  # m is at least min(m, n)
        return slots

    def _flat(
        self, X: Tensor, count: Tensor, live: Tensor, rank: Tensor | None
    ) -> tuple[Tensor, dict[str, float | int]]:
        """mean(sv(X)) polar(X), the mean over ``count`` (...) singular values, of which null ones are 0; and its facts.

        ``rank`` (...): number of singular values that are not null, where that is known.
        """
        wide = X.shape[-1] > X.shape[-2]  # the routes to a polar factor take tall matrices
        X = X.mT if wide else X
        Q, values = _polar_of_rank(X, rank) if rank is not None else polar_with_values(X, self.basis_tol)[::2]
        Q *= (values.sum(-1) / count)[..., None, None]
        return Q.mT if wide else Q, basis_facts(values, live)

    def _grams(self, specs: Sequence[UpdateSpec], key: str) -> list[Gram | None] | None:
        """Of every task that touches the tensor; None where one of them has none, and TSV-M is taken."""
        if self.activations is None:
            return None
        grams = [
            find_gram(source, key) if spec.rank != 0 else None
            for source, spec in zip(self.activations, specs, strict=True)
        ]
        found = [gram for gram in grams if gram]
        if not found or len(found) < sum(spec.rank != 0 for spec in specs):
            return None
        for gram in found:
            _check_fits(gram, specs[0].shape, found[0])
        return grams

    def _lacking(self, specs: Sequence[UpdateSpec], key: str) -> int | None:
        """The first task that touches the tensor without having activations for it, where others have some."""
        assert self.activations is not None
        has = [find_gram(source, key) is not None for source in self.activations]
        lacking = [i for i, spec in enumerate(specs) if spec.rank != 0 and not has[i]]
        return lacking[0] if lacking and any(has) else None

    @property
    def _fallback(self) -> TsvM:
        cls = _ScaledTsvM if self.variant == "roberta" else TsvM
        return cls(rank=self.rank, basis_tol=self.basis_tol, accuracy=self.accuracy, seed=self.seed)

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        ranks = component_ranks(specs, num_tasks, self.rank)
        if self.activations is None or ranks is None:
            return self._fallback.flops(specs, num_tasks)
        *leading, m, n = specs[0].shape
        kept = [min(count, m, n) for count in self._slots(specs, num_tasks)]
        # a Cholesky factor in float64, and its product with the update; of factors what they see of X'X
        shifts = sum(n**3 + 2 * m * n * n if spec.rank is None else 2 * spec.rank * n * n for spec in specs)
        one = cover_flops(specs, kept) + math.prod(leading) * (shifts + 2 * sum(kept) * m * n)
        return float((2 if self.layer_scaling else 1) * one)

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        if self.activations is None or component_ranks(specs, num_tasks, self.rank) is None:
            return self._fallback.workspace(specs, num_tasks)
        m, n = specs[0].shape[-2:]
        kept = [min(count, m, n) for count in self._slots(specs, num_tasks)]
        return (
            cover_workspace(specs, kept) + 8 * n * n
        )  # a Gram matrix and its root, in float64, of two tasks at a time


esm = register(Esm)


@dataclass
class _Survey:
    """Norms of all merged matrices, before layers are scaled against each other."""

    num_tasks: int
    norms: dict[str, float] = field(default_factory=dict)
    reached: bool = False
    """Whether some matrix has activations."""
    lacking: dict[str, int] = field(default_factory=dict)
    """Matrices that some tasks have activations for, and a task that has none."""

    def fork(self) -> _Survey:
        return _Survey(self.num_tasks)

    def join(self, share: _Survey) -> None:
        self.norms.update(share.norms)
        self.lacking.update(share.lacking)
        self.reached = self.reached or share.reached


class _ScaledTsvM(TsvM, frozen=True):
    """TSV-M as the authors' code for RoBERTa has it: both polar factors times the mean of their singular values."""

    def blocks(self, cover: Cover, live: Tensor, updates: Updates, ranks: Sequence[int], ctx: Context) -> list[Tensor]:
        gain = (cover.u.values.mean(-1) * cover.v.values.mean(-1))[..., None, None]
        return [block * gain for block in super().blocks(cover, live, updates, ranks, ctx)]


def layer_factors(norms: dict[str, float]) -> dict[str, float]:
    """(norm / mean norm over the family)^2 of each matrix; 1 in a family that is zero."""
    families: dict[str, list[float]] = defaultdict(list)
    for name, norm in norms.items():
        families[_family(name)].append(norm)
    means = {family: math.fsum(members) / len(members) for family, members in families.items()}
    return {name: (norm / means[_family(name)]) ** 2 if means[_family(name)] else 1.0 for name, norm in norms.items()}


def _family(name: str) -> str:
    """The name without the number of its layer: the first of its parts that is a number."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", name, count=1)


def _check_fits(gram: Gram, shape: tuple[int, ...], first: Gram) -> None:
    *leading, m, n = shape
    inputs = m if gram.transposed else n
    if gram.transposed != first.transposed:
        raise OptionError(f"{gram.where} and {first.where} disagree on how the weight is stored; calibrate both again")
    if gram.shape not in ((inputs, inputs), (*leading, inputs, inputs)):
        raise OptionError(
            f"{gram.where} is {' x '.join(map(str, gram.shape))}, and a {' x '.join(map(str, shape))} update takes "
            f"{inputs} x {inputs}; calibrate the fine-tuned model of that task"
        )


def _output_shift(update: Update, gram: Gram | None) -> Update:
    """Delta R with R R' = X'X: (Delta R)(Delta R)' = (X Delta')'(X Delta')."""
    assert gram is not None
    matrix = gram.read().to(update.device)
    if isinstance(update, LowRank):
        return LowRank(update.left, _shifted_factor(update.right.double(), matrix, gram.where).to(update.dtype))
    root = gram_root(matrix, gram.where)
    return wide_product(update, root.expand(*update.shape[:-2], *root.shape[-2:]))


def _shifted_factor(right: Tensor, gram: Tensor, where: str) -> Tensor:
    """A R (..., r, n) up to a rotation from the right: with A' = Q L' of orthonormal columns, L root(Q' X'X Q) and zeros.

    Of X'X only what the factor's rows see is decomposed, r x r rather than n x n.
    """
    Q, upper = thin_qr(right.mT)
    seen = upper.mT @ gram_root(Q.mT @ gram @ Q, where)
    return torch.nn.functional.pad(seen, (0, right.shape[-1] - seen.shape[-1]))


def gram_root(gram: Tensor, where: str) -> Tensor:
    """R with R R' = X'X up to a factor, (..., n, n) float64, null directions exactly 0.

    Raises:
        OptionError: eigenvalues that no X'X has.
    """
    size = gram.diagonal(dim1=-2, dim2=-1).amax()
    if not size > 0:
        return torch.zeros_like(gram)
    gram = gram / size
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(gram)
    low, high = L.diagonal(dim1=-2, dim2=-1).aminmax(dim=-1)
    if not bool(failed.any()) and bool((low > _WORST_PIVOT * high).all()):
        return L
    try:
        values, vectors = eigh(gram)
    except ConvergenceError as error:
        raise OptionError(f"{where}: its eigenvalues cannot be found ({error}); calibrate that model again") from error
    round_off = gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., -1:]
    if bool((values < -1e3 * round_off.clamp(min=0)).any()):
        raise OptionError(f"{where} has negative eigenvalues, which no X'X has; calibrate that model again")
    return vectors * values.masked_fill(values <= round_off, 0).sqrt()[..., None, :]


def _energy_weights(S: Tensor, power: float, count: int) -> Tensor:
    """(..., k) e = energy^power / mean over ``count`` of it, 0 for null directions."""
    live = S > 0
    weights = torch.where(live, (S / torch.where(live, S, 1)[..., :1]) ** (2 * power), 0)
    total = weights.sum(-1, keepdim=True)
    return weights * count / torch.where(total > 0, total, 1)


def _relative(norms: Tensor, *, over: int) -> Tensor:
    """Norms divided by their mean; of tasks, over those that take part."""
    count = (norms > 0).sum(over, keepdim=True) if over == 0 else norms.shape[over]
    mean: Tensor = norms.sum(over, keepdim=True) / count
    return norms / torch.where(mean > 0, mean, 1)


def _independent(rows: Tensor, round_off: float) -> Tensor:
    """(...) numerical rank of (..., k, n) whatever the lengths of the rows, which fall as the spectra of the updates do."""
    values = torch.linalg.svdvals(torch.nn.functional.normalize(rows, dim=-1))
    rank: Tensor = (values > round_off * values[..., :1]).sum(-1)
    return rank


def _polar_of_rank(X: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Q and singular values of the polar decomposition of the best approximation of ``rank`` (...) of X (..., m, n)."""
    values = torch.nn.functional.pad(torch.linalg.svdvals(X), (0, 1))
    dropped = values.gather(-1, rank[..., None])[..., 0]
    tolerances = (dropped * (1 + 1e-6) / values[..., 0]).nan_to_num(1.0).clamp(max=1)
    matrices, each = X.reshape(-1, *X.shape[-2:]), tolerances.reshape(-1).tolist()
    found = [polar_with_values(matrix, tol) for matrix, tol in zip(matrices, each, strict=True)]
    Q, S = torch.stack([Q for Q, _, _ in found]), torch.stack([S for _, _, S in found])
    return Q.reshape(X.shape), S.reshape(values[..., :-1].shape)


def _norm(update: Update) -> Tensor:
    """(...) Frobenius norms in float64; of a LowRank from its factors."""
    if isinstance(update, LowRank):
        left, right = update.left.double(), update.right.double()
        squares: Tensor = ((left.mT @ left) * (right @ right.mT)).sum((-2, -1))
        return squares.clamp(min=0).sqrt()
    norms: Tensor = torch.linalg.vector_norm(update, dim=(-2, -1), dtype=torch.float64)
    return norms

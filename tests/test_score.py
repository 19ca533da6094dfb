"""SCORE: the published algorithm, worked numbers, its identities, and input where a careless implementation breaks."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import Context, create, score
from dcmerge_ext.methods.cover import cover_of, cover_of_updates, live_components
from dcmerge_ext.svd import Components
from dcmerge_ext.updates import Updates, UpdateSpec

MODULE = importlib.import_module("dcmerge_ext.methods.score")  # its package hides it behind the function
EPS = torch.finfo(torch.float64).eps
ALL_KEPT = {"deviations": 1e9}

# --- worked numbers: the pair of 4 x 4 updates -----------------------------------------------------------------------

FIRST_LEFT = [
    [[0.516398, 0.258199, 0.774597, 0.258199], [0.577350, -0.577350, 0, -0.577350]],
    [[0.577350, 0, 0.577350, -0.577350], [0.577350, 0.577350, 0, 0.577350]],
]
NATURAL_A = [
    [1.745560, 1.348075, 0.123074, 2.295459],
    [0.798253, -0.020457, 1.429372, 1.665994],
    [2.574021, 3.009786, 1.191224, -0.633793],
    [-1.835705, 1.819281, -0.496730, -0.105493],
]
NATURAL_B = [
    [1.339498, 1.051339, 0.034098, 1.629242],
    [0.666410, -0.333115, 1.483568, 1.542478],
    [1.943785, 2.785466, 0.892232, -1.033884],
    [-2.418410, 2.716421, -0.325192, 0.592752],
]
MEDICAL_B = [
    [1.992060, 3.142107, 0.316689, 1.404450],
    [1.005903, 1.806749, 1.620214, 1.372148],
    [2.543574, 2.751358, 1.314992, -0.621923],
    [-2.104315, 1.829598, -0.292845, 0.138626],
]


def pair() -> list[Tensor]:
    return [u.dense() for u in cases.worked_pair()]


def with_signs(signs: Sequence[int], deviations: float, center: str) -> Tensor:
    """The worked pair, merged with the signs of the four left singular vectors relative to FIRST_LEFT."""
    updates, components = pair(), []
    for i, update in enumerate(updates):
        U, S, Vh = (x[..., :2] if x.ndim == 1 else x for x in torch.linalg.svd(update))
        U, Vh = U[:, :2], Vh[:2]
        given = torch.tensor(FIRST_LEFT[i], dtype=torch.float64).T
        flips = (U * given).sum(0).sign() * torch.tensor(signs[2 * i : 2 * i + 2])
        assert ((U * given).sum(0).abs() - 1).abs().max() < 1e-5
        components.append(Components(U * flips, S, Vh * flips[:, None]))
    cover = cover_of(components, torch.float64, None, EPS)
    live = live_components(cover.spectra).sum(-1)
    core, _ = MODULE._merged_core(Updates.of(updates), [2, 2], cover, live, deviations, center)
    return cover.u.basis() @ core @ cover.v.basis().mT


def close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


class TestWorkedNumbers:
    @pytest.mark.parametrize(
        ("signs", "deviations", "expected"),
        [((1, 1, 1, 1), 0.98, NATURAL_A), ((-1, 1, -1, 1), 0.98, NATURAL_B), ((-1, 1, -1, 1), 1.96, MEDICAL_B)],
    )
    def test_rules_of_the_published_code(
        self, signs: Sequence[int], deviations: float, expected: list[list[float]]
    ) -> None:
        close(with_signs(signs, deviations, "mean"), expected)

    def test_the_mean_depends_on_signs_and_zero_does_not(self) -> None:
        choices = list(itertools.product((1, -1), repeat=4))
        about_mean = {tuple(with_signs(s, 0.98, "mean").flatten().round(decimals=5).tolist()) for s in choices}
        about_zero = {tuple(with_signs(s, 0.98, "zero").flatten().round(decimals=5).tolist()) for s in choices}
        assert (len(about_mean), len(about_zero)) == (7, 1)

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_about_zero(self, form: str, backend: str) -> None:
        updates = cases.worked_pair() if form == "lowrank" else pair()
        merged = score(updates, threshold="sd/T")
        assert isinstance(merged, LowRank) == (form == "lowrank")
        close(cases.dense(merged), NATURAL_B)

    @pytest.mark.parametrize("deviations", [1.96, 1.96 / 3])
    @pytest.mark.parametrize("center", ["zero", "mean"])
    def test_the_trim_alone(self, deviations: float, center: str) -> None:
        """Both rules remove the 5 and nothing else."""
        off = torch.tensor([[0, 0.1, -0.3], [0.2, 0, 5], [-0.1, 0.4, 0]], dtype=torch.float64)
        low, high = MODULE._limits(off, torch.tensor(3), deviations, center)
        assert ((off < low) | (off > high)).nonzero().tolist() == [[1, 2]]


# --- the published algorithm, written out ----------------------------------------------------------------------------


def procrustes(X: Tensor) -> Tensor:
    P, _, Qh = torch.linalg.svd(X, full_matrices=False)
    return P @ Qh


def published(
    updates: Sequence[Tensor],
    ranks: Sequence[int],
    *,
    deviations: float = 1.96,
    threshold: str = "sd",
    center: str = "zero",
) -> Tensor:
    """Full SVDs, dense projections, entries trimmed in two steps. Signs: the left vectors have positive sums."""
    left, right = [], []
    for update, rank in zip(updates, ranks, strict=True):
        U, _, Vh = torch.linalg.svd(update, full_matrices=False)
        signs = U.sum(0).sign()[:rank]
        left.append(U[:, :rank] * signs)
        right.append(Vh[:rank].T * signs)
    U, V = procrustes(torch.cat(left, 1)), procrustes(torch.cat(right, 1))
    total = torch.zeros(sum(ranks), sum(ranks), dtype=torch.float64)
    for update in updates:
        C = U.T @ update @ V
        off = C - torch.diag(C.diagonal())
        mu = off.mean() if center == "mean" else torch.tensor(0.0)
        sd = ((off - mu).square().sum() / (off.numel() - 1)).sqrt()
        if center == "mean":
            torch.testing.assert_close(sd, off.std())
        theta = deviations * sd / (len(updates) if threshold == "sd/T" else 1)
        total += torch.diag(C.diagonal()) + torch.where((off - mu).abs() <= theta, off, 0)
    return U @ total @ V.T


RULES = [
    {},
    {"threshold": "sd/T"},
    {"center": "mean"},
    {"center": "mean", "threshold": "sd/T"},
    {"deviations": 0.5},
    {"deviations": 0.0},
]


class TestPublishedAlgorithm:
    @pytest.mark.parametrize("options", RULES)
    @pytest.mark.parametrize(
        ("m", "n", "tasks", "rank"),
        [(12, 9, 3, None), (9, 12, 3, None), (16, 16, 4, None), (20, 14, 3, 2), (15, 40, 2, 4)],
    )
    def test_full_updates(
        self, m: int, n: int, tasks: int, rank: int | None, options: dict[str, Any], backend: str
    ) -> None:
        updates = cases.full_updates(tasks, m, n, seed=m, exponent=0.7)
        expected = published(updates, [rank or int(min(m, n) * (1 / tasks))] * tasks, **options)
        assert cases.error(score(updates, rank=rank, **options), expected) < 1e-10

    @pytest.mark.parametrize("options", RULES)
    @pytest.mark.parametrize("ranks", [[2, 3], [4, 4], [1, 3, 5]])
    def test_adapters(self, ranks: list[int], options: dict[str, Any], backend: str) -> None:
        updates = cases.lora_updates(ranks, 24, 20, seed=1)
        merged = score(updates, **options)
        assert isinstance(merged, LowRank)
        assert merged.rank == sum(ranks)
        assert cases.error(merged, published([u.dense() for u in updates], ranks, **options)) < 1e-10

    @pytest.mark.parametrize("options", RULES)
    def test_adapters_of_which_components_are_left_out_are_projected_whole(self, options: dict[str, Any]) -> None:
        updates = cases.lora_updates([4, 2, 6], 24, 20, seed=2)
        merged = score(updates, rank=3, **options)
        assert isinstance(merged, LowRank)
        assert merged.rank == 8
        assert cases.error(merged, published([u.dense() for u in updates], [3, 2, 3], **options)) < 1e-10

    @pytest.mark.parametrize("options", RULES)
    def test_adapters_beside_full_updates(self, options: dict[str, Any]) -> None:
        updates: list[Update] = [*cases.lora_updates([4, 2], 24, 20, seed=3), *cases.full_updates(2, 24, 20)]
        merged = score(updates, **options)  # (20 - 6) / 2 components of the full updates
        assert isinstance(merged, Tensor)
        assert cases.error(merged, published([cases.dense(u) for u in updates], [4, 2, 7, 7], **options)) < 1e-10

    @pytest.mark.parametrize(("preset", "threshold"), [("natural", "sd/T"), ("medical", "sd")])
    def test_presets(self, preset: str, threshold: str) -> None:
        updates = cases.full_updates(3, 15, 12)
        expected = published(updates, [4] * 3, threshold=threshold, center="mean")
        assert cases.error(score(updates, official=preset), expected) < 1e-10
        assert cases.error(score(updates), expected) > 1e-3  # about zero is another merge

    def test_the_record_tells_how_many_entries_were_trimmed(self) -> None:
        updates = cases.full_updates(3, 15, 12)
        for deviations, counts in ((0.0, [12 * 11] * 3), (1e9, [0] * 3)):
            ctx = Context(3)
            create("score", {"deviations": deviations}).merge(Updates.of(updates), ctx)
            assert ctx.facts["trimmed"] == counts
            assert ctx.facts["cover_rank"] == 12


# --- identities ------------------------------------------------------------------------------------------------------


class TestIdentities:
    @pytest.mark.parametrize("tasks", [2, 3, 4])
    def test_untrimmed_full_basis_of_square_updates_is_task_arithmetic(self, tasks: int) -> None:
        updates = cases.full_updates(tasks, 12, 12)
        assert cases.error(score(updates, **ALL_KEPT), torch.stack(updates).sum(0)) < 1e-11

    def test_untrimmed_adapters_are_their_sum(self) -> None:
        updates = cases.lora_updates([2, 3, 4], 24, 20)
        assert cases.error(score(updates, **ALL_KEPT), sum(u.dense() for u in updates)) < 1e-12

    @pytest.mark.parametrize("options", [{}, {"threshold": "sd/T"}, {"deviations": 0.0}])
    def test_a_single_task_comes_back(self, options: dict[str, Any]) -> None:
        (full,), (adapter,) = cases.full_updates(1, 20, 16), cases.lora_updates([5], 20, 16)
        assert cases.error(score([full], **options), full) < 1e-12
        assert cases.error(score([adapter], **options), adapter) < 1e-12
        assert cases.error(score([full], rank=3, **options), cases.truncated(full, 3)) < 1e-12

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_tasks_in_orthogonal_spaces_merge_to_their_sum(self, form: str) -> None:
        P, Q = cases.orthonormal(20, 8, 1), cases.orthonormal(16, 8, 2)
        s = cases.power_law(4, 1.0)
        tasks = [LowRank(P[:, i] * s, Q[:, i].T) for i in (slice(0, 4), slice(4, 8))]
        merged = score(tasks if form == "lowrank" else [t.dense() for t in tasks], rank=4)
        assert cases.error(merged, tasks[0].dense() + tasks[1].dense()) < 1e-12

    @pytest.mark.parametrize("options", RULES)
    def test_order_of_the_tasks_does_not_matter(self, options: dict[str, Any]) -> None:
        updates = cases.full_updates(3, 24, 30, exponent=1.0)
        merged = [score(list(p), rank=4, **options) for p in itertools.permutations(updates)]
        assert max(cases.error(m, merged[0]) for m in merged) < 1e-11

    @pytest.mark.parametrize("options", [o for o in RULES if "center" not in o])
    def test_rotations_and_transposes_carry_over(self, options: dict[str, Any]) -> None:
        """Only about zero: the signs of the mean's convention belong to the rows."""
        updates = cases.full_updates(3, 20, 24, exponent=1.0)
        P, Q = cases.orthonormal(20, 20, 5), cases.orthonormal(24, 24, 6)
        merged = score(updates, **options)
        assert cases.error(score([P @ u @ Q for u in updates], **options), P @ merged @ Q) < 1e-11
        assert cases.error(score([u.T for u in updates], **options), merged.T) < 1e-11

    @pytest.mark.parametrize("options", RULES)
    @pytest.mark.parametrize("factor", [3.0, 1e-3])
    def test_homogeneous(self, options: dict[str, Any], factor: float) -> None:
        updates = cases.full_updates(3, 20, 24)
        assert cases.error(score([factor * u for u in updates], **options), factor * score(updates, **options)) < 1e-11

    @pytest.mark.parametrize("options", RULES)
    def test_adapters_equal_their_products(self, options: dict[str, Any]) -> None:
        adapters = cases.lora_updates([4, 4, 4], 24, 20)
        formed = [u.dense() for u in adapters]
        assert cases.error(score(adapters, **options), score(formed, rank=4, **options)) < 1e-11

    def test_cores_of_complete_tasks_need_no_matrix(self) -> None:
        """Two forms of one core: from the polar factors, and by projection of the update."""
        for updates, ranks in (
            (cases.lora_updates([3, 4], 24, 20), [3, 4]),
            (cases.full_updates(2, 24, 8), [8, 8]),
        ):
            chosen = Updates.of(updates)
            cover, _ = cover_of_updates(chosen, ranks, name="score")
            U, V = cover.u.basis(), cover.v.basis()
            begin = 0
            for update, rank, S in zip(updates, ranks, cover.spectra, strict=True):
                slots = slice(begin, begin := begin + rank)
                core = cover.u.root[:, slots] * S @ cover.v.root[:, slots].T
                assert cases.error(core, MODULE._projected(update, U, V)) < 1e-12

    def test_leading_dimensions_equal_the_loop(self) -> None:
        updates = [cases.normal(2, 2, 12, 9, seed=s) for s in (1, 2, 3)]
        for options in RULES:
            merged = score(updates, **options)
            for i, j in itertools.product(range(2), range(2)):
                assert cases.error(merged[i, j], score([u[i, j] for u in updates], **options)) < 1e-11


class TestPrecision:
    """Trimming is a decision: the same entries are dropped in both dtypes unless one lies at a threshold."""

    @pytest.mark.parametrize("options", RULES)
    @pytest.mark.parametrize("form", ["dense", "lowrank", "truncated"])
    def test_float32_is_near_float64(self, form: str, options: dict[str, Any], backend: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(3, 48, 36) if form == "dense" else cases.lora_updates([6, 6, 6], 48, 36)
        )
        rank = 4 if form == "truncated" else None
        single = score([u.to(torch.float32) for u in updates], rank=rank, **options)
        assert single.dtype == torch.float32
        assert cases.error(single, score(updates, rank=rank, **options)) < 2e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_moments_are_taken_in_float64(self, dtype: torch.dtype) -> None:
        """Squares of entries of 1e25 leave the range of float32."""
        off = torch.tensor([[0, 1e25], [-1e25, 0]], dtype=dtype)
        low, high = MODULE._limits(off, torch.tensor(2), 1.0, "zero")
        expected = torch.full((1, 1), 1e25 * (2 / 3) ** 0.5, dtype=dtype)
        torch.testing.assert_close(high, expected)
        torch.testing.assert_close(low, -expected)


class TestDegenerate:
    def test_a_zero_task_changes_nothing(self) -> None:
        updates = cases.full_updates(2, 30, 20)
        for options in ({}, {"center": "mean"}):  # sd/T counts it among the T
            expected = score(updates, rank=5, **options)
            assert cases.error(score([*updates, torch.zeros_like(updates[0])], rank=5, **options), expected) < 1e-11

    def test_null_components_take_no_part(self) -> None:
        updates = [cases.with_spectrum(40, 32, [3 + i, 2, 1], seed=8 + i) for i in range(2)]
        for options in RULES:
            assert cases.error(score(updates, **options), score(updates, rank=3, **options)) < 1e-11

    def test_only_zeros_merge_to_zero(self) -> None:
        for options in RULES:
            assert torch.equal(score([torch.zeros(6, 5)] * 2, **options), torch.zeros(6, 5))
        merged = score([LowRank(torch.ones(6, 0), torch.ones(0, 5))] * 2)
        assert isinstance(merged, LowRank)
        assert merged.rank == 0

    @pytest.mark.parametrize("copies", [2, 3])
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_copies_add_up_and_nothing_is_made_up(self, copies: int, form: str) -> None:
        (update,) = cases.lora_updates([4], 30, 20)
        merged = score([update if form == "lowrank" else update.dense()] * copies, rank=4, **ALL_KEPT)
        assert cases.error(merged, copies * update.dense()) < 1e-12

    def test_more_tasks_than_rows_take_the_mean(self, caplog: pytest.LogCaptureFixture) -> None:
        updates = cases.full_updates(5, 3, 4)
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = merge_updates({"w": updates}, "score")["w"]
        assert cases.error(merged, torch.stack(updates).mean(0)) < 1e-14
        assert caplog.messages == [
            "w: 5 tasks leave a 3 x 4 matrix no component each; it takes the mean of the updates"
        ]

    def test_one_by_one(self) -> None:
        assert score([torch.tensor([[2.0]])]).tolist() == [[2.0]]
        assert score([torch.tensor([[2.0]]), torch.tensor([[4.0]])]).tolist() == [[3.0]]  # two tasks for one row

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        assert score([torch.ones(shape)]).shape == shape

    def test_adapters_of_more_rank_than_the_matrix(self) -> None:
        updates = [LowRank(cases.normal(6, 9, seed=s), cases.normal(9, 5, seed=s + 9)) for s in (1, 2)]
        merged = score(updates, **ALL_KEPT)
        assert merged.rank == 10
        assert cases.error(merged, updates[0].dense() + updates[1].dense()) < 1e-12


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"deviations": -1.0}, r"method 'score': deviations: expected float >= 0"),
            ({"deviations": float("inf")}, r"deviations must be a finite number, 0 or more, got inf"),
            ({"threshold": "sd/t"}, r"threshold: invalid enum value 'sd/t'"),
            ({"center": "median"}, r"center: invalid enum value 'median'"),
            ({"rank": 6}, r"rank 6 exceeds min\(m, n\) = 5 of a 6 x 5 update"),
            ({"rank": [1, 2, 3]}, r"rank has 3 entries for 2 tasks"),
            ({"accuracy": "fast", "tol": 1e-3}, r"tol belongs to accuracy='exact', and accuracy is 'fast'"),
            ({"official": "fft"}, r"has no preset 'fft'; it has: natural, medical"),
            ({"official": "natural", "center": "zero"}, r"option center='zero' conflicts with official='natural'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            score([torch.ones(6, 5)] * 2, **options)

    @pytest.mark.parametrize("shape", [(), (5,)])
    def test_vectors(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"score merges matrices \(\.\.\., m, n\), got an update of shape"):
            score([torch.ones(shape)] * 2)


def test_projections_count_where_components_are_left_out() -> None:
    method = create("score", {})
    full = [UpdateSpec((768, 768), None, torch.float32)] * 4
    adapters = [UpdateSpec((768, 768), 16, torch.float32)] * 4
    projections = 4 * (2 * 768**3 + 2 * 768**3)
    assert method.flops(full, 4) - create("dc_merge", {}).flops(full, 4) == projections
    assert method.flops(adapters, 4) - create("dc_merge", {}).flops(adapters, 4) == 4 * 2 * 64 * 64 * 16
    assert method.merged_rank(adapters, 4) == 64
    assert create("score", {"rank": 3}).merged_rank(adapters, 4) == 12

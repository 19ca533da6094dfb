"""Numbers worked out by hand or returned by the authors' code, float64, to the six digits that are printed."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, ops, smooth_energy, truncated_svd
from dcmerge_ext.linalg.polar import polar, polar_with_values
from dcmerge_ext.methods import create, dc_merge, ties
from dcmerge_ext.updates import UpdateSpec

TOLERANCE = {"rtol": 0, "atol": 1e-6}


def close(actual: Tensor, expected: list[list[float]] | list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


class TestTwoDirections:
    """The two-dimensional example of DC-Merge (arXiv 2603.06242, appendix D)."""

    U = torch.tensor([[1, 0.1104], [0, 0.9939]], dtype=torch.float64)

    def test_cover_basis(self) -> None:
        close(polar(self.U).Q, [[0.998471, 0.055284], [-0.055284, 0.998471]])

    @pytest.mark.parametrize(
        ("task", "expected"),
        [(0, [[0.996944, 0.0552], [0.0552, 0.003056]]), (1, [[0.003056, 0.0552], [0.0552, 0.996969]])],
    )
    def test_cores(self, task: int, expected: list[list[float]]) -> None:
        column = polar(self.U).H[:, task : task + 1]
        close(column @ column.T, expected)

    def test_core_is_the_projected_update(self) -> None:
        Q, H = polar(self.U)
        for i in range(2):
            u = self.U[:, i : i + 1]
            torch.testing.assert_close(Q.T @ (u @ u.T) @ Q, H[:, i : i + 1] @ H[:, i : i + 1].T)

    def test_diagonal_mask_leaves_almost_the_identity(self) -> None:
        close((polar(self.U).H ** 2).sum(1), [1.000000, 1.000025])
        updates = [u[:, None] @ u[None, :] for u in self.U.T]
        merged = dc_merge(updates, rank=1, aggregate="sum", block_size=1)
        torch.testing.assert_close(merged, torch.eye(2, dtype=torch.float64), rtol=0, atol=3e-5)

    def test_plain_sum_favours_the_shared_direction(self) -> None:
        total = self.U @ self.U.T
        close(total, [[1.012188, 0.109727], [0.109727, 0.987837]])
        close(torch.linalg.svdvals(total), [1.110413, 0.889613])


class TestFourByFour:
    @pytest.mark.parametrize("name", cases.WORKED_DC_MERGE)
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_dc_merge(self, name: str, form: str, backend: str) -> None:
        options, expected = cases.WORKED_DC_MERGE[name]
        updates = cases.worked_pair()
        merged = dc_merge(updates if form == "lowrank" else [u.dense() for u in updates], rank=2, **options)
        assert isinstance(merged, LowRank) == (form == "lowrank")
        close(cases.dense(merged), expected)

    def test_singular_values_of_the_updates(self) -> None:
        first, second = (truncated_svd(u, 2) for u in cases.worked_pair())
        close(first.S, [4.472136, 1.414214])
        close(second.S, [3.872983, 2.449490])

    def test_singular_values_of_the_concatenated_bases(self) -> None:
        parts = [truncated_svd(u, 2) for u in cases.worked_pair()]
        _, _, left = polar_with_values(torch.cat([p.U for p in parts], dim=1))
        _, _, right = polar_with_values(torch.cat([p.Vh.T for p in parts], dim=1))
        close(left, [1.385713, 1.283742, 0.593301, 0.282486])
        close(right, [1.393276, 1.057727, 0.938730, 0.242452])

    def test_magnitudes_of_the_first_core(self) -> None:
        parts = [truncated_svd(u, 2) for u in cases.worked_pair()]
        left = polar(torch.cat([p.U for p in parts], dim=1)).H
        right = polar(torch.cat([p.Vh.T for p in parts], dim=1)).H
        close(((left[:, :2] * parts[0].S) @ right[:, :2].T).abs(), cases.WORKED_CORE_MAGNITUDES)


class TestElementwise:
    X = torch.tensor(cases.TASK_VECTORS, dtype=torch.float64)

    @pytest.mark.parametrize(("keep", "disjoint", "kept", "expected"), cases.WORKED_TIES)
    def test_ties(self, keep: float, disjoint: str, kept: tuple[int, ...], expected: list[float], backend: str) -> None:
        merged = ties([x.reshape(2, 5) for x in self.X], keep=keep, disjoint=disjoint).flatten()
        wanted = torch.tensor(expected, dtype=torch.float64)
        compared = ~wanted.isnan()
        torch.testing.assert_close(merged[compared], wanted[compared], **TOLERANCE)
        assert tuple(int((ties([x], keep=keep) != 0).sum()) for x in self.X) == kept

    def test_rule_of_dc_merge_on_the_same_vectors(self, backend: str) -> None:
        thresholds = ops.kth_magnitude(self.X, 5)
        merged = ops.elect(self.X[:, None], thresholds)[0]
        close(merged, [-0.9, 0, -0.5, 0.3, 0.3, 0.9, 0, -0.7, 0.6, -0.3])

    def test_exact_cancellation_tells_the_two_rules_apart(self, backend: str) -> None:
        first, second = torch.tensor([[1.0, -2, 3], [-1, -2, 1]], dtype=torch.float64)
        close(ops.elect(torch.stack([first, second])[:, None], zero_sum=0)[0], [0, -2, 2])  # DC-Merge
        close(ties([first, second], keep=1.0), [-1, -2, 2])  # TIES: the majority is a draw, which selects negatives


class TestSmoothing:
    S = torch.tensor([10, 5, 2, 1], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"kind": "none"}, [10, 5, 2, 1]),
            ({"kind": "average"}, [4.5, 4.5, 4.5, 4.5]),
            ({"kind": "linear", "rho": 5.0}, [7.5, 5.5, 3.5, 1.5]),
            ({"kind": "linear", "rho": 20.0}, [8.181818, 5.727273, 3.272727, 0.818182]),
            ({"kind": "interpolate", "tau": 0.5}, [7.25, 4.75, 3.25, 2.75]),
        ],
    )
    def test_kinds(self, options: dict, expected: list[float]) -> None:
        close(smooth_energy(self.S, **options), expected)


class TestCounts:
    @pytest.mark.parametrize(("options", "tasks", "rank", "q", "kept"), cases.KEPT_COUNTS)
    def test_entries_kept_of_each_core(self, options: dict, tasks: int, rank: int, q: int, kept: int) -> None:
        counts = create("dc_merge", options)._counts(torch.full((tasks,), rank), q)
        assert counts.tolist() == [kept] * tasks

    @pytest.mark.parametrize(("q", "tasks", "rank"), cases.FULL_RANKS)
    def test_components_per_full_fine_tune(self, q: int, tasks: int, rank: int) -> None:
        method = create("dc_merge", {})
        assert method.ranks(cases.dense_specs(tasks, q, q + 100), tasks) == [rank] * tasks

    def test_components_of_a_mixed_run(self) -> None:
        specs = [UpdateSpec((50, 64), 8, torch.float32), *cases.dense_specs(3, 50, 64)]
        assert create("dc_merge", {}).ranks(specs, 4) == [8, 14, 14, 14]

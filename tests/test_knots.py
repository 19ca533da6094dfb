"""KnOTS: the published algorithm over whole models, its identities, its forms, and degenerate input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import dcmerge_ext
from dcmerge_ext import LowRank, merge_checkpoints, merge_updates
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import Context, create, knots
from dcmerge_ext.methods.apply import survey_model
from dcmerge_ext.methods.dare import drop
from dcmerge_ext.methods.knots import _align, _State
from dcmerge_ext.updates import Updates, UpdateSpec

Model = Mapping[str, Sequence[Update]]


def stacked(updates: Sequence[Update], cutoff: float) -> tuple[Tensor, list[Tensor]]:
    """U and the M_i of one matrix, by a full SVD of the tasks side by side."""
    U, S, Vh = torch.linalg.svd(torch.cat([cases.dense(u).double() for u in updates], dim=1), full_matrices=False)
    kept = cutoff < S
    coordinates = S[kept, None] * Vh[kept]
    coordinates[coordinates.abs() < 3e-15 * S[0]] = 0  # round-off is no entry to count
    return U[:, kept], list(coordinates.chunk(len(updates), dim=1))


def published(
    model: Model, keep: float = 0.2, *, rate: float = 0.0, seed: int = 0, cutoff: float = 1e-5
) -> dict[str, Tensor]:
    """arXiv 2410.19735 as its authors run it: every task one vector of the whole model, in float64."""
    bases, shapes = {}, {}
    tasks = len(next(iter(model.values())))
    parts: list[list[Tensor]] = [[] for _ in range(tasks)]
    for name, updates in model.items():
        bases[name], M = stacked(updates, cutoff)
        shapes[name] = M[0].shape
        for i, x in enumerate(M):
            if rate:
                x = drop(x, rate, seed=seed, key=name, task=i)
            parts[i].append(x.reshape(-1))
    vectors = torch.stack([torch.cat(p) for p in parts])
    total = vectors.shape[1]
    if keep < 1:
        limits = vectors.abs().kthvalue(total - int(total * keep), dim=1, keepdim=True).values
        vectors = vectors * (vectors.abs() >= limits)
    sign = vectors.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    chosen = torch.where(torch.where(sign > 0, vectors > 0, vectors < 0), vectors, 0.0)
    merged = chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)
    pieces = merged.split([s.numel() for s in shapes.values()])
    return {name: bases[name] @ piece.reshape(shapes[name]) for name, piece in zip(model, pieces, strict=True)}


def model_of(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, list[Update]]:
    return {
        "a": list(cases.lora_updates([3, 3, 3], 20, 14, seed=seed, dtype=dtype)),
        "b": [u * 3.0 for u in cases.lora_updates([2, 4, 1], 9, 25, seed=seed + 1, dtype=dtype)],
        "c": list(cases.lora_updates([5, 3, 4], 7, 16, seed=seed + 2, dtype=dtype)),  # 12 columns in 7 rows
    }


def agree(found: Mapping[str, Update], expected: Mapping[str, Tensor], tolerance: float = 1e-11) -> None:
    assert list(found) == list(expected)
    for name, merged in found.items():
        assert cases.error(merged, expected[name]) < tolerance, name


class TestPublished:
    @pytest.mark.parametrize("keep", [0.05, None, 0.6, 1.0])
    @pytest.mark.parametrize("form", ["lowrank", "dense", "mixed"])
    def test_agrees_over_a_whole_model(self, keep: float | None, form: str, backend: str) -> None:
        model = model_of()
        for updates in model.values():
            for i in range({"lowrank": 0, "mixed": 2, "dense": 3}[form]):
                updates[i] = cases.dense(updates[i])
        found = merge_updates(model, "knots", keep=keep)
        assert all(isinstance(u, LowRank) == (form == "lowrank") for u in found.values())
        agree(found, published(model, 0.2 if keep is None else keep))

    @settings(max_examples=25)
    @given(
        m=st.integers(1, 12),
        n=st.integers(1, 12),
        ranks=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
        keep=st.sampled_from([0.1, 0.5, 1.0]),
        seed=st.integers(0, 99),
    )
    def test_agrees_on_any_shape(self, m: int, n: int, ranks: list[int], keep: float, seed: int) -> None:
        ranks = [min(r, m, n) for r in ranks]
        updates = [
            LowRank(cases.normal(m, r, seed=seed + i), cases.normal(r, n, seed=50 + i)) for i, r in enumerate(ranks)
        ]
        agree({"": knots(updates, keep=keep)}, published({"": updates}, keep, cutoff=1e-9), 1e-9)

    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tasks_in_rows_of_their_own_do_not_dilute_each_other(self, form: str, dtype: torch.dtype) -> None:
        """Round-off of one task in the coordinates of another must not count in a mean."""
        updates: list[Update] = []
        for i in range(3):
            left = torch.zeros(30, 4, dtype=torch.float64)
            left[10 * i : 10 * i + 10] = cases.normal(10, 4, seed=i)
            update = LowRank(left, cases.normal(4, 20, seed=5 + i)).to(dtype)
            updates.append(update if form == "lowrank" else update.dense())
        merged = knots(updates, keep=1.0)
        assert cases.error(merged, sum(cases.dense(u) for u in updates)) < (1e-5 if dtype == torch.float32 else 1e-12)

    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    def test_singular_values_of_the_worked_pair(self, form: str) -> None:
        pair = cases.worked_pair()
        rows = _align(
            "", Updates.of([u if form == "lowrank" else u.dense() for u in pair]), None, _State(None, {})
        ).updates
        values = sum(cases.dense(x) ** 2 for x in rows).sum(1).sqrt()
        expected = torch.tensor([5.423899, 3.332822, 1.406668, 0.703493], dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)

    def test_updates_are_their_coordinates_in_the_basis(self) -> None:
        """Hence an untrimmed sum is task arithmetic."""
        updates = cases.lora_updates([3, 0, 4], 20, 14)
        basis, live, aligned, _ = _align("", Updates.of(updates), None, _State(None, {}))
        assert bool(live.all())
        assert cases.error(basis().mT @ basis(), torch.eye(7, dtype=torch.float64)) < 1e-13
        for update, rows in zip(updates, aligned, strict=True):
            assert cases.error(basis() @ cases.dense(rows), update) < 1e-13

    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    @pytest.mark.parametrize(("keep", "rate", "seed"), [(None, None, 0), (None, 0.5, 421), (0.3, 0.2, 7)])
    def test_dare_ties(self, form: str, keep: float | None, rate: float | None, seed: int, backend: str) -> None:
        model = model_of()
        chosen = model if form == "lowrank" else {k: [cases.dense(u) for u in v] for k, v in model.items()}
        found = merge_updates(chosen, "knots", aggregate="dare_ties", keep=keep, rate=rate, seed=seed)
        expected = published(model, keep or 1.0, rate=0.1 if rate is None else rate, seed=seed)
        agree(found, expected)

    def test_nothing_dropped_is_knots_ties(self) -> None:
        updates = cases.lora_updates([3, 2], 12, 9)
        dropped = knots(updates, aggregate="dare_ties", rate=0.0, keep=0.4)
        assert cases.error(dropped, knots(updates, keep=0.4)) < 1e-14

    def test_the_whole_model_is_trimmed_at_once(self) -> None:
        small = cases.lora_updates([2, 2], 8, 6)
        model = {"small": small, "large": [u * 1e3 for u in small]}
        found = merge_updates(model, "knots", keep=0.2)
        assert cases.error(found["small"], torch.zeros(8, 6)) == 0
        assert cases.dense(knots(small, keep=0.2)).norm() > 0.1


class TestNull:
    def test_directions_that_tasks_share_are_not_counted(self) -> None:
        """Of 2 x 3 directions 3 are there: trimming keeps a fraction of their entries alone."""
        (x,) = cases.lora_updates([3], 12, 20, dtype=torch.float32)
        model: Model = {"": [x, x]}
        method, context = create("knots", {"keep": 0.25}), Context(2, "")
        updates = Updates.of([x, x])
        state = survey_model(method, 2, torch.float32, lambda s: method.survey("", updates, s))
        merged = method.merge(updates, Context(2, "", state, context.facts))
        assert context.facts["rank"] == 3
        assert isinstance(merged, LowRank)
        assert merged.rank == 6
        assert int((merged.right != 0).sum()) == int(60 * 0.25) + 1
        agree({"": merged}, published(model, 0.25), 1e-6)

    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    def test_the_published_cutoff_is_absolute(self, form: str) -> None:
        updates = [u * 1e-4 for u in cases.lora_updates([4, 4], 12, 9)]
        chosen = updates if form == "lowrank" else [u.dense() for u in updates]
        expected = published({"": updates}, 0.5, cutoff=5e-5)
        assert stacked(updates, 5e-5)[0].shape[1] < 8
        agree({"": knots(chosen, keep=0.5, cutoff=5e-5)}, expected)
        assert cases.error(knots(chosen, keep=0.5), expected[""]) > 1e-2

    def test_a_cutoff_above_everything_leaves_nothing(self) -> None:
        updates = cases.lora_updates([2, 2], 8, 6)
        assert torch.equal(cases.dense(knots(updates, cutoff=1e3)), torch.zeros(8, 6, dtype=torch.float64))

    @pytest.mark.parametrize("factor", [2.0**-80, 2.0**60, -1.0])
    def test_the_unit_of_the_weights_does_not_matter(self, factor: float) -> None:
        updates = cases.lora_updates([3, 2, 4], 12, 9)
        merged = knots([u * factor for u in updates], keep=0.3)
        assert cases.error(merged, knots(updates, keep=0.3) * factor) < 1e-12


class TestForms:
    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    @pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
    def test_a_basis_of_the_inputs_is_that_of_the_transposes(self, form: str, shape: tuple[int, int]) -> None:
        updates: list[Update] = list(cases.lora_updates([3, 2], *shape))
        if form == "dense":
            updates = [cases.dense(u) for u in updates]
        merged = knots(updates, share="input", keep=0.4)
        assert isinstance(merged, LowRank) == (form == "lowrank")
        expected = cases.dense(knots([u.mT for u in updates], keep=0.4)).mT
        assert cases.error(merged, expected) < 1e-13
        assert cases.error(knots(updates, keep=0.4), expected) > 1e-2

    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    @pytest.mark.parametrize("aggregate", ["ties", "dare_ties"])
    def test_a_stack_of_matrices_is_one_tensor_of_the_model(self, form: str, aggregate: str) -> None:
        single = [cases.lora_updates([3, 3], 12, 9, seed=s) for s in range(3)]
        stack: list[Update] = [
            LowRank(*(torch.stack([getattr(s[i], side) for s in single]) for side in ("left", "right")))
            for i in range(2)
        ]
        if form == "dense":
            stack = [cases.dense(u) for u in stack]
        merged = knots(stack, aggregate=aggregate, keep=0.3, **({"rate": 0.0} if aggregate == "dare_ties" else {}))
        expected = merge_updates({str(i): s for i, s in enumerate(single)}, "knots", keep=0.3)
        for found, name in zip(cases.dense(merged), expected, strict=True):
            assert cases.error(found, expected[name]) < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_lower_precision(self, dtype: torch.dtype) -> None:
        model = model_of(dtype)
        found = merge_updates(model, "knots", keep=0.3)
        assert all(u.dtype == torch.float32 for u in found.values())
        exact = {name: [u.to(torch.float64) for u in updates] for name, updates in model.items()}
        agree(found, published(exact, 0.3, cutoff=1e-6), 2e-6)

    def test_dense_in_single_precision(self) -> None:
        updates = cases.full_updates(3, 20, 14)
        single = knots([u.float() for u in updates], keep=0.3)
        assert cases.error(single, knots(updates, keep=0.3)) < 1e-5

    def test_order_of_tasks(self) -> None:
        model = model_of()
        expected = merge_updates(model, "knots", keep=0.3)
        for order in ((2, 0, 1), (1, 0, 2)):
            permuted = merge_updates({k: [v[i] for i in order] for k, v in model.items()}, "knots", keep=0.3)
            agree(permuted, {k: cases.dense(v) for k, v in expected.items()}, 1e-12)

    def test_weights(self) -> None:
        updates = cases.lora_updates([3, 2], 12, 9)
        merged = knots(updates, weights=[2.0, -0.5])
        assert cases.error(merged, knots([updates[0] * 2.0, updates[1] * -0.5])) < 1e-13

    @pytest.mark.parametrize("aggregate", ["ties", "dare_ties"])
    def test_the_backends_agree(self, aggregate: str) -> None:
        results = []
        for name in ("reference", "cpu"):
            with dcmerge_ext.use_backend(name):
                results.append(merge_updates(model_of(torch.float32), "knots", aggregate=aggregate))
        for name, merged in results[0].items():
            assert cases.error(merged, results[1][name]) < 1e-6

    def test_another_factorization_of_the_updates_changes_nothing(self) -> None:
        updates = cases.lora_updates([3, 2], 12, 9)
        mixed = []
        for i, u in enumerate(updates):
            X = cases.normal(u.rank, u.rank, seed=i)
            mixed.append(LowRank(u.left @ X, torch.linalg.solve(X, u.right)))
        assert cases.error(knots(mixed), knots(updates)) < 1e-10

    @pytest.mark.parametrize("aggregate", ["ties", "dare_ties"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_passes_that_differ_by_round_off_trim_the_same_entries(self, aggregate: str, dtype: torch.dtype) -> None:
        """The entry at the threshold is one that a survey computed: another pass may find it a little smaller."""
        updates = Updates.of(cases.lora_updates([3, 2], 12, 9, dtype=dtype))
        method = create("knots", {"keep": 0.3, "aggregate": aggregate})
        state = survey_model(method, 2, dtype, lambda s: method.survey("", updates, s))
        higher = state.rule.thresholds * (1 + 2 * torch.finfo(dtype).eps)
        raised = replace(state, rule=replace(state.rule, thresholds=higher))
        merged, again = (cases.dense(method.merge(updates, Context(2, "", s))) for s in (state, raised))
        assert torch.equal(merged, again)

    def test_shares_of_a_survey_add_up(self) -> None:
        model = {name: Updates.of(updates) for name, updates in model_of().items()}
        method = create("knots", {"keep": 0.3})

        def in_shares(state: Any) -> None:
            shares = [state.fork(), state.fork()]
            for i, (name, updates) in enumerate(model.items()):
                method.survey(name, updates, shares[i % 2])
            for share in shares:
                state.join(share)

        def in_turn(state: Any) -> None:
            for name, updates in model.items():
                method.survey(name, updates, state)

        apart, together = (survey_model(method, 3, torch.float64, visit) for visit in (in_shares, in_turn))
        assert torch.equal(apart.rule.thresholds, together.rule.thresholds)
        assert apart.rule.sign == together.rule.sign

    @pytest.mark.parametrize(("most", "kept"), [(0, 0), (64 << 20, 1)])
    def test_cores_that_are_kept_change_nothing(self, most: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
        updates = Updates.of(cases.lora_updates([3, 2], 12, 9))
        expected = cases.dense(knots(list(updates), keep=0.3))
        monkeypatch.setattr(import_module("dcmerge_ext.methods.knots"), "_MOST_KEPT", most)
        method = create("knots", {"keep": 0.3})
        state = survey_model(method, 2, torch.float64, lambda s: method.survey("", updates, s))
        assert len(state.cores) == kept
        assert cases.error(method.merge(updates, Context(2, "", state)), expected) < 1e-12

    def test_adapters_in_files(self, tmp_path: Path) -> None:
        start = families.toy(dtype=torch.float32)
        base = families.write_model(tmp_path / "base", start)
        tasks = [families.write_adapter(tmp_path / f"a{i}", start, rank=i + 2, seed=i) for i in range(3)]
        merge_checkpoints(base, tasks, tmp_path / "out", "knots", scale=0.5, keep=0.4)
        found = load_file(tmp_path / "out" / "model.safetensors")
        stored = [load_file(task / "adapter_model.safetensors") for task in tasks]
        model = {}
        for module in ("layers.0.attn", "layers.1.attn"):
            A, B = ([t[f"base_model.model.{module}.lora_{side}.weight"] for t in stored] for side in "AB")
            model[f"{module}.weight"] = [LowRank(b, a) * 2.0 for a, b in zip(A, B, strict=True)]
        exact = {name: [u.to(torch.float64) for u in updates] for name, updates in model.items()}
        for name, merged in published(exact, 0.4, cutoff=1e-6).items():
            torch.testing.assert_close(found[name], start[name] + 0.5 * merged.float(), rtol=1e-5, atol=1e-5)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"aggregate": "sum"}, r"aggregate: invalid enum value 'sum' \(takes 'ties' \| 'dare_ties'\)"),
            ({"rate": 0.1}, r"rate belongs to aggregate='dare_ties', and aggregate is 'ties'"),
            ({"aggregate": "dare_ties", "rate": 1.0}, r"rate: expected float < 1.0"),
            ({"keep": 0.0}, r"keep: expected float > 0.0"),
            ({"keep": 20}, r"keep: expected float <= 1.0"),
            ({"cutoff": -1.0}, r"cutoff: expected float >= 0.0"),
            ({"share": "both"}, r"share: invalid enum value 'both'"),
            ({"seed": -1}, r"seed: expected int >= 0"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            create("knots", options)

    def test_vectors_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"knots merges matrices \(..., m, n\), got an update of shape \(5,\)"):
            knots([torch.ones(5)])

    @pytest.mark.parametrize(
        ("options", "surveys", "scales"),
        [
            ({}, (3, 5), (1.0, 0.6)),
            ({"keep": 1.0}, (1, 1), (1.0, 0.6)),
            ({"aggregate": "dare_ties"}, (1, 1), (1.0, 0.7)),
            ({"aggregate": "dare_ties", "keep": 0.5}, (3, 5), (1.0, 0.7)),
        ],
    )
    def test_passes_and_scales(
        self, options: dict[str, Any], surveys: tuple[int, int], scales: tuple[float, float]
    ) -> None:
        method = create("knots", options)
        assert tuple(method.num_surveys(d) for d in (torch.float32, torch.float64)) == surveys
        assert (method.default_scale(1), method.default_scale(8)) == scales

    @pytest.mark.parametrize("share", ["output", "input"])
    @pytest.mark.parametrize(("m", "n"), [(12, 9), (5, 30), (30, 5)])
    @pytest.mark.parametrize("ranks", [[3, 2], [4, 4, 0], [5, 5, 5]])
    def test_rank_of_the_result_is_known_from_headers(self, share: str, m: int, n: int, ranks: list[int]) -> None:
        merged = knots(cases.lora_updates(ranks, m, n), share=share)
        specs = [UpdateSpec((m, n), r, torch.float64) for r in ranks]
        assert isinstance(merged, LowRank)
        assert create("knots", {"share": share}).merged_rank(specs, len(ranks)) == merged.rank

    def test_adapters_cost_a_fraction_of_full_updates(self) -> None:
        method = create("knots", {})
        adapters = [UpdateSpec((1024, 1024), 16, torch.float32)] * 8
        full = cases.dense_specs(8, 1024, 1024)
        assert 0 < 10 * method.flops(adapters, 8) < method.flops(full, 8)
        assert 0 < method.workspace(adapters, 8) < method.workspace(full, 8)


class TestDegenerate:
    @pytest.mark.parametrize("aggregate", ["ties", "dare_ties"])
    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    @pytest.mark.parametrize(("m", "n", "tasks"), [(1, 1, 1), (1, 1, 3), (1, 7, 2), (7, 1, 2), (2, 3, 9)])
    def test_small(self, aggregate: str, form: str, m: int, n: int, tasks: int) -> None:
        updates: list[Update] = [
            LowRank(cases.normal(m, 1, seed=i), cases.normal(1, n, seed=9 + i)) for i in range(tasks)
        ]
        if form == "dense":
            updates = [cases.dense(u) for u in updates]
        options: dict[str, Any] = {"aggregate": aggregate, "keep": 1.0}
        if aggregate == "dare_ties":
            options["rate"] = 0.0
        agree({"": knots(updates, **options)}, published({"": updates}, 1.0, cutoff=1e-9))

    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    def test_zeros_and_untouched_tensors(self, form: str) -> None:
        zero: Update = LowRank(torch.zeros(8, 2), torch.zeros(2, 6)) if form == "lowrank" else torch.zeros(8, 6)
        none = LowRank(torch.zeros(8, 0), torch.zeros(0, 6))
        for updates in ([zero, zero], [zero, none], [none, none]):
            assert torch.equal(cases.dense(knots(updates)), torch.zeros(8, 6))
        touched = merge_updates({"a": [zero, none], "b": cases.lora_updates([2, 3], 8, 6)}, "knots")
        assert cases.error(touched["b"], knots(cases.lora_updates([2, 3], 8, 6))) < 1e-14

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 5)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        assert knots([torch.zeros(shape)] * 2).shape == shape

    def test_untouched_tasks_count_with_zeros(self) -> None:
        """They keep nothing, elect nothing, and the mean is over the others."""
        (x,) = cases.lora_updates([3], 12, 9)
        none = LowRank(x.left[:, :0], x.right[:0])
        assert cases.error(knots([x, none], keep=1.0), x) < 1e-13

    def test_ill_conditioned_factors(self) -> None:
        left, right = cases.normal(20, 4, seed=1), cases.normal(4, 15, seed=2)
        left[:, 1] = left[:, 0] + 1e-9 * left[:, 1]
        updates = [LowRank(left, right), *cases.lora_updates([3], 20, 15)]
        agree({"": knots(updates, keep=1.0)}, published({"": updates}, 1.0, cutoff=1e-11), 1e-6)
        assert cases.dense(knots([u.to(torch.float32) for u in updates])).isfinite().all()

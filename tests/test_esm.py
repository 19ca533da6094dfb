"""ESM against the published algorithm written out on the activations themselves, and what follows from it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_checkpoints, merge_state_dicts, merge_updates
from dcmerge_ext.calibration import Grams, save_grams
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import create, esm, list_methods, tsv_m
from dcmerge_ext.methods.base import Context
from dcmerge_ext.methods.esm import layer_factors
from dcmerge_ext.methods.registry import preset_of
from dcmerge_ext.updates import Updates

WORKED = [
    [3.527959, 2.764018, -3.272575, 4.644155],
    [0.369787, 0.007165, 6.038696, 3.970085],
    [3.283609, 4.749976, 2.249611, -3.736188],
    [-5.385062, 4.707663, -0.357589, 1.036997],
]

# m, n, tasks: square, tall, wide, more outputs per task than inputs, one task
SHAPES = [
    (12, 12, 2),
    (12, 9, 2),
    (9, 12, 3),
    (24, 40, 4),
    (40, 10, 2),
    (30, 10, 3),
    (10, 16, 1),
    (14, 9, 1),
    (7, 7, 5),
]


def inputs(tasks: int, n: int, *, tokens: int = 64, seed: int = 0) -> list[Tensor]:
    """(tokens, n) per task, with unequal and correlated features."""
    return [
        cases.normal(tokens, n, seed=300 + 10 * seed + i)
        @ (torch.diag(cases.power_law(n, 0.5)) + 0.2 * cases.normal(n, n, seed=400 + 10 * seed + i) / n**0.5)
        for i in range(tasks)
    ]


def grams(X: Sequence[Tensor], name: str = "") -> list[Grams]:
    return [Grams.of({name: x.mT @ x}) for x in X]


def flat(X: Tensor, count: int) -> Tensor:
    """mean(singular values) polar(X), null directions left out of the factor; ``count`` values in the mean."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    live = S / S[0] > 1e-12
    return (S * live).sum() / count * (U[:, live] @ Vh[live])


def published(
    updates: Sequence[Tensor],
    X: Sequence[Tensor],
    *,
    variant: str = "vit",
    power: float = 0.15,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """The published algorithm on the activations, in float64, where no direction is arbitrary."""
    m, n = updates[0].shape
    bases, coordinates, norms = [], [], []
    slots = [int(m / len(updates))] * len(updates) if ranks is None else ranks
    for delta, x, k in zip(updates, X, slots, strict=True):
        _, s, Ph = torch.linalg.svd(x @ delta.T, full_matrices=False)
        kept = min(k, len(s))
        energies = s[:kept] ** 2 / (len(x) - 1)
        energies = energies.masked_fill(s[:kept] <= 1e-9 * s[0], 0)
        e = torch.zeros(k, dtype=torch.float64)
        e[:kept] = energies**power * (energies > 0)
        e = (e / e.mean())[:kept]
        P = Ph[:kept].T
        bases.append(P * e)
        norms.append(delta.norm())
        coordinates.append((P * e).T @ delta)
    if variant == "vit":
        mean = torch.stack(norms).mean()
        coordinates = [A * (a / mean) ** 2 for A, a in zip(coordinates, norms, strict=True)]
    P, A = torch.cat(bases, 1), torch.cat(coordinates, 0)
    if variant == "vit":
        c = A.norm(dim=0)
        A = A * (c / c.mean()) ** 2
    width = sum(slots)
    return (2 if variant == "vit" else 1) * flat(P, min(m, width)) @ flat(A, min(n, width))


class TestPublished:
    @pytest.mark.parametrize("form", ["dense", "lowrank", "mixed"])
    def test_worked_numbers(self, form: str, backend: str) -> None:
        pair: list[Update] = list(cases.worked_pair())
        updates = pair if form == "lowrank" else [cases.dense(u) for u in pair]
        if form == "mixed":
            updates = [pair[0], cases.dense(pair[1])]
        eye = [Grams.of({"": torch.eye(4, dtype=torch.float64)})] * 2
        merged = esm(updates, activations=eye, rank=2)
        assert isinstance(merged, LowRank) == (form == "lowrank")
        expected = torch.tensor(WORKED, dtype=torch.float64)
        torch.testing.assert_close(cases.dense(merged), expected, rtol=0, atol=1e-6)
        if form != "mixed":
            assert cases.error(esm(updates, activations=eye), merged) < 1e-14

    @pytest.mark.parametrize(("m", "n", "tasks"), SHAPES)
    @pytest.mark.parametrize("variant", ["vit", "roberta"])
    def test_equals_the_algorithm_on_the_activations(self, m: int, n: int, tasks: int, variant: str) -> None:
        updates, X = cases.full_updates(tasks, m, n, exponent=0.7), inputs(tasks, n)
        merged = esm(updates, activations=grams(X), variant=variant)
        assert cases.error(merged, published(updates, X, variant=variant)) < 1e-9

    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("rank", [1, 3, [2, 5, 1]])
    def test_powers_and_ranks(self, power: float, rank: int | list[int]) -> None:
        updates, X = cases.full_updates(3, 14, 10), inputs(3, 10)
        ranks = [rank] * 3 if isinstance(rank, int) else rank
        merged = esm(updates, activations=grams(X), eigenvalue_power=power, rank=rank)
        assert cases.error(merged, published(updates, X, power=power, ranks=ranks)) < 1e-9

    @pytest.mark.parametrize("ranks", [[3, 3], [4, 2, 1]])
    @pytest.mark.parametrize("variant", ["vit", "roberta"])
    def test_adapters_keep_all_their_directions(self, ranks: list[int], variant: str) -> None:
        adapters, X = cases.lora_updates(ranks, 20, 16), inputs(len(ranks), 16)
        merged = esm(adapters, activations=grams(X), variant=variant)
        assert isinstance(merged, LowRank)
        assert merged.rank == sum(ranks)
        expected = published([u.dense() for u in adapters], X, variant=variant, ranks=ranks)
        assert cases.error(merged, expected) < 1e-9

    def test_fewer_tokens_than_features_keep_what_they_show(self) -> None:
        updates, X = cases.full_updates(2, 12, 16), inputs(2, 16, tokens=4)
        merged = esm(updates, activations=grams(X))
        assert cases.error(merged, published(updates, X)) < 1e-7
        assert int(torch.linalg.matrix_rank(merged, rtol=1e-9)) == 8

    def test_directions_that_only_round_off_shows_are_left_out(self) -> None:
        """Also where the Gram matrix has a Cholesky factor."""
        (update,), Q = cases.full_updates(1, 10, 10), cases.orthonormal(10, 10, 5)
        found = []
        for least in (1e-15, 0.0):
            values = torch.cat([cases.power_law(9, 1.0), torch.tensor([least])])
            given = [Grams.of({"": (Q * values) @ Q.T})]
            found.append(esm([update], activations=given))
        assert cases.error(*found) < 1e-7
        assert int(torch.linalg.matrix_rank(found[0], rtol=1e-9)) == 9

    @pytest.mark.parametrize("preset", ["vit", "roberta"])
    def test_presets(self, preset: str) -> None:
        found = preset_of(list_methods()["esm"], {"official": preset})
        assert found is not None
        assert found.mean_tensors == ("text_projection" if preset == "vit" else None)
        chosen: Any = create("esm", {"official": preset})
        assert (chosen.variant, chosen.eigenvalue_power, chosen.layer_scaling) == (preset, 0.15, True)


class TestIdentities:
    @pytest.mark.parametrize("variant", ["vit", "roberta"])
    def test_order_of_the_tasks_does_not_matter(self, variant: str) -> None:
        pairs = list(zip(cases.full_updates(3, 15, 12, exponent=1.0), inputs(3, 12), strict=True))
        found = []
        for order in itertools.permutations(pairs):
            updates, X = zip(*order, strict=True)
            found.append(esm(updates, activations=grams(X), variant=variant))
        assert max(cases.error(f, found[0]) for f in found) < 1e-10

    @pytest.mark.parametrize("factor", [4.0, 0.3, -1.0])
    def test_homogeneous(self, factor: float) -> None:
        updates, X = cases.full_updates(3, 12, 9), inputs(3, 9)
        scaled = esm([u * factor for u in updates], activations=grams(X))
        assert cases.error(scaled, factor * esm(updates, activations=grams(X))) < 1e-12

    @pytest.mark.parametrize("factor", [1e-50, 0.3, 1e50])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_number_of_tokens_and_their_scale_do_not_matter(self, factor: float, dtype: torch.dtype) -> None:
        updates, X = cases.full_updates(2, 12, 9, dtype=dtype), inputs(2, 9)
        scaled = [factor * X[0], torch.cat([X[1]] * 3)]
        found, expected = esm(updates, activations=grams(scaled)), esm(updates, activations=grams(X))
        assert cases.error(found, expected) < (1e-4 if dtype == torch.float32 else 1e-11)

    @pytest.mark.parametrize("variant", ["vit", "roberta"])
    def test_rotations_of_the_outputs_carry_over(self, variant: str) -> None:
        updates, X, Q = cases.full_updates(3, 12, 9), inputs(3, 9), cases.orthonormal(12, 12, 7)
        merged = esm(updates, activations=grams(X), variant=variant)
        assert cases.error(esm([Q @ u for u in updates], activations=grams(X), variant=variant), Q @ merged) < 1e-11

    def test_rotations_of_the_inputs_carry_over_without_factors_of_columns(self) -> None:
        updates, X, Q = cases.full_updates(3, 12, 9), inputs(3, 9), cases.orthonormal(9, 9, 7)
        rotated = [
            esm([u @ Q for u in updates], activations=grams([x @ Q for x in X]), variant=v) for v in ("vit", "roberta")
        ]
        plain = [esm(updates, activations=grams(X), variant=v) @ Q for v in ("vit", "roberta")]
        assert cases.error(rotated[1], plain[1]) < 1e-11
        assert cases.error(rotated[0], plain[0]) > 1e-2

    def test_a_single_task_of_one_singular_value_comes_back_doubled(self) -> None:
        update = cases.orthonormal(9, 9, 3)
        eye = Grams.of({"": torch.eye(9, dtype=torch.float64)})
        assert cases.error(esm([update], activations=[eye]), 2 * update) < 1e-12
        assert cases.error(esm([update], activations=[eye], variant="roberta"), update) < 1e-12

    def test_the_activations_matter(self) -> None:
        updates, X = cases.full_updates(2, 12, 9), inputs(2, 9)
        merged = esm(updates, activations=grams(X))
        assert cases.error(esm(updates, activations=grams(X[::-1])), merged) > 1e-2
        assert cases.error(tsv_m(updates), merged) > 1e-2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_adapters_equal_their_products(self, dtype: torch.dtype) -> None:
        adapters, X = cases.lora_updates([4, 2, 5], 48, 40, dtype=dtype), inputs(3, 40)
        formed = esm([u.dense() for u in adapters], activations=grams(X), rank=[4, 2, 5])
        tolerance = 2e-4 if dtype == torch.float32 else 1e-10
        assert cases.error(esm(adapters, activations=grams(X)), formed) < tolerance

    def test_adapters_beside_full_fine_tunes(self) -> None:
        updates: list[Update] = [*cases.lora_updates([3], 20, 16), *cases.full_updates(2, 20, 16)]
        X, ranks = inputs(3, 16), [3, 8, 8]  # int((20 - 3) / 2)
        merged = esm(updates, activations=grams(X))
        assert isinstance(merged, Tensor)
        assert cases.error(merged, published([cases.dense(u) for u in updates], X, ranks=ranks)) < 1e-9

    def test_weights_multiply_the_updates(self) -> None:
        updates, X = cases.full_updates(2, 12, 9), inputs(2, 9)
        weighted = merge_updates(updates, "esm", weights=[2.0, -0.3], activations=grams(X))
        assert cases.error(weighted, esm([updates[0] * 2.0, updates[1] * -0.3], activations=grams(X))) < 1e-12

    def test_weights_stored_as_in_by_out(self) -> None:
        """As GPT-2 stores them: the key says so, also for square weights."""
        for m, n in ((12, 9), (10, 10)):
            for updates in (cases.full_updates(2, m, n), cases.lora_updates([3, 2], m, n)):
                X = inputs(2, n)
                stored = [Grams.of({".mT": x.mT @ x}) for x in X]
                merged = esm([u.mT for u in updates], activations=stored)
                expected = esm(updates, activations=grams(X))
                assert isinstance(merged, LowRank) == isinstance(expected, LowRank)
                assert cases.error(merged, cases.dense(expected).mT) < 1e-12

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_float32_agrees_with_float64(self, form: str, backend: str) -> None:
        X = inputs(3, 48, tokens=200)
        wide: Sequence[Update] = (
            cases.full_updates(3, 64, 48) if form == "dense" else cases.lora_updates([4, 4, 4], 64, 48)
        )
        narrow = [u.to(torch.float32) for u in wide]
        merged = esm(narrow, activations=grams(X), rank=4)
        assert merged.dtype == torch.float32
        expected = esm([u.to(torch.float64) for u in narrow], activations=grams(X), rank=4)
        assert cases.error(merged, expected) < (1e-4 if form == "dense" else 1e-6)


class TestFallback:
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_without_activations_of_a_matrix_it_is_tsv_m(self, form: str) -> None:
        updates = cases.full_updates(2, 12, 9) if form == "dense" else cases.lora_updates([2, 3], 12, 9)
        other = grams(inputs(2, 9), "other")
        ctx = Context(2, "")
        merged = create("esm", {"activations": other}).merge(Updates.of(updates), ctx)
        assert torch.equal(cases.dense(merged), cases.dense(tsv_m(updates)))
        assert ctx.facts["fallback"] == "tsv_m: no activations"

    @pytest.mark.parametrize("ranks", [None, [2, 3]])
    def test_of_roberta_multiplies_by_mean_singular_values(self, ranks: list[int] | None) -> None:
        updates = cases.full_updates(2, 12, 10)
        merged = esm(updates, activations=grams(inputs(2, 10), "other"), variant="roberta", rank=ranks)
        triplets = [torch.linalg.svd(u) for u in updates]
        kept = ranks or [5, 5]
        U = torch.cat([t.U[:, :k] for t, k in zip(triplets, kept, strict=True)], 1)
        V = torch.cat([t.Vh[:k].T for t, k in zip(triplets, kept, strict=True)], 1)
        gain = torch.linalg.svdvals(U).mean() * torch.linalg.svdvals(V).mean()
        assert cases.error(merged, gain * tsv_m(updates, rank=ranks)) < 1e-12

    def test_no_activations_at_all_are_tsv_m_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        updates = cases.full_updates(2, 12, 9)
        model = {"layers.0.fc.weight": updates, "layers.1.fc.weight": [3 * u for u in updates]}
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = merge_updates(model, "esm")
        assert all(torch.equal(merged[name], tsv_m(u)) for name, u in model.items())
        assert caplog.text.count("esm: no activations are given") == 1
        assert "dcmerge calibrate" in caplog.text

    @pytest.mark.parametrize("layer_scaling", [True, False])
    def test_names_that_fit_no_matrix_are_warned_of(
        self, layer_scaling: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        updates = cases.full_updates(2, 12, 9)
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = esm(updates, activations=grams(inputs(2, 9), "x"), layer_scaling=layer_scaling)
        assert cases.error(merged, tsv_m(updates)) == 0
        assert "no matrix has activations" in caplog.text

    def test_activations_of_some_tasks_only_are_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        updates, X = cases.full_updates(3, 12, 9), inputs(3, 9)
        some = [*grams(X[:1]), Grams.of({}), *grams(X[2:])]
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = esm(updates, activations=some)
        assert torch.equal(merged, tsv_m(updates))
        assert caplog.messages == [
            "esm: matrices that not every task has activations for are merged by TSV-M: 1, such as this one, for which task 1 "
            "has none"
        ]

    def test_a_task_that_does_not_touch_the_matrix_needs_none(self) -> None:
        adapters, X = cases.lora_updates([3, 0, 2], 12, 9), inputs(2, 9)
        some = [*grams(X[:1]), Grams.of({}), *grams(X[1:])]
        merged = esm(adapters, activations=some)
        assert cases.error(merged, esm([adapters[0], adapters[2]], activations=grams(X))) < 1e-12


class TestLayerScaling:
    def test_each_matrix_by_its_norm_within_its_family(self) -> None:
        names = [
            "h.0.fc1.weight",
            "h.1.fc1.weight",
            "h.0.fc2.weight",
            "h.1.fc2.weight",
            "h.2.fc2.weight",
            "head.weight",
        ]
        model = {name: [float(1 + i) * u for u in cases.full_updates(2, 12, 9, seed=i)] for i, name in enumerate(names)}
        chosen = names[:4]  # the others are merged by TSV-M, and scaled as well
        X = {name: inputs(2, 9, seed=i) for i, name in enumerate(chosen)}
        given = [Grams.of({name: X[name][t].mT @ X[name][t] for name in chosen}) for t in range(2)]
        plain = merge_updates(model, "esm", activations=given, layer_scaling=False)
        scaled = merge_updates(model, "esm", activations=given)
        for name in chosen:
            assert cases.error(plain[name], published(model[name], X[name])) < 1e-9
        for family in (names[:2], names[2:5], names[5:]):
            mean = sum(plain[name].norm() for name in family) / len(family)
            for name in family:
                assert cases.error(scaled[name], plain[name] * (plain[name].norm() / mean) ** 2) < 1e-12
        assert cases.error(scaled[names[0]], plain[names[0]]) > 1e-2

    def test_families_differ_in_the_first_number_alone(self) -> None:
        norms = {"0.a.1": 1.0, "1.a.1": 3.0, "0.a.2": 5.0, "b1.c": 2.0, "b2.c": 9.0, "z.0": 0.0, "z.1": 0.0}
        found = layer_factors(norms)
        assert found == {"0.a.1": 0.25, "1.a.1": 2.25, "0.a.2": 1, "b1.c": 1, "b2.c": 1, "z.0": 1, "z.1": 1}

    def test_adapters_stay_adapters(self) -> None:
        model = {f"h.{i}.w": [u * (i + 1.0) for u in cases.lora_updates([2, 3], 12, 9)] for i in range(2)}
        X = inputs(2, 9)
        given = [Grams.of(dict.fromkeys(model, x.mT @ x)) for x in X]
        merged = merge_updates(model, "esm", activations=given)
        assert [m.rank for m in merged.values() if isinstance(m, LowRank)] == [5, 5]
        plain = esm(model["h.0.w"], activations=grams(X))
        assert cases.error(merged["h.0.w"], plain.dense() * (1 / 1.5) ** 2) < 1e-10  # norms 1 and 2, mean 1.5
        assert cases.error(merged["h.1.w"], plain.dense() * 2 * (2 / 1.5) ** 2) < 1e-10


class TestDegenerate:
    @pytest.mark.parametrize("variant", ["vit", "roberta"])
    def test_a_zero_task_takes_no_part(self, variant: str) -> None:
        updates, X = cases.full_updates(2, 12, 10), inputs(3, 10)
        options: dict[str, Any] = {"rank": 4, "variant": variant}
        merged = esm([updates[0], torch.zeros(12, 10).double(), updates[1]], activations=grams(X), **options)
        alone = esm(updates, activations=grams([X[0], X[2]]), **options)
        assert cases.error(merged, alone) < 1e-11

    def test_a_task_whose_samples_do_not_reach_the_layer_takes_no_part(self) -> None:
        updates, X = cases.full_updates(3, 12, 10), inputs(3, 10)
        merged = esm(updates, activations=grams([X[0], 0 * X[1], X[2]]), rank=4)
        assert cases.error(merged, esm(updates[::2], activations=grams(X[::2]), rank=4)) < 1e-11

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_copies_of_a_task_bring_nothing_made_up(self, dtype: torch.dtype) -> None:
        update, x = cases.full_updates(1, 12, 10)[0], inputs(1, 10)[0]
        merged = esm([update.to(dtype)] * 2, activations=grams([x, x]), rank=3)
        assert cases.error(merged, published([update] * 2, [x] * 2, ranks=[3, 3])) < (
            1e-4 if dtype == torch.float32 else 1e-9
        )
        assert int(torch.linalg.matrix_rank(merged.double(), rtol=1e-5)) == 3

    def test_zero_updates_and_zero_activations_merge_to_zero(self) -> None:
        eye = Grams.of({"": torch.eye(5)})
        assert torch.equal(esm([torch.zeros(6, 5)] * 2, activations=[eye] * 2), torch.zeros(6, 5))
        zero = Grams.of({"": torch.zeros(5, 5)})
        assert torch.equal(esm([torch.ones(6, 5)] * 2, activations=[zero] * 2), torch.zeros(6, 5))
        assert esm([torch.zeros(0, 6, 5)] * 2, activations=[eye] * 2).shape == (0, 6, 5)
        merged = esm(cases.lora_updates([0, 0], 6, 5), activations=[eye] * 2)
        assert (merged.rank, merged.shape) == (0, (6, 5))

    def test_one_by_one(self) -> None:
        one = Grams.of({"": torch.ones(1, 1)})
        assert esm([torch.tensor([[-2.5]])], activations=[one]).item() == pytest.approx(-5)
        assert esm([torch.tensor([[-2.5]])], activations=[one], variant="roberta").item() == pytest.approx(-2.5)

    @pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
    def test_more_tasks_than_rows_or_columns_take_the_mean_with_a_warning(
        self, shape: tuple[int, int], caplog: pytest.LogCaptureFixture
    ) -> None:
        updates = [cases.normal(*shape, seed=i) for i in range(5)]
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = esm(updates, activations=grams(inputs(5, shape[1])))
        assert cases.error(merged, sum(updates) / 5) < 1e-14
        assert f"esm: 5 tasks leave a {shape[0]} x {shape[1]} matrix no component each" in caplog.text

    @pytest.mark.parametrize("shared", [True, False])
    def test_leading_dimensions_equal_the_loop(self, shared: bool) -> None:
        """Also where a task is zero in some matrices of the batch alone."""
        batch = [torch.stack([cases.normal(12, 9, seed=20 + 10 * i + b) for b in range(4)]) for i in range(3)]
        batch[2][1] = 0
        X = [torch.stack([inputs(3, 9, seed=0 if shared else b)[i] for b in range(4)]) for i in range(3)]
        given = [Grams.of({"": (x.mT @ x)[0] if shared else (x.mT @ x).reshape(2, 2, 9, 9)}) for x in X]
        merged = esm([u.reshape(2, 2, 12, 9) for u in batch], activations=given).reshape(4, 12, 9)
        adapters = [LowRank(cases.normal(4, 12, r, seed=30 + r), cases.normal(4, r, 9, seed=40 + r)) for r in (3, 2)]
        factored = esm(adapters, activations=grams([x if not shared else x[0] for x in X[:2]]))
        for b in range(4):
            each = grams([x[b] for x in X])
            assert cases.error(merged[b], esm([u[b] for u in batch], activations=each)) < 1e-10
            alone = esm([LowRank(u.left[b], u.right[b]) for u in adapters], activations=each[:2])
            assert cases.error(factored.dense()[b], alone) < 1e-10

    @pytest.mark.parametrize("scale", [1e-15, 1e12])
    def test_extreme_scales_in_float32(self, scale: float) -> None:
        updates, X = cases.full_updates(2, 12, 10, dtype=torch.float32), inputs(2, 10)
        scaled = esm([u * scale for u in updates], activations=grams(X)).double() / scale
        assert cases.error(scaled, esm(updates, activations=grams(X))) < 1e-5

    def test_basis_tolerance_drops_weak_directions(self) -> None:
        updates, X = cases.full_updates(2, 12, 10), inputs(2, 10)
        merged = esm(updates, activations=grams(X), basis_tol=0.5)
        assert int(torch.linalg.matrix_rank(merged, rtol=1e-9)) < 10

    def test_accuracy_and_seed_reach_the_decomposition(self) -> None:
        updates, X = cases.full_updates(4, 120, 100, exponent=0.3), inputs(4, 100, tokens=300)
        exact, first, again, other = (
            esm(updates, activations=grams(X), rank=8, **o)
            for o in ({}, {"accuracy": "fast"}, {"accuracy": "fast", "seed": 0}, {"accuracy": "fast", "seed": 9})
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert 1e-6 < cases.error(first, exact) < 1


class TestRefused:
    UPDATES = (torch.ones(6, 5), torch.eye(6, 5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 6}, r"rank 6 exceeds min\(m, n\) = 5 of a 6 x 5 update"),
            ({"rank": [1]}, r"rank has 1 entries for 2 tasks"),
            ({"variant": "bert"}, r"variant"),
            ({"eigenvalue_power": -0.1}, r"eigenvalue_power"),
            ({"basis_tol": 2.0}, r"basis_tol"),
            ({"official": "vit", "variant": "roberta"}, r"variant='roberta' conflicts with official='vit'"),
            ({"activations": "a.safetensors"}, r"activations: expected array.*list of str \| Grams"),
            ({"activations": [{"w": torch.eye(5)}] * 2}, r"activations"),
            (
                {"activations": []},
                r"activations has 0 entries for 2 tasks; give one file of `dcmerge calibrate` per task",
            ),
            ({"activations": [Grams.of({})]}, r"activations has 1 entries for 2 tasks"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            esm(list(self.UPDATES), **options)

    @pytest.mark.parametrize(
        ("matrix", "message"),
        [
            (torch.eye(4), r"Gram matrix '' of mine is 4 x 4, and a 6 x 5 update takes 5 x 5; calibrate"),
            (torch.eye(6), r"is 6 x 6, and a 6 x 5 update takes 5 x 5"),
            (torch.eye(5).expand(2, 5, 5), r"is 2 x 5 x 5, and a 6 x 5 update takes 5 x 5"),
            (torch.ones(6, 5), r"Gram matrix '' of mine is 6x5 float32, not a square floating matrix"),
            (torch.eye(5).long(), r"is 5x5 int64, not a square floating matrix"),
            (torch.full((5, 5), torch.nan), r"Gram matrix '' of mine holds 25 NaN or Inf values"),
            (
                torch.eye(5) - 2 * torch.eye(5)[:, :1] @ torch.eye(5)[:1],
                r"mine has negative eigenvalues, which no X'X has",
            ),
        ],
    )
    def test_gram_matrices(self, matrix: Tensor, message: str) -> None:
        given = [Grams.of({"": torch.eye(5)}), Grams.of({"": matrix}, "mine")]
        with pytest.raises(InputError, match=message):
            esm(list(self.UPDATES), activations=given)

    def test_two_orientations(self) -> None:
        given = [Grams.of({"": torch.eye(5)}), Grams.of({".mT": torch.eye(5)})]
        with pytest.raises(OptionError, match=r"disagree on how the weight is stored"):
            esm([torch.ones(5, 5)] * 2, activations=given)

    @pytest.mark.parametrize("shape", [(5,), ()])
    def test_an_update_that_is_no_matrix(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"esm merges matrices \(..., m, n\)"):
            esm([torch.ones(shape)] * 2)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"nowhere\.safetensors: cannot be read"):
            esm(list(self.UPDATES), activations=[str(tmp_path / "nowhere.safetensors")] * 2)
        (tmp_path / "bad.safetensors").write_bytes(b"no header")
        with pytest.raises(InputError, match=r"bad\.safetensors: not a complete safetensors file"):
            esm(list(self.UPDATES), activations=[str(tmp_path / "bad.safetensors")] * 2)


class TestCheckpoints:
    NAMES = ("layers.0.attn.weight", "layers.1.attn.weight", "layers.0.mlp.weight", "layers.0.moe.experts.weight")

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        paths = []
        for task in range(2):
            found = {}
            for i, name in enumerate(self.NAMES):
                x = inputs(2, families.SHAPES[name][-1], seed=i)[task]
                found[name] = x.mT @ x
            paths.append(str(tmp_path / f"grams{task}.safetensors"))
            save_grams(found, paths[-1])
        return paths

    def test_files_through_every_door(
        self, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        base = families.toy()
        tuned = [families.tuned(base, seed) for seed in range(2)]
        paths = [families.write_model(tmp_path / str(i), model) for i, model in enumerate([base, *tuned])]
        report = merge_checkpoints(paths[0], paths[1:], tmp_path / "out", "esm", activations=files)
        found = families.read_model(tmp_path / "out")
        in_memory = merge_state_dicts(base, tuned, "esm", activations=files)
        assert all(families.same_bits(found[name], values) for name, values in in_memory.items())
        arguments = ("--base", paths[0], *families.tasks(*paths[1:]), "--method", "esm")
        command = (*arguments, "--set", f"activations=[{','.join(files)}]")
        by_command = families.merged(capsys, tmp_path / "cli", *command)
        assert all(families.same_bits(found[name], values) for name, values in by_command.items())
        assert families.run(capsys, "plan", *command, "--out", tmp_path / "plan").status == 0
        assert "activations" not in caplog.text

        assert list(report.record["options"]["activations"]) == files
        facts = {t["name"]: t for t in report.record["tensors"]}
        fallback = {"embed_tokens.weight", "lm_head.weight", "frozen.weight"}
        assert {n for n, t in facts.items() if t.get("fallback")} == fallback
        assert "layer_factor" in facts[self.NAMES[0]]
        name = self.NAMES[2]  # alone in its family
        X = inputs(2, families.SHAPES[name][-1], seed=2)
        expected = published([(m[name] - base[name]).double() for m in tuned], X)
        assert cases.error(found[name] - base[name], expected) < 1e-4

    def test_a_file_written_anew_is_read_anew(self, tmp_path: Path) -> None:
        updates, X = cases.full_updates(1, 12, 9), inputs(2, 9)
        path = tmp_path / "grams.safetensors"
        for x in X:
            save_grams({"": x.mT @ x}, path, overwrite=True)
            assert torch.equal(esm(updates, activations=[str(path)]), esm(updates, activations=grams([x])))

    def test_gram_matrices_in_memory_leave_their_label_in_the_record(self, tmp_path: Path) -> None:
        base = families.toy()
        paths = [families.write_model(tmp_path / n, m) for n, m in (("b", base), ("t", families.tuned(base, 0)))]
        given = [Grams.of({self.NAMES[2]: torch.eye(12)}, "mine")]
        record = merge_checkpoints(paths[0], paths[1:], tmp_path / "out", "esm", activations=given).record
        assert list(record["options"]["activations"]) == [{"label": "mine"}]

    def test_adapters(self, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = families.toy()
        paths = [families.write_adapter(tmp_path / f"a{i}", base, seed=i) for i in range(2)]
        setting = f"activations=[{','.join(files)}]"
        result = families.run(
            capsys, "merge", *families.tasks(*paths), "--method", "esm", "--set", setting, "--out", tmp_path / "out"
        )
        assert result.status == 0, result.err
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_estimates_grow_with_the_work() -> None:
    method = create("esm", {"activations": [Grams.of({})] * 4})
    once = create("esm", {"activations": [Grams.of({})] * 4, "layer_scaling": False})
    small, large = (cases.dense_specs(4, size, size) for size in (64, 256))
    assert 0 < method.flops(small, 4) < method.flops(large, 4) / 16
    assert method.flops(large, 4) == 2 * once.flops(large, 4)
    assert 64 * 64 * 2 < method.workspace(small, 4) < method.workspace(large, 4) / 8

"""The components of all tasks of one tensor: the same as one by one, each update loaded once, and the facts recorded."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import spectral
from dcmerge_ext.methods.spectral import components_of
from dcmerge_ext.svd import Components, Evidence, Start, decompose, summarize
from dcmerge_ext.updates import Updates

# dense and low-rank tasks mixed; ranks 4, 4 and 6 of the factors, and a task that does not touch the tensor
MIXED: list[Update] = [
    *cases.full_updates(2, 40, 30, dtype=torch.float32),
    *cases.lora_updates([4, 4, 6], 40, 30, dtype=torch.float32),
    LowRank(torch.zeros(40, 0), torch.zeros(0, 30)),
    *cases.full_updates(1, 40, 30, seed=1, dtype=torch.float32),
]


def product(c: Components) -> Tensor:
    return c.U * c.S[..., None, :] @ c.Vh


class Counted:
    """Updates that record which were loaded, and how many at a time are held."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self.loads: Counter[int] = Counter()
        inner = Updates.of(updates)
        self.updates = Updates(inner.specs, lambda i: self._load(inner, i))

    def _load(self, inner: Updates, i: int) -> Update:
        self.loads[i] += 1
        return inner[i]


def check_equals_one_by_one(updates: Sequence[Update], ranks: Sequence[int], found: Sequence[Components]) -> None:
    wanted = [(i, rank) for i, rank in enumerate(ranks) if rank]
    assert len(found) == len(wanted)
    for (i, rank), components in zip(wanted, found, strict=True):
        alone, _ = decompose(updates[i], rank, start=Start())
        assert [x.shape for x in components] == [x.shape for x in alone]
        assert {x.dtype for x in components} == {x.dtype for x in alone}
        assert cases.error(components.S[..., None, :], alone.S[..., None, :]) < 1e-6
        assert cases.error(product(components), product(alone)) < 3e-6


@pytest.mark.parametrize(
    "ranks",
    [
        [5, 5, 4, 4, 4, 0, 5],
        [5, 7, 4, 3, 6, 0, 1],
        [0, 5, 0, 4, 6, 0, 0],
        [30, 1, 8, 8, 8, 8, 30],  # slots beyond the rank of the factors are null
        [0, 0, 0, 0, 0, 0, 0],
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("restore_threads")
def test_equals_the_decompositions_one_by_one_and_loads_each_update_once(ranks: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    counted = Counted(MIXED)
    found, facts = components_of(counted.updates, ranks)
    check_equals_one_by_one(MIXED, ranks, found)
    assert counted.loads == {i: 1 for i, rank in enumerate(ranks) if rank}
    assert sum(facts["routes"].values()) == sum(rank > 0 for rank in ranks)


def test_a_task_of_rank_zero_is_not_loaded() -> None:
    counted = Counted(MIXED)
    found, facts = components_of(counted.updates, [0] * len(MIXED))
    assert found == []
    assert counted.loads == {}
    assert facts == {"routes": {}, "dimension": 0}


def test_tasks_stay_in_order() -> None:
    updates = [scale * cases.normal(20, 15, seed=1, dtype=torch.float32) for scale in (3.0, 1.0, 2.0)]
    lora = cases.lora_updates([3], 20, 15, dtype=torch.float32)[0]
    mixed = [updates[0], lora * 10.0, updates[1], lora * 0.1, updates[2]]
    found, _ = components_of(Updates.of(mixed), [2] * 5)
    largest = torch.stack([c.S[0].float() for c in found])
    exact = torch.stack([torch.linalg.svdvals(cases.dense(u))[0] for u in mixed])
    torch.testing.assert_close(largest, exact)


def test_leading_dimensions() -> None:
    dense = [cases.normal(2, 3, 12, 10, seed=s, dtype=torch.float32) for s in range(2)]
    lora = [
        LowRank(cases.normal(2, 3, 12, 4, seed=s), cases.normal(2, 3, 4, 10, seed=s + 9)).to(torch.float32)
        for s in range(2)
    ]
    updates: list[Update] = [dense[0], lora[0], dense[1], lora[1]]
    found, facts = components_of(Updates.of(updates), [3] * 4)
    check_equals_one_by_one(updates, [3] * 4, found)
    assert found[0].U.shape == (2, 3, 12, 3)
    assert sum(facts["routes"].values()) == 2 * 6 + 2  # one for each matrix, one for all of a LowRank


def test_nothing_keeps_a_full_decomposition_alive() -> None:
    found, _ = components_of(Updates.of(MIXED[:2]), [3, 3])
    for components in found:
        for x in components:
            assert x.is_contiguous()
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_weights_are_in_the_singular_values() -> None:
    plain, _ = components_of(Updates.of(MIXED), [3] * 5 + [0, 3])
    weighted, _ = components_of(Updates.of(MIXED, [1, -2, 3, 0.5, -1, 7, 0]), [3] * 5 + [0, 3])
    for a, b, weight in zip(plain, weighted, [1, -2, 3, 0.5, -1, 0], strict=True):
        assert cases.error(b.S[None], abs(weight) * a.S[None]) < 1e-6
        assert cases.error(product(b), weight * product(a)) < 3e-6


def test_half_of_a_float64_task_stays_float64() -> None:
    updates = [cases.normal(12, 10, seed=1), cases.normal(12, 10, seed=2, dtype=torch.float32)]
    found, _ = components_of(Updates.of(updates), [3, 3])
    assert [c.S.dtype for c in found] == [torch.float64, torch.float32]


@pytest.mark.usefixtures("restore_threads")
def test_large_updates_are_not_held_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(4)
    monkeypatch.setattr(spectral, "_SIDE_BY_SIDE_BYTES", 2 * 40 * 30 * 4)
    held, most, lock = 0, 0, threading.Lock()
    original = spectral.decompose

    def counted(*args: object, **options: object) -> object:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        try:
            return original(*args, **options)
        finally:
            with lock:
                held -= 1

    monkeypatch.setattr(spectral, "decompose", counted)
    updates = cases.full_updates(8, 40, 30, dtype=torch.float32)
    found, _ = components_of(Updates.of(updates), [3] * 8)
    assert most <= 2
    check_equals_one_by_one(updates, [3] * 8, found)


class TestFacts:
    def test_count_the_routes_and_hold_the_worst_numbers(self) -> None:
        evidence = [
            Evidence("krylov", 80, residual=1e-7),
            Evidence("gram", 200, tie=True),
            Evidence("krylov", 96, residual=3e-7),
            Evidence("subspace", 24, captured=0.9),
            Evidence("subspace", 20, captured=0.8),
        ]
        assert summarize(evidence) == {
            "routes": {"gram": 1, "krylov": 2, "subspace": 2},
            "dimension": 200,
            "residual": 3e-7,
            "captured": 0.8,
            "ties": 1,
        }

    def test_leave_out_what_was_not_measured(self) -> None:
        assert summarize([Evidence("lapack", 7)]) == {"routes": {"lapack": 1}, "dimension": 7}
        assert summarize([]) == {"routes": {}, "dimension": 0}

    def test_name_the_routes_taken(self) -> None:
        _, facts = components_of(Updates.of(MIXED), [5, 5, 4, 4, 4, 0, 5])
        assert facts["routes"].pop("factors") == 3
        assert sum(facts["routes"].values()) == 3
        assert facts["dimension"] == 30
        assert "ties" not in facts

    def test_hold_the_residual_of_the_krylov_route(self) -> None:
        updates = [cases.with_spectrum(520, 512, cases.power_law(512, 0.5), seed=s).float() for s in range(2)]
        _, facts = components_of(Updates.of(updates), [8, 8])
        assert facts["routes"] == {"krylov": 2}
        assert 0 < facts["residual"] < 1e-6

    def test_report_ties(self) -> None:
        tied = cases.with_spectrum(40, 30, [2, 1, 1, 1], seed=2).float()
        _, facts = components_of(Updates.of([tied, tied, 2 * tied]), [2, 4, 3])
        assert facts["ties"] == 2

    def test_report_what_fast_captures(self) -> None:
        updates = [cases.with_spectrum(60, 50, cases.power_law(50, e), seed=3).float() for e in (0.5, 1.0)]
        found, facts = components_of(Updates.of(updates), [5, 5], accuracy="fast")
        captured = [(c.S.square().sum() / u.square().sum()).item() for c, u in zip(found, updates, strict=True)]
        assert facts["captured"] == pytest.approx(min(captured), rel=1e-5)


def test_seed_and_name_decide_the_random_directions_and_copies_of_a_task_give_the_same_bytes() -> None:
    update = cases.with_spectrum(60, 50, cases.power_law(50, 0.3), seed=4).float()

    def values(**options: object) -> list[Tensor]:
        return [c.S for c in components_of(Updates.of([update, update]), [5, 5], accuracy="fast", **options)[0]]

    first = values()
    assert all(torch.equal(a, b) for a, b in zip(first, values(), strict=True))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], values(seed=1)[0])
    assert not torch.equal(first[0], values(key="w")[0])


def test_an_error_of_one_update_is_raised() -> None:
    inner = Updates.of(MIXED)

    def load(i: int) -> Update:
        if i == 1:
            raise OSError("task 1 cannot be read")
        return inner[i]

    with pytest.raises(OSError, match="task 1 cannot be read"):
        components_of(Updates(inner.specs, load), [5, 5, 4, 4, 4, 0, 5])

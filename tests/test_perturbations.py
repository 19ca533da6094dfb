"""Perturbations reach what they promise, in every form an update has, and depend on their arguments alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, truncated_svd
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.metrics import cos_sim, dir_sim
from dcmerge_ext.perturbations import _complement, perturb_directions, perturb_energy, perturb_spectrum

FORMS: dict[str, Callable[[Update], Update]] = {"lowrank": lambda u: u, "dense": cases.dense}
both_forms = pytest.mark.parametrize("form", FORMS)
SPECTRUM = torch.tensor([10, 5, 2, 1], dtype=torch.float64)
ROUND_OFF = {torch.float32: 2e-6, torch.float64: 1e-13}
both_dtypes = pytest.mark.parametrize("dtype", ROUND_OFF)


def close(actual: Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


class TestSpectrum:
    @pytest.mark.parametrize(
        ("p", "expected"),
        [
            (1.0, [10, 5, 2, 1]),
            (0.9, [7.443250, 5.745400, 4.726689, 4.387119]),
            (0.6, [3.142857, 5.285714, 6.571429, 7]),
        ],
    )
    def test_worked_numbers(self, p: float, expected: list[float]) -> None:
        close(perturb_spectrum(SPECTRUM, p), expected, 1e-6)

    def test_leading_values_turn_negative_in_the_end(self) -> None:
        assert float(perturb_spectrum(SPECTRUM, 0.3)[0]) == pytest.approx(-0.407, abs=5e-4)

    def test_passes_the_flat_spectrum(self) -> None:
        p = float(SPECTRUM.sum() / (2 * SPECTRUM.norm()))
        assert p == pytest.approx(0.789, abs=5e-4)
        close(perturb_spectrum(SPECTRUM, p), [float(SPECTRUM.norm()) / 2] * 4)

    @pytest.mark.parametrize("p", [0.0, 0.3, 0.7, 0.95, 1.0])
    def test_cosine_and_norm(self, p: float) -> None:
        S = torch.stack([SPECTRUM, SPECTRUM**2, cases.power_law(4, 0.1)])
        turned = perturb_spectrum(S, p)
        close(torch.cosine_similarity(S, turned, dim=-1), [p] * 3)
        close(turned.norm(dim=-1), S.norm(dim=-1))

    def test_null_components_stay_null(self) -> None:
        padded = torch.cat([SPECTRUM, torch.zeros(3, dtype=torch.float64)])
        close(perturb_spectrum(padded, 0.8), [*perturb_spectrum(SPECTRUM, 0.8).tolist(), 0, 0, 0])

    @pytest.mark.parametrize("S", [[2.0, 2.0, 2.0], [3.0], [3.0, 0.0], [0.0, 0.0], [1.0, 1.0 - 1e-9]])
    def test_flat_spectra_have_nowhere_to_turn(self, S: list[float]) -> None:
        given = torch.tensor(S, dtype=torch.float64)
        with pytest.raises(InputError, match=r"flat, has one value, or none.*to 0\.9; leave that update out"):
            perturb_spectrum(given, 0.9)
        assert torch.equal(perturb_spectrum(given, 1.0), given)

    def test_refused(self) -> None:
        for p in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match=r"cos_sim must lie in 0 \.\. 1"):
                perturb_spectrum(SPECTRUM, p)
        with pytest.raises(TypeError, match="floating dtype"):
            perturb_spectrum(SPECTRUM.long(), 0.5)


class TestEnergy:
    @both_forms
    @both_dtypes
    @pytest.mark.parametrize("p", [0.85, 0.95, 1.0])
    def test_turns_the_energy_alone(self, form: str, dtype: torch.dtype, p: float, caplog: Any) -> None:
        update = FORMS[form](cases.lora_updates([5], 30, 20, dtype=dtype)[0])
        turned = perturb_energy(update, p)
        assert type(turned) is type(update)
        assert (turned.shape, turned.dtype) == (update.shape, dtype)
        close(cos_sim(update, turned), p, ROUND_OFF[dtype])
        close(dir_sim(update, turned), 1.0, ROUND_OFF[dtype] * 100)
        assert not caplog.records

    def test_a_rank_perturbs_the_truncated_update(self) -> None:
        (update,) = cases.full_updates(1, 20, 16)
        turned = perturb_energy(update, 0.97, rank=4)
        close(cos_sim(cases.truncated(update, 4), turned), 0.97)
        assert cases.error(cases.truncated(turned, 4), turned) < 1e-12

    def test_warns_where_directions_flip(self, caplog: pytest.LogCaptureFixture) -> None:
        update = LowRank(cases.orthonormal(9, 4, 1) * SPECTRUM, cases.orthonormal(8, 4, 2).T)
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            turned = perturb_energy(update, 0.3)
        assert "at cos_sim 0.3 1 of 4 singular values turn negative" in caplog.text
        close(cos_sim(update, turned), 0.3)
        close(dir_sim(update, turned), 0.5)  # (3 - 1) / 4

    def test_an_adapter_of_rank_one_is_refused(self) -> None:
        with pytest.raises(InputError, match="has one value"):
            perturb_energy(cases.lora_updates([1], 9, 8)[0], 0.9)


class TestDirections:
    @both_forms
    @both_dtypes
    @pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
    def test_turns_the_directions_alone(self, form: str, dtype: torch.dtype, p: float) -> None:
        update = FORMS[form](cases.lora_updates([5], 30, 20, dtype=dtype)[0])
        turned = perturb_directions(update, p, rank=5)
        assert type(turned) is type(update)
        assert (turned.shape, turned.dtype) == (update.shape, dtype)
        close(dir_sim(update, turned, rank=5), p, ROUND_OFF[dtype] * 10)
        close(cos_sim(update, turned), p, ROUND_OFF[dtype])
        close(truncated_svd(turned, 5).S.double(), truncated_svd(update, 5).S.double(), ROUND_OFF[dtype])

    @pytest.mark.parametrize(("m", "n", "rank"), [(2, 2, 1), (2, 7, 1), (8, 6, 3), (40, 40, 20)])
    @pytest.mark.parametrize("seed", range(4))
    def test_as_many_components_as_there_is_room_for(self, m: int, n: int, rank: int, seed: int) -> None:
        (update,) = cases.full_updates(1, m, n)
        turned = perturb_directions(update, 0.3, rank=rank, seed=seed)
        close(dir_sim(cases.truncated(update, rank), turned), 0.3)

    def test_random_columns_near_the_basis_are_made_orthogonal_to_it_all_the_same(self) -> None:
        basis = cases.orthonormal(2, 1, 5)
        columns = torch.cat([_complement(basis, seed=s, key="", task=0, stream=0) for s in range(400)], 1)
        assert (basis.T @ columns).abs().max() < 1e-15

    @both_forms
    def test_fewer_components_than_columns(self, form: str) -> None:
        (thin,) = cases.lora_updates([2], 12, 9)
        mix = cases.normal(2, 6, seed=3)
        wide = LowRank(thin.left @ mix, torch.linalg.pinv(mix) @ thin.right)  # rank 2 of 6
        turned = perturb_directions(FORMS[form](wide), 0.4)
        close(dir_sim(thin, turned), 0.4)
        assert cases.error(turned, perturb_directions(thin, 0.4)) < 1e-11

    def test_forms_agree(self) -> None:
        (update,) = cases.lora_updates([4], 20, 16)
        assert cases.error(perturb_directions(update.dense(), 0.6, rank=4), perturb_directions(update, 0.6)) < 1e-11

    def test_signs_of_the_factors_do_not_matter(self) -> None:
        (update,) = cases.lora_updates([4], 20, 16)
        flipped = LowRank(update.left * -1, update.right * -1)
        assert cases.error(perturb_directions(flipped, 0.6), perturb_directions(update, 0.6)) < 1e-11

    def test_the_directions_depend_on_the_arguments_alone(self, backend: str) -> None:
        (update,) = cases.lora_updates([3], 20, 16)
        before = torch.random.get_rng_state()
        turned = perturb_directions(update, 0.5, seed=1, key="a", task=2)
        torch.manual_seed(99)
        assert torch.equal(perturb_directions(update, 0.5, seed=1, key="a", task=2).dense(), turned.dense())
        torch.random.set_rng_state(before)
        for other in ({"seed": 2}, {"key": "b"}, {"task": 3}):
            assert (
                cases.error(perturb_directions(update, 0.5, **{"seed": 1, "key": "a", "task": 2, **other}), turned)
                > 0.3
            )

    def test_no_direction_is_more_likely_than_another(self) -> None:
        update = LowRank(torch.eye(3, 1, dtype=torch.float64), torch.eye(1, 3, dtype=torch.float64))
        drawn = torch.stack([truncated_svd(perturb_directions(update, 0.0, seed=s), 1).U[:, 0] for s in range(600)])
        close(drawn[:, 0], torch.zeros(600))
        angle = torch.atan2(drawn[:, 1], drawn[:, 2])  # uniform but for the sign of the singular vector
        for wave in (2 * angle, 4 * angle):
            for mean in (wave.cos().mean(), wave.sin().mean()):
                assert abs(float(mean)) < 4 * (0.5 / 600) ** 0.5

    def test_sides_are_turned_independently(self) -> None:
        update = LowRank(torch.eye(12, 2, dtype=torch.float64), torch.eye(2, 12, dtype=torch.float64))
        turned = perturb_directions(update, 0.0).dense()
        assert cases.error(turned, turned.T) > 0.5


class TestBatches:
    def test_each_matrix_reaches_the_measure(self) -> None:
        updates = [cases.lora_updates([3], 12, 10, seed=s)[0] for s in range(4)]
        batch = LowRank(*(torch.stack([getattr(u, x) for u in updates]).reshape(2, 2, *getattr(updates[0], x).shape)
                          for x in ("left", "right")))  # fmt: skip
        for form in FORMS.values():
            turned = perturb_directions(form(batch), 0.35, rank=3)
            close(dir_sim(batch, turned, rank=3), torch.full((2, 2), 0.35, dtype=torch.float64))
            close(
                cos_sim(batch, perturb_energy(form(batch), 0.95, rank=3)), torch.full((2, 2), 0.95, dtype=torch.float64)
            )

    def test_matrices_have_directions_of_their_own(self) -> None:
        (update,) = cases.lora_updates([3], 12, 10)
        batch = LowRank(*(x.expand(2, *x.shape) for x in (update.left, update.right)))
        first, second = perturb_directions(batch, 0.2).dense()
        assert cases.error(first, perturb_directions(update, 0.2)) < 1e-12
        assert cases.error(first, second) > 0.3

    def test_ranks_that_differ(self) -> None:
        (a, b) = cases.lora_updates([3, 1], 12, 10)
        turned = perturb_directions(torch.stack([a.dense(), b.dense()]), 0.25)
        close(dir_sim(torch.stack([a.dense(), b.dense()]), turned), [0.25, 0.25])


class TestDegenerate:
    @both_forms
    def test_zero_updates(self, form: str) -> None:
        zero = FORMS[form](cases.lora_updates([0], 6, 5)[0])
        assert cases.dense(perturb_directions(zero, 0.5)).count_nonzero() == 0
        assert cases.dense(perturb_energy(zero, 1.0)).count_nonzero() == 0
        with pytest.raises(InputError, match="or none"):
            perturb_energy(zero, 0.9)

    @pytest.mark.parametrize("perturb", [perturb_energy, perturb_directions])
    def test_half_precision_gives_float32(self, perturb: Callable[..., Update]) -> None:
        update = cases.lora_updates([3], 12, 10)[0].to(torch.bfloat16)
        turned = perturb(update, 0.95)
        assert turned.dtype == torch.float32
        close(cos_sim(update, turned), 0.95, 1e-6)

    @pytest.mark.parametrize("perturb", [perturb_energy, perturb_directions])
    def test_refused(self, perturb: Callable[..., Update]) -> None:
        name = perturb.__name__
        for p in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"must lie in 0 \.\. 1"):
                perturb(SPECTRUM.diag(), p)
        with pytest.raises(ValueError, match=r"rank must lie in 1 \.\. 4"):
            perturb(SPECTRUM.diag(), 0.5, rank=5)
        with pytest.raises(InputError, match=rf"{name}: an update of shape \(4, 4\) holds 16 NaN"):
            perturb(SPECTRUM.diag() / 0 * 0, 0.5)
        with pytest.raises(TypeError, match=rf"{name}: needs a floating update"):
            perturb(SPECTRUM.diag().long(), 0.5)
        with pytest.raises(TypeError, match=rf"{name}: needs a floating update"):
            perturb(SPECTRUM, 0.5)

    def test_too_many_directions_to_turn(self) -> None:
        with pytest.raises(InputError, match=r"4 components of a 4 x 4 matrix .* pass rank=2 or less"):
            perturb_directions(SPECTRUM.diag(), 0.5)
        with pytest.raises(InputError, match=r"1 components of a 1 x 5 matrix .* leave such updates out"):
            perturb_directions(torch.ones(1, 5), 0.5)
        assert cases.error(perturb_directions(SPECTRUM.diag(), 1.0), SPECTRUM.diag()) < 1e-14

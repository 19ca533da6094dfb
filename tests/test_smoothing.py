"""Energy smoothing of singular values."""

from __future__ import annotations

import cases
import pytest
import torch

from dcmerge_ext import smooth_energy

KINDS = [
    {"kind": "none"},
    {"kind": "average"},
    {"kind": "linear", "rho": 5.0},
    {"kind": "linear", "rho": 1.5},
    {"kind": "interpolate", "tau": 0.3},
]
S = torch.stack([cases.power_law(8, e) * 3 for e in (0.1, 1.0, 3.0)])  # (3, 8)


@pytest.mark.parametrize("options", KINDS)
def test_energy_is_preserved(options: dict) -> None:
    torch.testing.assert_close(smooth_energy(S, **options).sum(-1), S.sum(-1))


@pytest.mark.parametrize("options", KINDS)
def test_smoothed_values_still_descend_and_are_no_steeper(options: dict) -> None:
    smoothed = smooth_energy(S, **options)
    assert (smoothed.diff(dim=-1) <= 1e-12).all()
    assert (smoothed[..., 0] / smoothed[..., -1] <= S[..., 0] / S[..., -1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("options", KINDS)
def test_zeros_are_null_components_and_take_no_part(options: dict) -> None:
    padded = torch.cat([S, torch.zeros(3, 4, dtype=S.dtype)], dim=-1)
    torch.testing.assert_close(smooth_energy(padded, **options)[..., :8], smooth_energy(S, **options))
    assert (smooth_energy(padded, **options)[..., 8:] == 0).all()


@pytest.mark.parametrize("options", KINDS)
def test_a_batch_with_different_ranks_equals_the_loop(options: dict) -> None:
    batch = S.clone()
    batch[0, 3:] = 0
    batch[1] = 0
    looped = torch.stack([smooth_energy(row, **options) for row in batch])
    torch.testing.assert_close(smooth_energy(batch, **options), looped)
    assert (looped[1] == 0).all()


@pytest.mark.parametrize("options", KINDS)
def test_scale_of_the_spectrum_carries_over(options: dict) -> None:
    torch.testing.assert_close(
        smooth_energy(1e-20 * S, **options), 1e-20 * smooth_energy(S, **options), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("options", KINDS)
def test_one_value_stays(options: dict) -> None:
    one = torch.tensor([3.0])
    assert smooth_energy(one, **options).item() == pytest.approx(3.0)


@pytest.mark.parametrize("options", KINDS)
def test_dtype_is_kept(options: dict) -> None:
    assert smooth_energy(S.float(), **options).dtype == torch.float32


@pytest.mark.parametrize("options", KINDS)
def test_no_values_at_all_stay_none(options: dict) -> None:
    assert smooth_energy(torch.zeros(3, 0), **options).shape == (3, 0)


def test_linear_with_rho_one_is_average() -> None:
    torch.testing.assert_close(smooth_energy(S, "linear", rho=1.0), smooth_energy(S, "average"))


def test_linear_falls_in_equal_steps_by_at_most_rho() -> None:
    smoothed = smooth_energy(S, "linear", rho=4.0)
    torch.testing.assert_close(smoothed.diff(n=2, dim=-1), torch.zeros(3, 6, dtype=S.dtype), rtol=0, atol=1e-12)
    ratio = (S[:, 0] / S[:, -1]).clamp(max=4.0)
    torch.testing.assert_close(smoothed[:, 0] / smoothed[:, -1], ratio)


def test_interpolate_runs_from_average_to_none() -> None:
    torch.testing.assert_close(smooth_energy(S, "interpolate", tau=0.0), smooth_energy(S, "average"))
    torch.testing.assert_close(smooth_energy(S, "interpolate", tau=1.0), S)
    halfway = (smooth_energy(S, "average") + S) / 2
    torch.testing.assert_close(smooth_energy(S, "interpolate", tau=0.5), halfway)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "avg"}, r"kind must be none, average, linear or interpolate, got 'avg'"),
        ({"kind": "linear", "rho": 0.9}, r"needs rho >= 1 .* got rho=0.9"),
        ({"kind": "interpolate", "tau": -0.1}, r"0 <= tau <= 1, got .*tau=-0.1"),
        ({"kind": "interpolate", "tau": 1.1}, r"tau=1.1"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smooth_energy(S, **options)

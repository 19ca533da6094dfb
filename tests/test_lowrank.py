"""Updates kept as two factors."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch

from dcmerge_ext import LowRank
from dcmerge_ext.lowrank import concatenate

A = cases.normal(3, 8, seed=1, dtype=torch.float32)  # (r, in)
B = cases.normal(5, 3, seed=2, dtype=torch.float32)  # (out, r)


def test_is_the_product_of_its_factors() -> None:
    u = LowRank(B, A)
    torch.testing.assert_close(u.dense(), B @ A)
    assert u.shape == (5, 8)
    assert (u.rank, u.dtype, u.device.type) == (3, torch.float32, "cpu")
    assert "shape=(5, 8), rank=3" in repr(u)


def test_leading_dimensions_batch() -> None:
    u = LowRank(torch.ones(2, 4, 5, 3), torch.ones(2, 4, 3, 8))
    assert u.shape == (2, 4, 5, 8)
    assert u.dense().shape == u.shape


def test_rank_zero_is_the_zero_matrix() -> None:
    u = LowRank(torch.ones(5, 0), torch.ones(0, 8))
    assert u.rank == 0
    assert torch.equal(u.dense(), torch.zeros(5, 8))
    assert LowRank.from_lora(torch.ones(0, 8), torch.ones(5, 0), alpha=16).rank == 0


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LowRank(B, A).left = B  # type: ignore[misc]


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(None, False, 1.0), (12, False, 4.0), (12, True, 12 / 3**0.5), (3, False, 1.0)]
)
def test_from_lora_folds_the_scale_of_the_adapter_in(alpha: float | None, rslora: bool, scale: float) -> None:
    torch.testing.assert_close(LowRank.from_lora(A, B, alpha, rslora).dense(), scale * (B @ A))


def test_from_lora_keeps_the_factors_where_the_scale_is_one() -> None:
    u = LowRank.from_lora(A, B, alpha=3)
    assert u.left is B
    assert u.right is A


def test_a_scalar_multiplies_from_both_sides_and_touches_the_smaller_factor() -> None:
    u = LowRank(B, A)
    torch.testing.assert_close((0.3 * u).dense(), 0.3 * u.dense())
    torch.testing.assert_close((u * -2).dense(), -2 * u.dense())
    assert (u * 0.3).right is A
    assert (LowRank(A.T, B.T) * 0.3).left.data_ptr() == A.data_ptr()


def test_transpose() -> None:
    assert torch.equal(LowRank(B, A).mT.dense(), LowRank(B, A).dense().T)


def test_to_moves_both_factors() -> None:
    u = LowRank(B, A).to(torch.float64)
    assert (u.left.dtype, u.right.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_multiplied_in_float32(dtype: torch.dtype) -> None:
    u = LowRank(B.to(dtype), A.to(dtype))
    assert torch.equal(u.dense(), (B.to(dtype).float() @ A.to(dtype).float()).to(dtype))
    scaled = u * (1 / 3)  # not a number of half precision
    torch.testing.assert_close(scaled.dense(), (B.to(dtype).float() @ A.to(dtype).float()) / 3)


def test_concatenation_is_the_sum_of_the_updates() -> None:
    parts = cases.lora_updates([2, 0, 3], 5, 8)
    total = concatenate(parts)
    assert total.rank == 5
    torch.testing.assert_close(total.dense(), sum(p.dense() for p in parts))


@pytest.mark.parametrize(
    ("left", "right", "exception", "message"),
    [
        (torch.ones(5, 3), torch.ones(4, 8), ValueError, r"got \(5, 3\) and \(4, 8\)"),
        (torch.ones(5), torch.ones(5, 8), ValueError, r"needs left \(\.\.\., m, r\)"),
        (torch.ones(2, 5, 3), torch.ones(3, 8), ValueError, r"got \(2, 5, 3\) and \(3, 8\)"),
        (torch.ones(5, 3), torch.ones(3, 8).double(), TypeError, r"torch.float32 and torch.float64"),
        (torch.ones(5, 3).long(), torch.ones(3, 8).long(), TypeError, r"one floating dtype"),
        (torch.ones(5, 3), torch.ones(3, 8, device="meta"), ValueError, r"lie on cpu and meta"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    left: torch.Tensor, right: torch.Tensor, exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        LowRank(left, right)

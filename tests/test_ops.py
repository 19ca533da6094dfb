"""The operations on every backend, against oracles in plain Python and numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcmerge_ext import ops, use_backend
from dcmerge_ext.backends import available

BACKENDS = [name for name in ("reference", "cpu") if available(name)]
DTYPES = [torch.float32, torch.float64]
HALF = [torch.float16, torch.bfloat16]
COMPUTED_IN = {torch.float64: torch.float64} | dict.fromkeys([torch.float32, *HALF], torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def on_each_backend(call: Callable[[], Tensor]) -> Tensor:
    """The result, after checking that every backend returns the same bits."""
    results = []
    for name in BACKENDS:
        with use_backend(name):
            results.append(call())
    assert all(same_bits(results[0], r) for r in results[1:])
    return results[0]


# --- kth_magnitude ---------------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, 2.0**-149, -(2.0**-149), 2.0**-126, -(2.0**127), 0.5, -0.5]


@st.composite
def rows_and_counts(draw: st.DrawFn, width: int) -> tuple[list[list[float]], list[int]]:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    value = st.one_of(st.sampled_from(SPECIAL), st.floats(width=width, allow_nan=False, allow_infinity=False))
    x = draw(st.lists(st.lists(value, min_size=length, max_size=length), min_size=rows, max_size=rows))
    counts = draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows))
    return x, counts


def kth_by_sorting(x: Tensor, counts: Sequence[int]) -> list[float]:
    return [sorted((abs(v) for v in row), reverse=True)[k - 1] for row, k in zip(x.tolist(), counts, strict=True)]


def values_from(data: bytes, length: int, patterns: int, shift: int, near: bool, dtype: torch.dtype) -> Tensor:
    """Finite values from drawn bytes, two for each: drawing floats one by one takes most of a test's time.

    The first ``patterns`` of them are bit patterns that lack the leading ``shift`` bits - from 12 all denormal - or, if
    ``near``, share these bits; the others are of a few that tie.
    """
    seeds = np.frombuffer(data, dtype=np.uint16, count=length)
    bits, info = np.dtype(f"u{dtype.itemsize}").type, torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    palette = np.array([*SPECIAL, least, -3 * least, info.smallest_normal - least, info.max, info.min], info.dtype)
    ties = palette[seeds % len(palette)]
    spread = seeds * bits(0x9E3779B97F4A7C15 % 2**info.bits)  # an odd factor: two bytes decide every bit
    pattern = ((spread >> bits(shift)) ^ (spread[0] * bits(near))).view(palette.dtype)
    chosen = (np.arange(length) < patterns) & np.isfinite(pattern)
    return torch.from_numpy(np.where(chosen, pattern, ties))


class TestKthMagnitude:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=10_000, deadline=None)
    @given(
        st.binary(min_size=80, max_size=80),
        st.integers(1, 40),
        st.integers(0, 40),
        st.integers(0, 28),
        st.booleans(),
    )
    def test_every_rank_equals_sorting(
        self, dtype: torch.dtype, data: bytes, length: int, patterns: int, shift: int, near: bool
    ) -> None:
        x = values_from(data, length, patterns, shift, near, dtype)
        found = on_each_backend(lambda: ops.kth_magnitude(x.expand(length, -1), torch.arange(length) + 1))
        assert found.numpy().tobytes() == np.sort(x.abs().numpy())[::-1].tobytes()

    @settings(max_examples=300)
    @given(rows_and_counts(32))
    def test_float32_equals_sorting(self, drawn: tuple[list[list[float]], list[int]]) -> None:
        x, counts = torch.tensor(drawn[0], dtype=torch.float32), drawn[1]
        found = on_each_backend(lambda: ops.kth_magnitude(x, torch.tensor(counts)))
        assert found.tolist() == kth_by_sorting(x, counts)

    @settings(max_examples=300)
    @given(rows_and_counts(64))
    def test_float64_equals_sorting(self, drawn: tuple[list[list[float]], list[int]]) -> None:
        x, counts = torch.tensor(drawn[0], dtype=torch.float64), drawn[1]
        found = on_each_backend(lambda: ops.kth_magnitude(x, torch.tensor(counts)))
        assert found.tolist() == kth_by_sorting(x, counts)

    @settings(max_examples=100)
    @given(rows_and_counts(16), st.sampled_from(HALF))
    def test_half_precision_equals_sorting(
        self, drawn: tuple[list[list[float]], list[int]], dtype: torch.dtype
    ) -> None:
        x, counts = torch.tensor(drawn[0]).clamp(-60_000, 60_000).to(dtype), drawn[1]
        found = on_each_backend(lambda: ops.kth_magnitude(x, torch.tensor(counts)))
        assert found.dtype == dtype
        assert found.tolist() == kth_by_sorting(x, counts)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_long_rows_that_cross_the_slices_of_the_threads(
        self, dtype: torch.dtype, threads: int, restore_threads: None
    ) -> None:
        torch.set_num_threads(threads)
        x = cases.normal(2, 210_001, seed=3, dtype=dtype)
        x[1] = (x[1] * 3).round() / 3  # long runs of ties
        descending = x.abs().sort(dim=-1, descending=True).values
        for k in (1, 2, 1_000, 105_000, 210_000, 210_001):
            found = on_each_backend(lambda k=k: ops.kth_magnitude(x, k))
            assert torch.equal(found, descending[:, k - 1])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_more_rows_than_threads(self, dtype: torch.dtype) -> None:
        x = cases.normal(37, 11, seed=4, dtype=dtype)
        counts = torch.arange(37) % 11 + 1
        found = on_each_backend(lambda: ops.kth_magnitude(x, counts))
        assert found.tolist() == kth_by_sorting(x, counts.tolist())

    def test_leading_dimensions_and_strided_views(self, backend: str) -> None:
        x = cases.normal(5, 3, 4, seed=5).permute(2, 1, 0)[:, ::2]
        counts = torch.tensor([[1, 2], [3, 4], [5, 1], [2, 3]])
        found = ops.kth_magnitude(x, counts)
        assert found.shape == (4, 2)
        assert found.flatten().tolist() == kth_by_sorting(x.reshape(8, 5), counts.flatten().tolist())

    def test_a_single_vector_gives_a_scalar(self, backend: str) -> None:
        assert ops.kth_magnitude(torch.tensor([3.0, -5.0, 4.0]), 2).item() == 4.0

    def test_the_input_is_left_alone(self, backend: str) -> None:
        x = torch.tensor([[3.0, -5.0, 4.0]])
        ops.kth_magnitude(x, 1)
        assert x.tolist() == [[3.0, -5.0, 4.0]]


# --- magnitude_histogram ---------------------------------------------------------------------------------------------

DIGITS = {torch.float32: [(15, 16), (0, 15)], torch.float64: [(47, 16), (31, 16), (15, 16), (0, 15)]}


def streamed_kth_magnitude(pieces: Sequence[Tensor], k: int, dtype: torch.dtype) -> float:
    """Radix selection over pieces that are seen one at a time, one digit of the bit pattern per pass."""
    prefix = 0
    for shift, width in DIGITS[dtype]:
        histogram = torch.zeros(1 << width, dtype=torch.int64)
        for piece in pieces:
            ops.magnitude_histogram(piece, histogram, shift=shift, width=width, prefix=prefix)
        at_least = np.cumsum(histogram.numpy()[::-1])[::-1]  # keys whose digit is this one or a larger one
        digit = int(np.flatnonzero(at_least >= k)[-1])
        k -= int(at_least[digit] - histogram[digit])
        prefix = prefix << width | digit
    return np.array(prefix, dtype=f"u{dtype.itemsize}").view(f"f{dtype.itemsize}").item()


class TestMagnitudeHistogram:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [1, 17, 3_000, 4_321])
    def test_streamed_selection_equals_kth_magnitude(self, dtype: torch.dtype, k: int, backend: str) -> None:
        x = cases.normal(4_321, seed=6, dtype=dtype)
        x[::7] = 0.25
        x[::11] = 0
        pieces = [x[:5], x[5:2_000], x[2_000:2_000], x[2_000:]]
        assert streamed_kth_magnitude(pieces, k, dtype) == ops.kth_magnitude(x, k).item()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("digit", [(0, 1), (3, 16), (15, 16), (20, 11)])
    def test_counts_the_digit_of_the_bit_pattern(
        self, dtype: torch.dtype, digit: tuple[int, int], backend: str
    ) -> None:
        shift, width = digit
        x = cases.normal(500, seed=7, dtype=dtype)
        key = x.abs().numpy().view(f"u{dtype.itemsize}").astype(np.uint64)
        prefix = int(key[3]) >> (shift + width)
        chosen = key[key >> np.uint64(shift + width) == prefix]
        digits = ((chosen >> np.uint64(shift)) & np.uint64((1 << width) - 1)).astype(np.int64)
        out = torch.zeros(1 << width, dtype=torch.int64)
        ops.magnitude_histogram(x, out, shift=shift, width=width, prefix=prefix)
        assert out.tolist() == np.bincount(digits, minlength=1 << width).tolist()

    def test_adds_to_what_is_there(self, backend: str) -> None:
        out = torch.full((1 << 16,), 2, dtype=torch.int64)
        ops.magnitude_histogram(torch.zeros(3, 4).T, out, shift=15, width=16)
        assert out[0] == 14
        assert (out[1:] == 2).all()

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_long_input_gives_the_same_counts_for_any_threads(self, threads: int, restore_threads: None) -> None:
        torch.set_num_threads(threads)
        x = cases.normal(200_003, seed=8, dtype=torch.float32)

        def count() -> Tensor:
            out = torch.zeros(1 << 16, dtype=torch.int64)
            ops.magnitude_histogram(x, out, shift=15, width=16)
            return out

        found = on_each_backend(count)
        key = x.abs().numpy().view(np.uint32) >> 15
        assert found.tolist() == np.bincount(key, minlength=1 << 16).tolist()


# --- elect -----------------------------------------------------------------------------------------------------------


def elect_oracle(
    stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, reduce: str
) -> np.ndarray:
    """One (T, rows, cols) stack in numpy, tasks added in order."""
    tasks = [x.copy() for x in stack.numpy()]
    if thresholds is not None:
        for x, limit in zip(tasks, thresholds.numpy(), strict=True):
            x[np.abs(x) < limit] = 0
    total = np.zeros_like(tasks[0])
    for x in tasks:
        total = total + x
    positive = (total > 0) | ((total == 0) & (zero_sum > 0))
    negative = (total < 0) | ((total == 0) & (zero_sum < 0))
    merged, votes = np.zeros_like(total), np.zeros_like(total)
    for x in tasks:
        selected = (positive & (x > 0)) | (negative & (x < 0))
        merged = merged + np.where(selected, x, 0)
        votes = votes + selected
    if reduce == "mean":
        merged = merged / np.maximum(votes, 1).astype(merged.dtype)
    if blocks is not None:
        block = np.repeat(np.arange(len(blocks)), blocks)
        merged[block[:, None] != block[None, :]] = 0
    return merged


def random_stack(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Values in steps of 1/4, so that sums cancel exactly and magnitudes tie; every fifth is not rounded."""
    x = cases.normal(*shape, seed=seed)
    return torch.where(cases.normal(*shape, seed=seed + 1) < 0.8, (4 * x).round() / 4, x).to(dtype)


class TestElect:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduce", ["mean", "sum"])
    @pytest.mark.parametrize("zero_sum", [-1, 0, 1])
    @pytest.mark.parametrize("blocks", [None, [23], [7, 0, 10, 1, 5], [0, 11, 12, 0], [1] * 23])
    @pytest.mark.parametrize("trimmed", [False, True])
    def test_equals_the_oracle(
        self, dtype: torch.dtype, reduce: str, zero_sum: int, blocks: list[int] | None, trimmed: bool
    ) -> None:
        stack = random_stack(3, 4, 23, 23, seed=9, dtype=dtype)
        thresholds = (
            torch.tensor([[0, 0.25, 0.5, 1], [1, 1, 1, 1], [2, 0.75, 9, 0.3]], dtype=dtype) if trimmed else None
        )
        found = on_each_backend(lambda: ops.elect(stack, thresholds, blocks=blocks, zero_sum=zero_sum, reduce=reduce))
        for b in range(3):
            expected = elect_oracle(stack[b], None if thresholds is None else thresholds[b], blocks, zero_sum, reduce)
            assert np.array_equal(found[b].numpy(), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 511), (5, 1, 512), (5, 1, 513), (2, 3, 1_700), (17, 41, 43)])
    def test_lengths_around_one_run_of_the_kernel(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        stack = random_stack(*shape, seed=10, dtype=dtype)
        thresholds = torch.linspace(0, 1, shape[0], dtype=dtype)
        found = on_each_backend(lambda: ops.elect(stack, thresholds, zero_sum=1))
        assert np.array_equal(found.numpy(), elect_oracle(stack, thresholds, None, 1, "mean"))

    def test_blocks_longer_than_one_run(self) -> None:
        stack = random_stack(2, 1_200, 1_200, seed=11, dtype=torch.float32)
        blocks = [1_100, 30, 70]
        found = on_each_backend(lambda: ops.elect(stack, blocks=blocks))
        assert np.array_equal(found.numpy(), elect_oracle(stack, None, blocks, 0, "mean"))

    def test_many_tasks_are_added_in_order(self) -> None:
        stack = cases.normal(40, 9, 31, seed=12, dtype=torch.float32) * 10.0 ** torch.arange(-20, 20)[:, None, None]
        found = on_each_backend(lambda: ops.elect(stack, reduce="sum"))
        assert np.array_equal(found.numpy(), elect_oracle(stack, None, None, 0, "sum"))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tiny_and_huge_values(self, dtype: torch.dtype) -> None:
        info = torch.finfo(dtype)
        values = [0.0, -0.0, info.smallest_normal / 8, -info.smallest_normal / 8, 1e-30, -1e-30, info.max / 4, -1.0]
        stack = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 3).T[:, None].contiguous()
        for zero_sum in (-1, 0, 1):
            found = on_each_backend(lambda z=zero_sum: ops.elect(stack, zero_sum=z))
            assert np.array_equal(found.numpy(), elect_oracle(stack, None, None, zero_sum, "mean"))

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision_is_merged_in_float32(self, dtype: torch.dtype, backend: str) -> None:
        stack = cases.normal(3, 5, 7, seed=13).to(dtype)
        thresholds = torch.tensor([0.1, 0.5, 0.2])
        assert torch.equal(ops.elect(stack, thresholds), ops.elect(stack.float(), thresholds).to(dtype))

    def test_strided_views_and_leading_dimensions(self, backend: str) -> None:
        stack = random_stack(7, 6, 3, 2, 2, seed=14, dtype=torch.float64).permute(4, 3, 2, 1, 0)  # (2, 2, 3, 6, 7)
        thresholds = cases.normal(3, 2, 2, seed=15).abs().permute(2, 1, 0)
        found = ops.elect(stack, thresholds)
        assert found.shape == (2, 2, 6, 7)
        for i in range(2):
            for j in range(2):
                assert np.array_equal(
                    found[i, j].numpy(), elect_oracle(stack[i, j].contiguous(), thresholds[i, j], None, 0, "mean")
                )

    def test_the_same_bits_for_any_number_of_threads(self, backend: str, restore_threads: None) -> None:
        stack = random_stack(2, 5, 90, 90, seed=16, dtype=torch.float32)
        thresholds = torch.full((2, 5), 0.5)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.elect(stack, thresholds, blocks=[40, 50]))
        assert same_bits(results[0], results[1])
        assert same_bits(results[0], results[2])

    def test_a_single_task_is_only_trimmed_and_masked(self, backend: str) -> None:
        x = torch.tensor([[[1.0, -2.0], [3.0, -0.5]]])
        assert ops.elect(x, torch.tensor([1.0])).tolist() == [[1.0, -2.0], [3.0, 0.0]]
        assert ops.elect(x, blocks=[1, 1]).tolist() == [[1.0, 0.0], [0.0, -0.5]]

    def test_the_input_is_left_alone(self, backend: str) -> None:
        stack = random_stack(3, 4, 4, seed=17, dtype=torch.float32)
        before = stack.clone()
        ops.elect(stack, torch.ones(3), blocks=[2, 2])
        assert torch.equal(stack, before)


# --- orthonormalize --------------------------------------------------------------------------------------------------

ROUND_OFF = {torch.float32: 1e-6, torch.float64: 1e-11}
"""Largest error of an entry of a basis or a projector, for blocks that are far from dependent."""


class TestOrthonormalize:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 3), (5, 17), (8, 300), (15, 33), (16, 64), (17, 65)])
    def test_the_rows_are_orthonormal_and_span_what_qr_does(
        self, dtype: torch.dtype, shape: tuple[int, int], backend: str
    ) -> None:
        rows = cases.normal(*shape, seed=25, dtype=dtype)
        basis = ops.orthonormalize(rows)
        assert basis is not None
        assert (basis.dtype, basis.shape) == (dtype, shape)
        wide, Q = basis.double(), torch.linalg.qr(rows.double().mT).Q
        assert (wide @ wide.mT - torch.eye(shape[0])).abs().max() < ROUND_OFF[dtype]
        assert (wide.mT @ wide - Q @ Q.mT).abs().max() < ROUND_OFF[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_basis_is_contiguous(self, dtype: torch.dtype, backend: str) -> None:
        basis = ops.orthonormalize(cases.normal(5, 17, seed=25, dtype=dtype))
        assert basis is not None
        assert basis.is_contiguous()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_each_row_is_one_of_the_basis_plus_those_before_it(self, dtype: torch.dtype, backend: str) -> None:
        rows = cases.normal(16, 70, seed=26, dtype=dtype)
        basis = ops.orthonormalize(rows)
        assert basis is not None
        L = rows.double() @ basis.double().mT
        assert L.triu(1).abs().max() < 100 * ROUND_OFF[dtype]
        assert (L.diagonal() > 0).all()
        assert (L.tril() @ basis.double() - rows).abs().max() < 100 * ROUND_OFF[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_the_scale_of_the_rows_does_not_matter(self, dtype: torch.dtype, scale: float, backend: str) -> None:
        rows = cases.normal(7, 90, seed=27, dtype=dtype)
        basis, scaled = ops.orthonormalize(rows), ops.orthonormalize(rows * scale)
        assert basis is not None
        assert scaled is not None
        assert (basis - scaled).abs().max() < ROUND_OFF[dtype]

    def test_rows_of_very_different_lengths(self, backend: str) -> None:
        rows = cases.normal(6, 90, seed=28, dtype=torch.float32)
        basis = ops.orthonormalize(rows)
        scaled = ops.orthonormalize(rows * 10.0 ** torch.tensor([-12, 9, 0, -5, 12, 3])[:, None])
        assert basis is not None
        assert scaled is not None
        assert (basis - scaled).abs().max() < 1e-6

    def test_nearly_dependent_rows_of_float32_come_out_orthonormal_to_its_round_off(self, backend: str) -> None:
        rows = cases.normal(16, 768, seed=29)
        rows[1] = rows[0] + 1e-4 * rows[1]  # float32's QR loses four digits of these
        basis = ops.orthonormalize(rows.float(), worst_pivot=1e-5)
        assert basis is not None
        wide = basis.double()
        assert (wide @ wide.mT - torch.eye(16)).abs().max() < torch.finfo(torch.float32).eps

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "dependent",
        [
            lambda rows: rows[[0, 1, 0]],
            lambda rows: torch.cat([rows, rows[:1] - 2 * rows[1:2]]),
            lambda rows: torch.cat([torch.zeros_like(rows[:1]), rows]),
            lambda rows: torch.cat([rows, torch.zeros_like(rows[:1])]),
            torch.zeros_like,
            lambda rows: rows[:, :3],
            lambda rows: rows[:, :0],
        ],
        ids=["repeated", "combined", "zero first", "zero last", "all zero", "more than columns", "no columns"],
    )
    def test_dependent_rows_give_none(
        self, dtype: torch.dtype, dependent: Callable[[Tensor], Tensor], backend: str
    ) -> None:
        rows = dependent(cases.normal(4, 60, seed=30, dtype=dtype))
        assert ops.orthonormalize(rows, worst_pivot=1e-6) is None

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_worst_pivot_counts_as_dependent(self, dtype: torch.dtype, backend: str) -> None:
        rows = torch.tensor([[0, 4, 0], [2.0**-8, 0, 0], [0, 0, 1]], dtype=dtype)  # L is diagonal: 4, 2**-8, 1
        assert ops.orthonormalize(rows, worst_pivot=2.0**-10) is None
        basis = ops.orthonormalize(rows, worst_pivot=0.999 * 2.0**-10)
        assert basis is not None
        assert basis.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_squares_out_of_range_give_none(self, size: float, backend: str) -> None:
        assert ops.orthonormalize(size * torch.eye(2, 3, dtype=torch.float64)) is None

    @pytest.mark.parametrize("length", [0, 5])
    def test_no_rows_have_an_empty_basis(self, length: int, backend: str) -> None:
        basis = ops.orthonormalize(torch.zeros(0, length))
        assert basis is not None
        assert basis.shape == (0, length)

    @pytest.mark.parametrize(
        "view",
        [lambda x: x[:, ::2], lambda x: x[::3], lambda x: x[:, :20].mT[:9], lambda x: x[:, 7:60], lambda x: x[1:2]],
        ids=["every second column", "every third row", "transposed", "some columns", "one row"],
    )
    def test_strided_views(self, view: Callable[[Tensor], Tensor], backend: str) -> None:
        rows = view(cases.normal(12, 80, seed=31, dtype=torch.float32))
        before = rows.clone()
        found, expected = (
            ops.orthonormalize(rows),
            ops.orthonormalize(rows.clone(memory_format=torch.contiguous_format)),
        )
        assert found is not None
        assert expected is not None
        assert found.is_contiguous()
        assert torch.equal(found, expected)
        assert torch.equal(rows, before)


# --- gram_apply ------------------------------------------------------------------------------------------------------


def applied(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(image, back); the image is NaN before the call."""
    image = x.new_full((len(x), len(a)), torch.nan)
    back = ops.gram_apply(x, a, image)
    return image, back


class TestGramApply:
    @pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 17])
    @pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (47, 33), (384, 48), (385, 49), (1_000, 101)])
    def test_equals_products_in_float64(self, count: int, size: tuple[int, int], backend: str) -> None:
        m, n = size
        x, a = cases.normal(count, n, seed=32, dtype=torch.float32), cases.normal(m, n, seed=33, dtype=torch.float32)
        image, back = applied(x, a)
        assert (back.dtype, back.shape, back.is_contiguous()) == (torch.float32, (count, n), True)
        eps = torch.finfo(torch.float32).eps
        scale = x.double().norm(dim=1)[:, None] * a.double().norm(dim=1)
        assert ((image - x.double() @ a.double().mT).abs() <= eps * n**0.5 * scale).all()
        scale = image.double().norm(dim=1)[:, None] * a.double().norm(dim=0)
        assert ((back - image.double() @ a.double()).abs() <= eps * m**0.5 * scale).all()

    @pytest.mark.parametrize("count", range(1, 18))
    def test_whole_numbers_are_exact(self, count: int, backend: str) -> None:
        x, a = (cases.normal(rows, 77, seed=34).mul(2).round().float() for rows in (count, 440))
        image, back = applied(x, a)
        assert torch.equal(image.double(), x.double() @ a.double().mT)
        assert torch.equal(back.double(), image.double() @ a.double())

    @pytest.mark.parametrize("empty", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 3), (4, 0, 0), (0, 5, 0), (0, 0, 0)])
    def test_empty_sizes_give_zeros(self, empty: tuple[int, int, int], backend: str) -> None:
        count, m, n = empty
        image, back = applied(torch.ones(count, n), torch.ones(m, n))
        assert torch.equal(image, torch.zeros(count, m))
        assert torch.equal(back, torch.zeros(count, n))

    def test_an_entry_that_is_not_finite_stays_in_its_row(self, backend: str) -> None:
        x = torch.ones(9, 40)
        x[3, 7] = torch.nan
        image, back = applied(x, torch.ones(50, 40))
        others = torch.arange(9) != 3
        assert image[3].isnan().all()
        assert back[3].isnan().all()
        assert (image[others] == 40).all()
        assert (back[others] == 2_000).all()

    def test_the_operands_are_left_alone(self, backend: str) -> None:
        x, a = cases.normal(5, 30, seed=35, dtype=torch.float32), cases.normal(60, 30, seed=36, dtype=torch.float32)
        before = x.clone(), a.clone()
        applied(x, a)
        assert torch.equal(x, before[0])
        assert torch.equal(a, before[1])

    @pytest.mark.parametrize("m", [100, 384, 385, 1_500])
    def test_one_and_two_threads_return_the_same_bytes(self, m: int, restore_threads: None) -> None:
        x, a = cases.normal(17, 101, seed=37, dtype=torch.float32), cases.normal(m, 101, seed=38, dtype=torch.float32)
        with use_backend("cpu"):
            torch.set_num_threads(1)
            alone = applied(x, a)
            torch.set_num_threads(2)
            for _ in range(3):
                assert all(same_bits(one, two) for one, two in zip(alone, applied(x, a), strict=True))


# --- project ---------------------------------------------------------------------------------------------------------


def projection_inputs(
    ranks: Sequence[int], *batch: int, seed: int = 41, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """left, right, s"""
    k = sum(ranks)
    left, right = (cases.normal(*batch, k, k, seed=seed + i, dtype=dtype) for i in range(2))
    return left, right, cases.normal(*batch, k, seed=seed + 2, dtype=dtype).abs()


def cores(left: Tensor, right: Tensor, s: Tensor, ranks: Sequence[int]) -> Tensor:
    """(..., T, k, k) in float64"""
    columns = zip(*(x.double().split(list(ranks), dim=-1) for x in (left, s, right)), strict=True)
    return torch.stack([u * values[..., None, :] @ v.mT for u, values, v in columns], dim=-3)


class TestProject:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("ranks", "sizes", "batch"),
        [
            ([1], [1], ()),
            ([3], [3], (2,)),
            ([5, 1, 3], [5, 1, 3], ()),
            ([5, 0, 3], [4, 4], (3, 2)),
            ([16] * 8, [16] * 8, ()),
            ([31, 33], [64], ()),
            ([2] * 70, [2] * 70, ()),
            ([400, 390], [400, 390], ()),  # above the order that the native core takes itself
        ],
    )
    def test_equals_the_cores_in_float64(
        self, ranks: list[int], sizes: list[int], batch: tuple[int, ...], dtype: torch.dtype, backend: str
    ) -> None:
        left, right, s = projection_inputs(ranks, *batch, dtype=dtype)
        k = sum(ranks)
        counts = torch.arange(len(ranks)).add(1).mul(k).clamp(max=k * k).expand(*batch, -1)
        blocks, thresholds, largest = ops.project(left, right, s, ranks=ranks, counts=counts, sizes=sizes)
        expected = cores(left, right, s, ranks)
        tolerance = 4 * torch.finfo(dtype).eps * max(ranks) ** 0.5 * expected.abs().amax()
        ends = np.cumsum(sizes)
        kept = [expected[..., e - z : e, e - z : e].flatten(-2) for e, z in zip(ends, sizes, strict=True)]
        assert blocks.dtype == thresholds.dtype == largest.dtype == dtype
        assert blocks.shape == (*batch, len(ranks), sum(z * z for z in sizes))
        assert (blocks - torch.cat(kept, dim=-1)).abs().amax() <= tolerance
        magnitudes = expected.abs().flatten(-2).sort(dim=-1, descending=True).values
        assert (largest - magnitudes[..., 0]).abs().amax() <= tolerance
        assert (thresholds - magnitudes.gather(-1, counts[..., None] - 1)[..., 0]).abs().amax() <= tolerance

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_thresholds_and_largest_are_magnitudes_of_the_blocks_themselves(
        self, dtype: torch.dtype, backend: str
    ) -> None:
        ranks = [9, 24]
        left, right, s = projection_inputs(ranks, dtype=dtype)
        counts = torch.tensor([7, 33 * 33])
        blocks, thresholds, largest = ops.project(left, right, s, ranks=ranks, counts=counts, sizes=[33])
        assert torch.equal(thresholds, ops.kth_magnitude(blocks, counts))
        assert torch.equal(largest, ops.kth_magnitude(blocks, 1))

    def test_a_matrix_gives_the_same_bytes_in_any_batch(self, backend: str) -> None:
        ranks = [6, 11, 4]
        left, right, s = projection_inputs(ranks, 3)
        counts = torch.tensor([[1, 50, 441], [3, 3, 3], [20, 10, 5]])
        together = ops.project(left, right, s, ranks=ranks, counts=counts, sizes=ranks)
        for i in range(3):
            alone = ops.project(left[i], right[i], s[i], ranks=ranks, counts=counts[i], sizes=ranks)
            assert all(same_bits(one, many[i]) for one, many in zip(alone, together, strict=True))

    def test_strided_input_is_read_as_it_is(self, backend: str) -> None:
        ranks = [3, 4]
        left, right, s = projection_inputs(ranks)
        counts = torch.tensor([4, 9])
        wide = torch.stack([s, s], dim=-1)[..., 0]
        views = (left.mT.contiguous().mT, right[:, :].mT.contiguous().mT, wide)
        found = ops.project(*views, ranks=ranks, counts=counts, sizes=ranks)
        expected = ops.project(left, right, s, ranks=ranks, counts=counts, sizes=ranks)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))

    def test_null_components_give_zeros(self, backend: str) -> None:
        ranks = [2, 3]
        left, right, s = projection_inputs(ranks)
        blocks, thresholds, largest = ops.project(
            left, right, 0 * s, ranks=ranks, counts=torch.tensor([1, 25]), sizes=ranks
        )
        assert (blocks == 0).all()
        assert (thresholds == 0).all()
        assert (largest == 0).all()


# --- every operation -------------------------------------------------------------------------------------------------


def degenerate_stacks(dtype: torch.dtype) -> dict[str, Tensor]:
    """Stacks (..., T, rows, cols) that break careless code, all finite."""
    info = torch.finfo(dtype)
    x = cases.normal(3, 4, 6, seed=18)
    outlier = x.clone()
    outlier[1, 2, 3] = -info.max
    stacks = {
        "flat": torch.full((3, 4, 6), -0.5),
        "one task repeated": x[:1].expand(3, -1, -1),
        "tasks that cancel": torch.stack([x[0], -x[0], 0 * x[0]]),
        "zero": torch.zeros(3, 4, 6),
        "negative zero": -torch.zeros(3, 4, 6),
        "one outlier": outlier,
        "times 1e-30": 1e-30 * x,
        "times 1e30": (1e30 * x).clamp(info.min / 4, info.max / 4),
        "denormal": info.smallest_normal / 8 * x.clamp(-4, 4),
        "every second column": cases.normal(3, 4, 12, seed=19)[..., ::2],
        "transposed": cases.normal(3, 6, 4, seed=20).mT,
        "tasks innermost": cases.normal(2, 4, 6, 3, seed=21).movedim(-1, -3),
        "one task": x[:1],
        "one row": cases.normal(3, 1, 1_030, seed=22),
        "one column": cases.normal(3, 1_030, 1, seed=23),
        "one element": x[:, :1, :1],
        "no rows": x[:, :0],
        "no columns": x[..., :0],
        "empty batch": torch.zeros(0, 3, 4, 6),
        "empty batch of empty matrices": torch.zeros(0, 3, 0, 6),
    }
    cast = {name: stack.to(dtype) for name, stack in stacks.items()}  # keeps the strides
    assert all(stack.isfinite().all() for stack in cast.values())
    return cast


@pytest.mark.parametrize("name", degenerate_stacks(torch.float32))
class TestDegenerateInput:
    @pytest.mark.parametrize("dtype", DTYPES + HALF)
    def test_kth_magnitude(self, dtype: torch.dtype, name: str) -> None:
        x = degenerate_stacks(dtype)[name]
        for k in {1, x.shape[-1] // 2 + 1, x.shape[-1]} - {0} if x.shape[-1] else ():
            found = on_each_backend(lambda k=k: ops.kth_magnitude(x, k))
            assert same_bits(found, x.abs().sort(dim=-1, descending=True).values[..., k - 1])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_magnitude_histogram(self, dtype: torch.dtype, name: str) -> None:
        x = degenerate_stacks(dtype)[name]
        shift = 8 * dtype.itemsize - 17

        def count() -> Tensor:
            out = torch.zeros(1 << 16, dtype=torch.int64)
            ops.magnitude_histogram(x, out, shift=shift, width=16)
            return out

        keys = x.abs().contiguous().numpy().view(f"u{dtype.itemsize}").reshape(-1) >> shift
        assert on_each_backend(count).tolist() == np.bincount(keys.astype(np.int64), minlength=1 << 16).tolist()

    @pytest.mark.parametrize("dtype", DTYPES + HALF)
    @pytest.mark.parametrize("trimmed", [False, True])
    def test_elect(self, dtype: torch.dtype, trimmed: bool, name: str) -> None:
        stack = degenerate_stacks(dtype)[name]
        *leading, tasks, rows, cols = stack.shape
        flat = stack.reshape(*leading, tasks, rows * cols)
        thresholds = ops.kth_magnitude(flat, rows * cols // 2 + 1) if trimmed and rows * cols else None
        found = on_each_backend(lambda: ops.elect(stack, thresholds, zero_sum=1))
        assert found.shape == (*leading, rows, cols)
        for index in np.ndindex(*leading):
            limits = None if thresholds is None else thresholds[index].to(COMPUTED_IN[dtype])
            expected = elect_oracle(stack[index].to(COMPUTED_IN[dtype]), limits, None, 1, "mean")
            assert same_bits(found[index], torch.from_numpy(expected).to(dtype))


LONG = cases.normal(3, 1, 300_017, seed=24, dtype=torch.float32)


def projected_blocks(ranks: list[int]) -> Tensor:
    left, right, s = projection_inputs(ranks, 2, dtype=torch.float32)
    counts = torch.full((2, len(ranks)), 16)
    blocks, thresholds, largest = ops.project(left, right, s, ranks=ranks, counts=counts, sizes=ranks)
    return torch.cat([blocks.flatten(), thresholds.flatten(), largest.flatten()])


def histogram_of(x: Tensor) -> Tensor:
    out = torch.zeros(1 << 16, dtype=torch.int64)
    ops.magnitude_histogram(x, out, shift=15, width=16)
    return out


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.kth_magnitude(LONG, 30_000),
        lambda: ops.kth_magnitude(LONG, 300),
        lambda: ops.kth_magnitude(LONG.flatten(), 900),
        lambda: ops.kth_magnitude(LONG.flatten(), 30_000),
        lambda: ops.kth_magnitude(LONG.flatten()[:300_000].reshape(3_000, 100), 10),
        lambda: histogram_of(LONG),
        lambda: ops.elect(LONG, torch.tensor([0.5, 1, 0.1])),
        lambda: ops.elect(LONG.double().flatten()[:900_000].reshape(1, 4, 15, 15_000), zero_sum=1, reduce="sum"),
        lambda: ops.elect(LONG.flatten()[:800_000].reshape(5, 400, 400), blocks=[100, 3, 297]),
        lambda: projected_blocks([16] * 8),
        lambda: ops.rademacher(1_001, 301, seed=1),
        lambda: ops.rademacher(1_001, 301, seed=1, dtype=torch.float64),
    ],
)
def test_one_and_two_threads_return_the_same_bytes(
    call: Callable[[], Tensor], backend: str, restore_threads: None
) -> None:
    torch.set_num_threads(1)
    alone = call()
    torch.set_num_threads(2)
    assert all(same_bits(call(), alone) for _ in range(3))


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.ones(2, 5)
STACK = torch.ones(2, 3, 4, 4)
BINS = torch.zeros(1 << 16, dtype=torch.int64)
A, IMAGE = torch.ones(3, 5), torch.ones(2, 3)
GRAM_APPLY = (
    r"gram_apply: needs contiguous float32 x \(count, n\), a \(m, n\) and image \(count, m\) on one device, got "
)

K = torch.ones(4, 4)
TWO = torch.tensor([2, 2])


def project(
    left: Tensor = K, s: Tensor = K[0], ranks: Sequence[int] = (2, 2), counts: Tensor = TWO, sizes: Sequence[int] = (4,)
) -> object:
    return ops.project(left, K, s, ranks=ranks, counts=counts, sizes=sizes)


BAD_CALLS = [
    (lambda: project(K[:3]), ValueError, r"project: needs left and right .* got \(3, 4\), \(4, 4\), \(4,\)"),
    (lambda: project(K[0]), ValueError, r"got \(4,\), \(4, 4\), \(4,\)"),
    (lambda: project(s=K[0, :3]), ValueError, r"got \(4, 4\), \(4, 4\), \(3,\)"),
    (lambda: project(K.double()), ValueError, r"project: needs one dtype, .*got torch.float64, torch.float32"),
    (lambda: project(ranks=(2, 1)), ValueError, r"project: ranks .* add up to k = 4, got \[2, 1\]"),
    (lambda: project(sizes=(5, -1)), ValueError, r"project: sizes must not be negative .*got \[5, -1\]"),
    (lambda: project(counts=TWO[:1]), ValueError, r"project: counts must be int64 \(2,\), got torch.int64 \(1,\)"),
    (lambda: project(counts=TWO.int()), ValueError, r"got torch.int32 \(2,\)"),
    (lambda: project(counts=TWO * 0), ValueError, r"project: counts must lie in 1 \.\. 16, got 0 \.\. 0"),
    (lambda: project(counts=TWO * 9), ValueError, r"got 18 \.\. 18"),
    (lambda: ops.kth_magnitude(X, 0), ValueError, r"kth_magnitude: counts must lie in 1 \.\. 5, got 0 \.\. 0"),
    (lambda: ops.kth_magnitude(X, torch.tensor([2, 6])), ValueError, r"must lie in 1 \.\. 5, got 2 \.\. 6"),
    (lambda: ops.kth_magnitude(torch.ones(2, 0), 1), ValueError, r"N >= 1, got \(2, 0\)"),
    (lambda: ops.kth_magnitude(torch.tensor(1.0), 1), ValueError, r"N >= 1, got \(\)"),
    (lambda: ops.kth_magnitude(X.long(), 1), TypeError, r"kth_magnitude: needs a floating tensor, got torch.int64"),
    (lambda: ops.magnitude_histogram(X.half(), BINS, shift=0, width=16), TypeError, r"got torch.float16"),
    (lambda: ops.magnitude_histogram(X, BINS, shift=16, width=16), ValueError, r"shift 16 and width 16 .* 31 bits"),
    (lambda: ops.magnitude_histogram(X, BINS, shift=-1, width=16), ValueError, r"shift -1"),
    (lambda: ops.magnitude_histogram(X, BINS, shift=0, width=17), ValueError, r"width 17"),
    (lambda: ops.magnitude_histogram(X, BINS, shift=0, width=15), ValueError, r"int64 tensor of 32768 counts"),
    (lambda: ops.magnitude_histogram(X, BINS.float(), shift=0, width=16), ValueError, r"out must be"),
    (lambda: ops.elect(STACK.long()), TypeError, r"elect: needs a floating tensor, got torch.int64"),
    (lambda: ops.elect(torch.ones(4, 4)), ValueError, r"needs stack \(\.\.\., T, rows, cols\)"),
    (lambda: ops.elect(torch.ones(0, 4, 4)), ValueError, r"T >= 1, got \(0, 4, 4\)"),
    (lambda: ops.elect(STACK, torch.ones(3)), ValueError, r"thresholds must be \(2, 3\), got \(3,\)"),
    (lambda: ops.elect(STACK, blocks=[1, 2]), ValueError, r"blocks must be sizes adding up to 4 = 4, got \[1, 2\]"),
    (lambda: ops.elect(STACK, blocks=[-1, 5]), ValueError, r"blocks must be sizes"),
    (lambda: ops.elect(torch.ones(2, 3, 4), blocks=[3]), ValueError, r"adding up to 3 = 4"),
    (lambda: ops.elect(STACK, zero_sum=2), ValueError, r"zero_sum must be -1, 0 or 1 .* got 2"),
    (lambda: ops.elect(STACK, reduce="max"), ValueError, r"reduce 'mean' or 'sum', got 0, 'max'"),
    (lambda: ops.orthonormalize(X[0]), ValueError, r"orthonormalize: needs rows \(count, length\), got \(5,\)"),
    (lambda: ops.orthonormalize(X[None]), ValueError, r"got \(1, 2, 5\)"),
    (lambda: ops.orthonormalize(X.half()), TypeError, r"orthonormalize: needs float32 or float64, got torch.float16"),
    (lambda: ops.orthonormalize(X.long()), TypeError, r"got torch.int64"),
    (
        lambda: ops.gram_apply(X, A[:, :4].clone(), IMAGE),
        ValueError,
        GRAM_APPLY + r"\(2, 5\) .*, \(3, 4\) .*, \(2, 3\)",
    ),
    (lambda: ops.gram_apply(X, A, IMAGE.mT.contiguous()), ValueError, GRAM_APPLY + r".*, \(3, 2\) torch.float32"),
    (lambda: ops.gram_apply(X, A, IMAGE[0]), ValueError, GRAM_APPLY),
    (lambda: ops.gram_apply(X[0], A, IMAGE[0]), ValueError, GRAM_APPLY),
    (lambda: ops.gram_apply(X[None], A[None], IMAGE[None]), ValueError, GRAM_APPLY),
    (lambda: ops.gram_apply(torch.ones(2, 10)[:, ::2], A, IMAGE), ValueError, GRAM_APPLY),
    (lambda: ops.gram_apply(X, torch.ones(5, 3).mT, IMAGE), ValueError, GRAM_APPLY),
    (lambda: ops.gram_apply(X, A, torch.ones(3, 2).mT), ValueError, GRAM_APPLY),
    (lambda: ops.gram_apply(X.double(), A, IMAGE), ValueError, GRAM_APPLY + r"\(2, 5\) torch.float64"),
    (lambda: ops.gram_apply(X.double(), A.double(), IMAGE.double()), ValueError, GRAM_APPLY),
    (lambda: ops.gram_apply(X, A.bfloat16(), IMAGE), ValueError, GRAM_APPLY + r".*torch.bfloat16"),
    (lambda: ops.gram_apply(X, A, IMAGE.long()), ValueError, GRAM_APPLY + r".*torch.int64"),
]


@pytest.mark.parametrize(("call", "exception", "message"), BAD_CALLS)
def test_wrong_arguments_are_named(call: Callable[[], object], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        call()

"""The CUDA kernels on a real device: ``pytest -m cuda``. Skipped where there is none.

Every operation on every shape of the shared suite runs there by ``pytest --backend cuda_host`` on the host; these tests ask
what only a device can answer: its arithmetic, its streams, its graphs, its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, backends, ops, truncated_svd, use_backend
from dcmerge_ext.linalg import polar
from dcmerge_ext.methods import dc_merge, ties
from dcmerge_ext.smoothing import smooth_energy
from dcmerge_ext.svd.dense import svd

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = [torch.float32, torch.float64]
SIZES = [1, 31, 32, 33, 127, 128, 129, 1_000, 16_384, 16_385, 300_017]


@pytest.fixture(autouse=True)
def _cuda_kernels() -> Iterator[None]:
    """Forced: a build without kernels fails here, and does not pass on plain torch."""
    with use_backend("cuda"):
        yield


def on_cpu(call: Callable[[], Tensor]) -> Tensor:
    with use_backend("cpu"):
        return call()


def test_the_kernels_are_listed() -> None:
    assert backends()["cuda"].startswith("available: CUDA ")


class TestBitEquality:
    """With the CPU core, where the contract promises it."""

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("cols", SIZES)
    def test_random_signs(self, cols: int, dtype: torch.dtype) -> None:
        found = ops.rademacher(3, cols, seed=5, key="w", task=2, dtype=dtype, device="cuda")
        assert torch.equal(found.cpu(), on_cpu(lambda: ops.rademacher(3, cols, seed=5, key="w", task=2, dtype=dtype)))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", SIZES)
    @pytest.mark.parametrize("rows", [1, 7])
    def test_selection(self, rows: int, length: int, dtype: torch.dtype) -> None:
        x = cases.normal(rows, length, seed=1, dtype=dtype)
        for count in {1, (length + 1) // 2, length}:
            found = ops.kth_magnitude(x.cuda(), count)
            assert torch.equal(found.cpu(), on_cpu(lambda count=count: ops.kth_magnitude(x, count)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_histogram(self, dtype: torch.dtype) -> None:
        x = cases.normal(300_017, seed=2, dtype=dtype)
        shift = {torch.float32: 15, torch.float64: 47}[dtype]
        expected, found = (torch.zeros(1 << 16, dtype=torch.int64) for _ in range(2))
        with use_backend("cpu"):
            ops.magnitude_histogram(x, expected, shift=shift, width=16)
        ops.magnitude_histogram(x.cuda(), found, shift=shift, width=16)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("blocks", [None, [100, 3, 297], [1] * 400])
    def test_election(self, blocks: list[int] | None, dtype: torch.dtype) -> None:
        stack = cases.normal(2, 5, 400, 400, seed=3, dtype=dtype)
        limits = torch.full((2, 5), 0.5, dtype=dtype)
        found = ops.elect(stack.cuda(), limits.cuda(), blocks=blocks)
        assert torch.equal(found.cpu(), on_cpu(lambda: ops.elect(stack, limits, blocks=blocks)))

    def test_strided_views_are_read_as_they_are(self) -> None:
        stack = cases.normal(4, 60, 50, seed=4, dtype=torch.float32)
        found = ops.elect(stack.cuda().transpose(1, 2)[:, ::2], zero_sum=1)
        assert torch.equal(found.cpu(), on_cpu(lambda: ops.elect(stack.transpose(1, 2)[:, ::2], zero_sum=1)))


class TestAgainstFloat64:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("order", [1, 2, 16, 31, 33, 64, 100, 128, 200])
    def test_small_svd(self, order: int, dtype: torch.dtype) -> None:
        A = cases.normal(5, order, order, seed=order, dtype=dtype)
        U, S, Vh = (x.cpu().double() for x in svd(A.cuda()))
        eps = torch.finfo(dtype).eps
        scale = torch.linalg.matrix_norm(A.double(), 2)[:, None]
        assert ((S - torch.linalg.svdvals(A.double())).abs() <= 4 * order * eps * scale).all()
        assert ((U * S[:, None] @ Vh - A.double()).abs() <= 4 * order * eps * scale[..., None]).all()
        assert (U.mT @ U - torch.eye(order)).abs().max() <= 8 * order * eps

    @pytest.mark.parametrize("shape", [(768, 768), (900, 120), (300, 64), (40, 7)])
    def test_polar(self, shape: tuple[int, int]) -> None:
        X = cases.normal(*shape, seed=6, dtype=torch.float32)
        Q, H = (x.cpu().double() for x in polar(X.cuda()))
        _, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        assert (Q.mT @ Q - torch.eye(shape[1])).abs().max() < 1e-5
        assert cases.error(Q @ H, X.double()) < 1e-5
        assert cases.error(H, Vh.mT * S @ Vh) < 1e-5

    @pytest.mark.parametrize("kind", ["average", "linear", "interpolate"])
    def test_smoothing(self, kind: str) -> None:
        S = cases.normal(9, 40, seed=7).abs().sort(descending=True).values
        S[:, 30:] = 0
        assert torch.allclose(smooth_energy(S.cuda(), kind).cpu(), on_cpu(lambda: smooth_energy(S, kind)), rtol=1e-14)

    @pytest.mark.parametrize("accuracy", ["exact", "fast"])
    def test_truncated_svd(self, accuracy: str) -> None:
        A = cases.with_spectrum(400, 300, cases.power_law(300, 0.5), seed=8).float()
        U, S, Vh = (x.cpu() for x in truncated_svd(A.cuda(), 40, accuracy=accuracy))
        best = cases.truncated(A.double(), 40)
        assert cases.error(U * S @ Vh, best) < (1e-4 if accuracy == "exact" else 0.5)
        assert (U.mT @ U - torch.eye(40)).abs().max() < 1e-5

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_full_fine_tunes_merge_as_in_float64(self, dtype: torch.dtype) -> None:
        updates = cases.full_updates(4, 160, 130, dtype=dtype)
        found = dc_merge([u.cuda() for u in updates], aggregate="sum")
        expected = on_cpu(lambda: dc_merge([u.double() for u in updates], aggregate="sum"))
        assert found.is_cuda
        assert cases.error(found.cpu(), expected) < (1e-4 if dtype == torch.float32 else 1e-10)

    @pytest.mark.parametrize("ranks", [[8] * 4, [3, 8, 5], [40, 40]])
    def test_adapters_merge_as_in_float64(self, ranks: list[int]) -> None:
        updates = [u.to(torch.float32) for u in cases.lora_updates(ranks, 200, 150)]
        found = dc_merge([LowRank(u.left.cuda(), u.right.cuda()) for u in updates])
        assert isinstance(found, LowRank)
        expected = on_cpu(lambda: dc_merge([u.to(torch.float64) for u in updates]).dense())
        assert cases.error(found.dense().cpu(), expected) < 1e-5

    def test_ties_merges_to_the_same_bytes(self) -> None:
        updates = cases.full_updates(3, 90, 70, dtype=torch.float32)
        assert torch.equal(ties([u.cuda() for u in updates]).cpu(), on_cpu(lambda: ties(updates)))

    def test_updates_of_zero_stay_on_the_device(self) -> None:
        empty = LowRank(torch.zeros(20, 0, device="cuda"), torch.zeros(0, 16, device="cuda"))
        assert dc_merge([empty, empty]).dense().is_cuda


class TestDevice:
    STACK = cases.normal(3, 200, 200, seed=9, dtype=torch.float32)

    def work(self, stack: Tensor) -> Tensor:
        thresholds = ops.kth_magnitude(stack.flatten(1), 500)
        return ops.elect(stack, thresholds, blocks=[100, 100])

    def test_the_current_stream_is_used(self) -> None:
        expected = on_cpu(lambda: self.work(self.STACK))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            slow = torch.randn(4_000, 4_000, device="cuda")
            for _ in range(5):
                slow = slow @ slow * 1e-4  # whatever runs on another stream overtakes this
            stack = self.STACK.cuda(non_blocking=True) + 0 * slow[:200, :200].nan_to_num()
            found = self.work(stack)
        stream.synchronize()
        assert torch.equal(found.cpu(), expected)

    def test_the_device_of_the_tensor_is_used_whatever_is_current(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two devices")
        found = self.work(self.STACK.to("cuda:1"))
        assert found.device == torch.device("cuda:1")
        assert torch.equal(found.cpu(), on_cpu(lambda: self.work(self.STACK)))
        assert torch.cuda.current_device() == 0

    def test_operations_are_captured_in_a_graph_and_do_not_wait(self) -> None:
        stack = self.STACK.cuda()
        counts = torch.full((3,), 500, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.work(stack)  # warm: first launches load the module
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                thresholds = ops.kth_magnitude(stack.flatten(1), counts)
                merged = ops.elect(stack, thresholds, blocks=[100, 100])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        other = cases.normal(3, 200, 200, seed=10, dtype=torch.float32)
        stack.copy_(other)
        graph.replay()
        assert torch.equal(merged.cpu(), on_cpu(lambda: self.work(other)))

    def test_runs_repeat_to_the_bit(self) -> None:
        updates = [u.cuda() for u in cases.full_updates(4, 160, 130, dtype=torch.float32)]
        first = dc_merge(updates)
        assert all(torch.equal(dc_merge(updates), first) for _ in range(3))

    def test_a_launch_that_cannot_be_made_names_the_operation(self) -> None:
        import dcmerge_ext._cuda as kernels

        with pytest.raises((RuntimeError, ValueError), match="panel"):
            kernels.panel(0, 0, 0, 1, kernels.LARGEST_PANEL + 1, 0)

    def test_counts_beyond_the_range_are_clamped(self) -> None:
        x = self.STACK.flatten().cuda()
        for asked, clamped in ((0, 1), (10**9, x.numel())):
            found = ops.kth_magnitude(x, torch.tensor(asked, device="cuda"))
            assert torch.equal(found, ops.kth_magnitude(x, clamped))

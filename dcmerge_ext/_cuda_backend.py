"""The CUDA kernels as a backend. Products stay in torch; so does every size that a kernel does not take.

Every function takes what :mod:`dcmerge_ext.ops` has validated: contiguous float32 or float64 tensors on one device. Kernels
run on the tensors' device and torch's current stream there, nothing waits for them, and torch owns all memory: outputs and
workspaces. (A list of sizes is read before the call returns.) Where an answer decides what runs next
(:func:`CudaBackend.orthonormalize`), it is copied back, which waits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from dcmerge_ext import reference

_MOST_COLUMNS = {4: 26, 8: 21}
"""Columns per task, by element size, up to which the fused projection is predicted to beat a library product and a
selection that reads it again, on an H100 (csrc/cuda/project.cu has the formula)."""
_KINDS = {"average": 0, "linear": 1, "interpolate": 2}


class CudaBackend:
    """The kernels of one native module: ``dcmerge_ext._cuda``, or the same sources built to run on the host."""

    prefers_products = True

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._shared_bytes = functools.cache(self._ask_shared_bytes)

    def description(self) -> str:
        """Raises RuntimeError where no device can run the kernels."""
        found: str = self._module.description()
        return found

    def kth_magnitude(self, x: Tensor, counts: Tensor) -> Tensor:
        rows, length = x.shape
        out = x.new_empty(rows)
        workspace = self._bytes(self._module.kth_magnitude_workspace(rows, length, x.element_size()), x)
        with _stream_of(x) as stream:
            self._module.kth_magnitude(
                x.data_ptr(),
                counts.data_ptr(),
                out.data_ptr(),
                rows,
                length,
                x.element_size(),
                workspace.data_ptr(),
                stream,
            )
        return out

    def magnitude_histogram(self, x: Tensor, out: Tensor, shift: int, width: int, prefix: int) -> None:
        counts = out if out.device == x.device else torch.zeros_like(out, device=x.device)
        with _stream_of(x) as stream:
            self._module.magnitude_histogram(
                x.data_ptr(), counts.data_ptr(), x.numel(), shift, width, prefix, x.element_size(), stream
            )
        if counts is not out:
            out += counts.to(out.device)

    def elect(
        self, stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, mean: bool
    ) -> Tensor:
        batch, tasks, rows, cols = stack.shape
        out = stack.new_empty(batch, rows, cols)
        sizes = None if blocks is None else torch.tensor(blocks, dtype=torch.int64)
        with _stream_of(stack) as stream:
            self._module.elect(
                stack.data_ptr(),
                0 if thresholds is None else thresholds.data_ptr(),
                out.data_ptr(),
                batch,
                tasks,
                rows,
                cols,
                0 if sizes is None else sizes.data_ptr(),
                0 if sizes is None else sizes.numel(),
                zero_sum,
                mean,
                stack.element_size(),
                stream,
            )
        return out

    def project(
        self, left: Tensor, right: Tensor, s: Tensor, ranks: Sequence[int], counts: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, k, _ = left.shape
        fits = len(ranks) <= self._module.MOST_TASKS and len(sizes) <= self._module.MOST_BLOCKS
        if not fits or max(ranks) > _MOST_COLUMNS[left.element_size()]:
            return reference.project(left, right, s, ranks, counts, sizes, self.kth_magnitude)
        blocks, thresholds, largest = reference.project_outputs(left, counts, sizes)
        columns, rows = torch.tensor(ranks, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64)
        workspace = self._bytes(self._module.project_workspace(batch, len(ranks), left.element_size()), left)
        with _stream_of(left) as stream:
            self._module.project(
                left.data_ptr(),
                right.data_ptr(),
                s.data_ptr(),
                counts.data_ptr(),
                thresholds.data_ptr(),
                largest.data_ptr(),
                blocks.data_ptr(),
                batch,
                len(ranks),
                k,
                columns.data_ptr(),
                rows.data_ptr(),
                len(sizes),
                left.element_size(),
                workspace.data_ptr(),
                stream,
            )
        return blocks, thresholds, largest

    def rademacher(
        self, rows: int, cols: int, key: int, task: int, stream: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        out = torch.empty(rows, cols, dtype=dtype, device=device)
        with _stream_of(out) as queue:
            self._module.rademacher(out.data_ptr(), out.numel(), key, task, stream, out.element_size(), queue)
        return out

    def drop(self, values: Tensor, rate: float, key: int, task: int, stream: int, offset: int) -> Tensor:
        return reference.drop(values, rate, key, task, stream, offset)

    def orthonormalize(self, rows: Tensor, worst_pivot: float) -> Tensor | None:
        if not 0 < len(rows) <= self._module.LARGEST_PANEL:
            return reference.orthonormalize(rows, worst_pivot)
        wide = rows.double()
        gram = wide @ wide.mT
        inverse, pivots = torch.empty_like(gram), gram.new_empty(2)
        with _stream_of(rows) as stream:
            self._module.panel(gram.data_ptr(), inverse.data_ptr(), pivots.data_ptr(), 1, len(rows), stream)
        smallest, largest = pivots.tolist()
        return (inverse @ wide).to(rows.dtype) if smallest > worst_pivot * largest else None

    def gram(self, x: Tensor) -> Tensor:
        return reference.gram(x)

    def gram_apply(self, x: Tensor, a: Tensor, image: Tensor) -> Tensor:
        return reference.gram_apply(x, a, image)

    def svd(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *leading, m, n = A.shape
        limit = self._module.small_svd_limit(self._shared_bytes(A.device), A.element_size())
        if m != n or not 0 < n <= limit or A.dtype not in (torch.float32, torch.float64) or A.numel() == 0:
            return reference.svd(A)
        square = A.reshape(-1, n, n).contiguous()
        U, Vh, S = torch.empty_like(square), torch.empty_like(square), square.new_empty(len(square), n)
        sweeps = torch.empty(len(square), dtype=torch.int32, device=A.device)
        with _stream_of(A) as stream:
            self._module.small_svd(
                square.data_ptr(),
                U.data_ptr(),
                S.data_ptr(),
                Vh.data_ptr(),
                sweeps.data_ptr(),
                len(square),
                n,
                A.element_size(),
                stream,
            )
        S = S.masked_fill((sweeps < 0)[:, None], torch.nan)  # did not converge: callers look for what is not finite
        return U.reshape(A.shape), S.reshape(*leading, n), Vh.reshape(A.shape)

    def newton_schulz(self, X: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
        *_, m, n = X.shape
        limit = self._module.newton_schulz_limit(self._shared_bytes(X.device), X.element_size())
        if m != n or not 0 < n <= limit or len(coefficients) > self._module.MOST_STEPS or X.numel() == 0:
            return reference.newton_schulz(X, coefficients)
        square = X.reshape(-1, n, n).contiguous()
        out, steps = torch.empty_like(square), torch.tensor(coefficients, dtype=torch.float64)
        with _stream_of(X) as stream:
            self._module.newton_schulz(
                square.data_ptr(),
                out.data_ptr(),
                steps.data_ptr(),
                len(square),
                n,
                len(coefficients),
                X.element_size(),
                stream,
            )
        return out.reshape(X.shape)

    def smooth_energy(self, S: Tensor, kind: str, parameter: float) -> Tensor:
        rows = S.reshape(-1, S.shape[-1]).contiguous()
        out = torch.empty_like(rows)
        with _stream_of(S) as stream:
            self._module.smooth(
                rows.data_ptr(),
                out.data_ptr(),
                len(rows),
                S.shape[-1],
                _KINDS[kind],
                parameter,
                S.element_size(),
                stream,
            )
        return out.reshape(S.shape)

    def _bytes(self, count: int, like: Tensor) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=like.device)

    def _ask_shared_bytes(self, device: torch.device) -> int:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            found: int = self._module.shared_bytes()
        return found


@contextlib.contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int]:
    """The tensor's device made current, and torch's stream there. 0 for kernels that run on the host."""
    if tensor.device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream

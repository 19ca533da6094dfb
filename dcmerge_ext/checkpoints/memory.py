"""How much memory a merge takes, and how it is kept under a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dcmerge_ext.checkpoints.plan import PANEL_ELEMENTS, PASS_ELEMENTS, Plan, TensorPlan, survey_dtype
from dcmerge_ext.errors import InputError

SIDE_BY_SIDE_BYTES = 512 << 20
"""Memory of the tensors merged at the same time."""
_FIXED_BYTES = 48 << 20
"""What libraries keep of their own once several threads have worked: buffers of BLAS, arenas of malloc."""


def workers() -> int:
    """Tensors merged side by side: more would wait for memory, and each holds a share of a survey."""
    return min(torch.get_num_threads(), 16)


def peak_bytes(plan: Plan, tensor: TensorPlan) -> int:
    """Anonymous memory held while one tensor is merged."""
    if tensor.action == "copy" or tensor.method is None:
        return 0
    itemsize = survey_dtype([tensor]).itemsize
    if tensor.panelled:
        return min(PANEL_ELEMENTS, tensor.base.numel) * (plan.num_tasks + 4) * itemsize
    specs = tensor.specs
    if tensor.matrix_shape is not None:
        specs = tuple(spec._replace(shape=tensor.matrix_shape) for spec in specs)
    workspace = tensor.method.workspace(specs, plan.num_tasks)
    if tensor.in_passes:
        workspace += 7 * PASS_ELEMENTS  # an update and its rows of the concatenated bases, in float64; the merged panel
    return workspace * itemsize


def is_side_by_side(plan: Plan, tensor: TensorPlan) -> bool:
    """Whether a tensor is merged beside others, on its share of the threads. From headers and the number of threads."""
    return tensor.panelled or peak_bytes(plan, tensor) <= SIDE_BY_SIDE_BYTES // workers()


def plan_peak(plan: Plan) -> int:
    """Largest anonymous memory of a run without a bound, above the process before it."""
    beside = sorted((peak_bytes(plan, t) for t in plan.tensors if is_side_by_side(plan, t)), reverse=True)
    alone = max((peak_bytes(plan, t) for t in plan.tensors if not is_side_by_side(plan, t)), default=0)
    return max(sum(beside[: workers()]), alone) + _FIXED_BYTES


class MemoryBudget:
    """Admits work whose memory fits. What is admitted has no influence on how it is computed."""

    def __init__(self, limit: int | None = None) -> None:
        """``limit``: bytes that the process may hold in all, what it holds now included. None: no bound."""
        self._left = None if limit is None else limit - anonymous_bytes() - _FIXED_BYTES
        self._changed = threading.Condition()

    def check(self, plan: Plan) -> None:
        """
        Raises:
            InputError: a tensor that does not fit even alone, naming it and what it takes.
        """
        if self._left is None or not plan.tensors:
            return
        largest = max(plan.tensors, key=lambda t: peak_bytes(plan, t))
        if (needed := peak_bytes(plan, largest) - self._left) > 0:
            least = peak_bytes(plan, largest) + anonymous_bytes() + _FIXED_BYTES
            raise InputError(
                f"tensor {largest.name!r} ({largest.base.text}) takes about {peak_bytes(plan, largest) / 1e9:.2f} GB to merge, "
                f"{needed / 1e9:.2f} GB more than --max-memory leaves; give at least {least / 1e9:.2f}GB, or another method for "
                "this tensor (an override with task_arithmetic works in small panels)"
            )

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Wait until ``count`` bytes fit, and give them back at the end of the block."""
        if self._left is None:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._left is not None and self._left >= count)
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()


@contextmanager
def watched_memory() -> Iterator[Callable[[], int]]:
    """Yields what tells the largest anonymous memory seen since, looked at twenty times a second until the block ends."""
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, name="dcmerge-memory", daemon=True)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        watcher.join()


def anonymous_bytes() -> int:
    """Anonymous memory that the process holds; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)

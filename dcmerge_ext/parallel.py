"""Independent small problems side by side on the cores.

One factorization of a few hundred rows cannot keep several cores busy; several of them can. Each problem runs on its
share of torch's threads, so that ``torch.set_num_threads`` bounds the total and nothing is oversubscribed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

import torch

from dcmerge_ext.stages import WAIT, innermost, stage

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_pools: dict[int, ThreadPoolExecutor] = {}
"""By number of workers; kept, because the first LAPACK call of a new thread costs 2 ms."""
_here = threading.local()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def side_by_side(
    work: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    at_most: int | None = None,
    each: int | None = None,
) -> list[_Result]:
    """``[work(item) for item in items]``, as many at a time as torch has threads (and ``at_most``).

    The threads are divided evenly: a problem's share depends on their number and on the number of items, never on
    timing. ``each`` fixes the share, so that a problem gives the same bytes however many others there are (LAPACK's
    results depend on its number of threads). Each call runs in a copy of the caller's context, so a backend chosen by
    ``use_backend`` holds there too. Called from inside itself it runs in turn, on the share of the caller, whatever
    ``each`` says. The first error is raised once the problems already begun have ended; the others are not begun.
    """
    threads = torch.get_num_threads()
    workers = min(len(items), threads, threads if at_most is None else max(1, at_most))
    share = max(1, threads // max(workers, 1)) if each is None else each
    if getattr(_here, "is_worker", False) or (workers <= 1 and share == threads):
        return [work(item) for item in items]
    grad, within = torch.is_grad_enabled(), innermost()

    def run(item: _Item) -> _Result:
        _here.is_worker = True
        if torch.get_num_threads() != share:  # setting it costs more than asking
            torch.set_num_threads(share)
        with torch.set_grad_enabled(grad), stage(within):
            return work(item)

    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="dcmerge")
    futures = [_pools[workers].submit(copy_context().run, run, item) for item in items]
    try:
        with stage(WAIT):
            wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
        torch.set_num_threads(threads)  # threads started later inherit the last value set anywhere
    return [future.result() for future in futures]  # begun in order: an error comes before what was cancelled

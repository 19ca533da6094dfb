"""Small problems side by side: order, shares of the threads, errors, and what the threads inherit."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from dcmerge_ext import backends, ops, use_backend
from dcmerge_ext.backends import for_device
from dcmerge_ext.parallel import side_by_side

marker: contextvars.ContextVar[str] = contextvars.ContextVar("marker", default="none")


@pytest.fixture(autouse=True)
def _four_threads(restore_threads: None) -> None:
    torch.set_num_threads(4)


def share(_: object = None) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_results_come_in_order(threads: int, count: int) -> None:
    torch.set_num_threads(threads)

    def work(i: int) -> int:
        time.sleep(0.001 * (i % 3))
        return i * i

    assert side_by_side(work, range(count)) == [i * i for i in range(count)]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("threads", "count", "at_most", "expected"),
    [
        (1, 5, None, 1),
        (4, 1, None, 4),
        (4, 2, None, 2),
        (4, 3, None, 1),
        (4, 9, None, 1),
        (5, 2, None, 2),
        (8, 3, None, 2),
        (4, 9, 1, 4),
        (4, 9, 2, 2),
        (4, 9, 0, 4),
        (4, 2, 100, 2),
    ],
)
def test_the_threads_are_divided_evenly(threads: int, count: int, at_most: int | None, expected: int) -> None:
    torch.set_num_threads(threads)
    assert side_by_side(share, range(count), at_most=at_most) == [expected] * count
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("count", [0, 1, 2, 9])
@pytest.mark.parametrize("at_most", [None, 1, 2])
@pytest.mark.parametrize("each", [1, 2])
def test_a_fixed_share_is_that_of_every_problem(count: int, at_most: int | None, each: int) -> None:
    assert side_by_side(share, range(count), at_most=at_most, each=each) == [each] * count
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("at_most", "expected"), [(None, 4), (3, 3), (2, 2), (1, 1)])
def test_as_many_run_at_a_time_as_there_are_threads_and_no_more(at_most: int | None, expected: int) -> None:
    lock, running, most = threading.Lock(), 0, 0
    together = threading.Barrier(expected)

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(timeout=30)  # passes only when that many are inside
        with lock:
            running -= 1

    side_by_side(work, range(3 * expected), at_most=at_most)
    assert most == expected


def test_runs_on_the_calling_thread_where_one_worker_is_enough() -> None:
    here = threading.current_thread()
    assert side_by_side(lambda _: threading.current_thread(), range(3), at_most=1) == [here] * 3
    assert side_by_side(lambda _: threading.current_thread(), [1]) == [here]
    assert here not in side_by_side(lambda _: threading.current_thread(), range(3))


def test_a_call_from_inside_runs_in_turn_on_the_share_of_its_caller() -> None:
    def inner(_: int) -> tuple[int, threading.Thread]:
        return share(), threading.current_thread()

    def outer(_: int) -> bool:
        return side_by_side(inner, range(5)) == [(2, threading.current_thread())] * 5

    assert side_by_side(outer, range(2)) == [True, True]
    assert torch.get_num_threads() == 4


class TestErrors:
    def test_the_first_in_order_is_raised(self) -> None:
        later_failed = threading.Event()

        def work(i: int) -> None:
            if i == 0:
                later_failed.wait(30)
                raise ValueError("item 0")
            later_failed.set()
            raise KeyError(f"item {i}")

        with pytest.raises(ValueError, match="item 0"):
            side_by_side(work, range(4))
        assert torch.get_num_threads() == 4

    @pytest.mark.parametrize("threads", [1, 2, 4])
    def test_what_has_not_begun_is_not_begun(self, threads: int) -> None:
        torch.set_num_threads(threads)
        begun, failing = [], threading.Event()

        def work(i: int) -> None:
            begun.append(i)
            if i == 0:
                failing.set()
                raise ZeroDivisionError
            failing.wait(30)
            time.sleep(0.2)  # the caller needs a moment to see the error

        with pytest.raises(ZeroDivisionError):
            side_by_side(work, range(100))
        assert len(begun) <= 2 * threads

    def test_an_error_of_a_later_item_stops_the_rest_too(self) -> None:
        torch.set_num_threads(2)
        begun, failed = [], threading.Event()

        def work(i: int) -> None:
            begun.append(i)
            if i == 0:
                failed.wait(30)
                time.sleep(0.3)
            elif i == 1:
                failed.set()
                raise ZeroDivisionError
            else:
                time.sleep(0.01)

        with pytest.raises(ZeroDivisionError):
            side_by_side(work, range(100))
        assert len(begun) <= 6

    def test_those_begun_have_ended_when_it_is_raised(self) -> None:
        torch.set_num_threads(2)
        started, ended = threading.Event(), []

        def work(i: int) -> None:
            if i == 0:
                started.wait(30)
                raise ZeroDivisionError
            started.set()
            time.sleep(0.2)
            ended.append(i)

        with pytest.raises(ZeroDivisionError):
            side_by_side(work, range(2))
        assert ended == [1]

    def test_the_threads_work_on_after_an_error(self) -> None:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                side_by_side(lambda i: 1 // i, range(4))
            assert side_by_side(share, range(4)) == [1] * 4
            assert torch.get_num_threads() == 4

    def test_an_interrupt_passes_through(self) -> None:
        def work(i: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            side_by_side(work, range(4))
        assert torch.get_num_threads() == 4


class TestWhatTheThreadsInherit:
    def test_the_context_of_the_caller(self) -> None:
        token = marker.set("outer")
        try:
            assert side_by_side(lambda _: marker.get(), range(4)) == ["outer"] * 4
        finally:
            marker.reset(token)
        assert side_by_side(lambda _: marker.get(), range(4)) == ["none"] * 4

    def test_what_an_item_sets_stays_with_it(self) -> None:
        def work(i: int) -> str:
            before = marker.get()
            marker.set(str(i))
            return before

        assert side_by_side(work, range(8)) == ["none"] * 8
        assert marker.get() == "none"

    def test_the_backend(self) -> None:
        with use_backend("reference"):
            found = side_by_side(lambda _: for_device(torch.device("cpu")).__name__, range(4))
        assert found == ["dcmerge_ext.reference"] * 4

    @pytest.mark.parametrize("enabled", [True, False])
    def test_whether_gradients_are_recorded(self, enabled: bool) -> None:
        with torch.set_grad_enabled(enabled):
            assert side_by_side(lambda _: torch.is_grad_enabled(), range(4)) == [enabled] * 4
        assert side_by_side(lambda _: torch.is_grad_enabled(), range(4)) == [True] * 4

    def test_the_number_of_threads_of_now(self) -> None:
        for threads in (4, 2, 6, 4):
            torch.set_num_threads(threads)
            assert side_by_side(share, range(2)) == [threads // 2] * 2

    def test_two_callers_at_once(self) -> None:
        found = {}

        def caller(name: int) -> None:
            found[name] = side_by_side(lambda i: (name, i), range(20))

        callers = [threading.Thread(target=caller, args=(name,)) for name in range(4)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(60)
        assert found == {name: [(name, i) for i in range(20)] for name in range(4)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_works_in_a_child_process_after_the_parent_has_used_it() -> None:
    program = """
import os, sys, torch
from dcmerge_ext import truncated_svd
from dcmerge_ext.parallel import side_by_side

torch.set_num_threads(2)
assert side_by_side(lambda i: i * i, range(5)) == [0, 1, 4, 9, 16]
A = torch.randn(3, 6, 5, dtype=torch.float64)
expected = truncated_svd(A, 2).S
child = os.fork()
if child == 0:
    same = torch.equal(truncated_svd(A, 2).S, expected)
    os._exit(0 if same and side_by_side(lambda i: i * i, range(5)) == [0, 1, 4, 9, 16] else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_native_operations_run_side_by_side() -> None:
    x = torch.randn(6, 5_000, generator=torch.Generator().manual_seed(1))
    expected = [ops.kth_magnitude(row, 100) for row in x]
    assert side_by_side(lambda row: ops.kth_magnitude(row, 100), list(x)) == expected
    assert backends()["cpu"].endswith(", 4 threads")

"""Which implementation runs, and that a choice by name succeeds or raises."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType

import cases
import pytest
import torch

import dcmerge_ext
from dcmerge_ext import _native, backends, ops, reference, use_backend
from dcmerge_ext.backends import available, for_device
from dcmerge_ext.errors import BackendUnavailable
from dcmerge_ext.methods import dc_merge, ties

BACKENDS_MODULE = importlib.import_module("dcmerge_ext.backends")  # the package hides it behind the function
OPERATIONS = [
    name
    for name, member in vars(ops).items()
    if inspect.isfunction(member) and member.__module__ == ops.__name__ and not name.startswith("_")
]
MODULES: dict[str, ModuleType] = {"reference": reference, "cpu": _native}
STACK = torch.tensor([[[1.0, -2.0]], [[3.0, 4.0]]])
ROWS = STACK[:, 0]
CALLS: dict[str, Callable[[], object]] = {
    "kth_magnitude": lambda: ops.kth_magnitude(STACK, 1),
    "magnitude_histogram": lambda: ops.magnitude_histogram(
        STACK, torch.zeros(1 << 16, dtype=torch.int64), shift=15, width=16
    ),
    "elect": lambda: ops.elect(STACK),
    "project": lambda: ops.project(
        torch.eye(2), torch.eye(2), torch.ones(2), ranks=[1, 1], counts=torch.tensor([1, 1]), sizes=[1, 1]
    ),
    "rademacher": lambda: ops.rademacher(2, 3, seed=0),
    "orthonormalize": lambda: ops.orthonormalize(ROWS),
    "gram_apply": lambda: ops.gram_apply(ROWS, ROWS, torch.empty(2, 2)),
}


def call(operation: str) -> None:
    CALLS[operation]()


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCMERGE_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(backend, operation) of every call, in order."""
    calls: list[tuple[str, str]] = []

    def recording(backend: str, operation: str, original: Callable) -> Callable:
        def wrapped(*args: object) -> object:
            calls.append((backend, operation))
            return original(*args)

        return wrapped

    for backend, module in MODULES.items():
        for operation in OPERATIONS:
            monkeypatch.setattr(module, operation, recording(backend, operation, getattr(module, operation)))
    return calls


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_IMPORT_ERROR", "No module named '_cpu'; build it with: pip install .")
    monkeypatch.setattr(BACKENDS_MODULE, "_warned", set())


def test_each_operation_is_called_here_and_belongs_to_each_backend() -> None:
    assert list(CALLS) == OPERATIONS
    for module in MODULES.values():
        assert all(callable(getattr(module, operation)) for operation in OPERATIONS)


def test_the_native_core_is_built() -> None:
    assert backends()["cpu"].startswith("available: C++17")


def test_the_listing_says_what_each_is_or_why_it_is_absent() -> None:
    listing = backends()
    assert list(listing) == ["reference", "cpu", "cuda"]
    assert listing["reference"] == f"available: plain torch {torch.__version__}, any device"
    assert listing["cpu"].endswith(f", {torch.get_num_threads()} threads")
    assert listing["cuda"].startswith("unavailable: ")
    assert [available(name) for name in listing] == [True, True, False]


@pytest.mark.parametrize("operation", OPERATIONS)
class TestChoice:
    def test_cpu_tensors_run_natively_unless_told(self, operation: str, ran: list[tuple[str, str]]) -> None:
        call(operation)
        assert ran == [("cpu", operation)]

    @pytest.mark.parametrize("name", ["reference", "cpu"])
    def test_use_backend_forces(self, operation: str, name: str, ran: list[tuple[str, str]]) -> None:
        with use_backend(name):
            call(operation)
        assert ran == [(name, operation)]

    @pytest.mark.parametrize("name", ["reference", "cpu"])
    def test_the_environment_forces(
        self, operation: str, name: str, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DCMERGE_BACKEND", name)
        call(operation)
        assert ran == [(name, operation)]

    def test_use_backend_overrules_the_environment(
        self, operation: str, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DCMERGE_BACKEND", "cpu")
        with use_backend("reference"):
            call(operation)
        assert ran == [("reference", operation)]

    def test_an_empty_environment_variable_chooses_nothing(
        self, operation: str, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DCMERGE_BACKEND", "")
        call(operation)
        assert ran == [("cpu", operation)]

    def test_a_wrong_environment_variable_raises(self, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DCMERGE_BACKEND", "gpu")
        with pytest.raises(BackendUnavailable, match=r"backend 'gpu' does not exist; known: reference, cpu, cuda"):
            call(operation)


def test_methods_run_on_the_chosen_backend(ran: list[tuple[str, str]]) -> None:
    updates = cases.full_updates(8, 300, 260, dtype=torch.float32)  # ranks far below the sizes: block Krylov
    with use_backend("reference"):
        dc_merge(updates)
        ties(updates)
    assert {backend for backend, _ in ran} == {"reference"}
    assert {operation for _, operation in ran} == set(OPERATIONS) - {"kth_magnitude"}  # project selects by itself


def test_the_choice_ends_with_its_block(ran: list[tuple[str, str]]) -> None:
    with use_backend("reference"):
        with use_backend("cpu"):
            call("elect")
        call("elect")
    call("elect")
    assert [backend for backend, _ in ran] == ["cpu", "reference", "cpu"]


def test_the_choice_ends_with_an_error(ran: list[tuple[str, str]]) -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    call("elect")
    assert ran == [("cpu", "elect")]


def test_the_choice_holds_in_its_own_thread_only(ran: list[tuple[str, str]]) -> None:
    with use_backend("reference"):
        thread = threading.Thread(target=call, args=("elect",))
        thread.start()
        thread.join()
    assert ran == [("cpu", "elect")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", r"backend 'gpu' does not exist; known: reference, cpu, cuda"),
        ("cuda", r"backend 'cuda' is unavailable: "),
    ],
)
def test_what_cannot_run_raises_on_entry(name: str, message: str) -> None:
    entered = False
    with pytest.raises(BackendUnavailable, match=message), use_backend(name):
        entered = True
    assert not entered


def test_the_native_core_refuses_tensors_of_other_devices() -> None:
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match=r"'cpu' was chosen and the tensor lies on cuda:1"):
        for_device(torch.device("cuda:1"))


def test_other_devices_run_plain_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS_MODULE, "_warned", set())
    with pytest.warns(RuntimeWarning, match="no native kernels for xpu tensors") as caught:
        results = [for_device(torch.device("xpu", i)) for i in range(2)]
    assert results == [reference, reference]
    assert len(caught) == 1


class TestCuda:
    @pytest.fixture
    def without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A build without them, asked for the first time."""
        monkeypatch.setitem(sys.modules, "dcmerge_ext._cuda", None)
        monkeypatch.setattr(BACKENDS_MODULE, "_cuda", functools.cache(inspect.unwrap(BACKENDS_MODULE._cuda)))
        monkeypatch.setattr(BACKENDS_MODULE, "_warned", set())

    @pytest.mark.usefixtures("without_kernels")
    def test_its_tensors_run_plain_torch_with_one_warning_where_kernels_are_absent(self) -> None:
        with pytest.warns(RuntimeWarning, match=r"native cuda kernels are not available \(this build has no") as caught:
            results = [for_device(torch.device("cuda", i)) for i in range(2)]
        assert results == [reference, reference]
        assert len(caught) == 1

    @pytest.mark.usefixtures("without_kernels")
    def test_asking_for_absent_kernels_by_name_says_why(self) -> None:
        with pytest.raises(BackendUnavailable, match=r"this build has no CUDA kernels .*DCMERGE_CUDA=ON"):
            use_backend("cuda").__enter__()

    def test_without_a_device_it_is_listed_with_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels = ModuleType("dcmerge_ext._cuda")

        def description() -> str:
            raise RuntimeError("no CUDA device is visible")

        monkeypatch.setattr(kernels, "description", description, raising=False)
        monkeypatch.setitem(sys.modules, "dcmerge_ext._cuda", kernels)
        monkeypatch.setattr(dcmerge_ext, "_cuda", kernels, raising=False)
        monkeypatch.setattr(BACKENDS_MODULE, "_cuda", functools.cache(inspect.unwrap(BACKENDS_MODULE._cuda)))
        assert backends()["cuda"] == "unavailable: no CUDA device is visible"
        with pytest.raises(BackendUnavailable, match="backend 'cuda' is unavailable: no CUDA device is visible"):
            use_backend("cuda").__enter__()

    def test_the_compiled_kernels_import_without_a_driver(self) -> None:
        kernels = pytest.importorskip("dcmerge_ext._cuda", reason="built without CUDA")
        assert kernels.small_svd_limit(232448, 4) == 128
        assert kernels.newton_schulz_limit(65536, 4) >= 64
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match=r"driver|device"):
                kernels.description()


@pytest.mark.usefixtures("without_native")
class TestWithoutTheNativeModule:
    def test_plain_torch_runs_with_one_warning(self, ran: list[tuple[str, str]]) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for operation in OPERATIONS:
                call(operation)
        assert ran == [("reference", operation) for operation in OPERATIONS]
        assert [w.category for w in caught] == [RuntimeWarning]
        assert "the native cpu kernels are not available (No module named '_cpu'" in str(caught[0].message)

    def test_the_listing_says_why(self) -> None:
        assert backends()["cpu"] == "unavailable: No module named '_cpu'; build it with: pip install ."

    def test_asking_for_it_by_name_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with (
            pytest.raises(BackendUnavailable, match=r"'cpu' is unavailable: No module named '_cpu'"),
            use_backend("cpu"),
        ):
            pass
        monkeypatch.setenv("DCMERGE_BACKEND", "cpu")
        with pytest.raises(BackendUnavailable, match=r"'cpu' is unavailable: No module named '_cpu'"):
            call("elect")

    def test_asking_for_plain_torch_by_name_does_not_warn(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with use_backend("reference"):
                call("elect")


def test_a_tree_without_the_compiled_module_imports_and_merges() -> None:
    program = """
import sys, warnings
sys.modules["dcmerge_ext._cpu"] = None  # as if it had never been built
import torch, dcmerge_ext
assert dcmerge_ext.backends()["cpu"].startswith("unavailable: "), dcmerge_ext.backends()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    merged = dcmerge_ext.methods.dc_merge([torch.eye(3), torch.eye(3)])
assert merged.shape == (3, 3)
assert [w.category for w in caught] == [RuntimeWarning], caught
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The compiled kernels, without a GPU: nothing spills, loads and stores are as wide as promised, and registers and shared
memory are those of the committed table."""

from __future__ import annotations

import os
import re

import machine_code
import pytest
from machine_code import ARCHITECTURES

pytestmark = pytest.mark.skipif(bool(machine_code.missing()), reason=machine_code.missing())


@pytest.fixture(autouse=True)
def _every_architecture() -> None:
    built = sorted({kernel.architecture for kernel in machine_code.kernels()})
    if built != sorted(ARCHITECTURES) and "DCMERGE_ALL_ARCHITECTURES" not in os.environ:
        pytest.skip(f"built for {built}; these tests need the default architectures: unset CUDAARCHS and install again")


WIDE = {
    r"elect_matrices<float 4 .*": ("LDG", "STG"),
    r"elect_matrices<double 2 .*": ("LDG", "STG"),
    r"write_signs<.*": ("STG",),
    r"count_digits<.*": ("LDG",),
    r"select_short_rows<.*": ("LDG",),
    r"count_entries<.*": ("LDG",),
    r"write_blocks<.*": ("LDG",),  # rows of blocks begin anywhere: they are written in pieces
}
"""Kernels whose contract is to move 16 bytes an instruction, and what does."""


def test_every_kernel_is_there_for_every_architecture() -> None:
    names = {kernel.name for kernel in machine_code.kernels()}
    assert {(k.name, k.architecture) for k in machine_code.kernels()} == {(n, a) for n in names for a in ARCHITECTURES}
    for pattern in WIDE:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_nothing_is_spilled_and_nothing_lies_in_local_memory() -> None:
    assert [k for k in machine_code.kernels() if k.stack or k.local] == []
    for architecture in ARCHITECTURES:
        for name, code in machine_code.instructions(architecture).items():
            assert not re.search(r"\b(LDL|STL)\b", code), (name, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", WIDE)
def test_global_memory_is_moved_16_bytes_at_a_time(pattern: str, architecture: int) -> None:
    for name, code in machine_code.instructions(architecture).items():
        if re.fullmatch(pattern, name):
            for instruction in WIDE[pattern]:
                assert re.search(rf"\b{instruction}\.E\S*\.128", code), (name, architecture, instruction)


def test_registers_and_shared_memory_are_those_of_the_table() -> None:
    table = machine_code.TABLE.read_text()
    if f"nvcc {machine_code.compiler()})" not in table:
        pytest.skip(f"the table was made with another compiler: {table.splitlines()[0]}")
    assert machine_code.table() == table, "python tests/machine_code.py > tests/cuda_kernels.csv, and say why"

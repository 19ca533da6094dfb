"""What nvcc made of the kernels: registers, shared memory and instructions, read from the compiled module.

``python tests/machine_code.py`` prints the table that ``tests/cuda_kernels.csv`` keeps.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("cuda_kernels.csv")
ARCHITECTURES = (75, 80, 90, 100, 120)


class Kernel(NamedTuple):
    """Of one architecture."""

    name: str
    """with template arguments"""
    architecture: int
    registers: int
    """per thread"""
    shared: int
    """bytes per block, static"""
    stack: int
    local: int
    """bytes per thread: spilled, or indexed at run time"""


def missing() -> str:
    """Why nothing can be read here; empty where it can."""
    if importlib.util.find_spec("dcmerge_ext._cuda") is None:
        return "built without CUDA"
    if _cuobjdump() is None:
        return "cuobjdump is not installed (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
    return ""


def compiler() -> str:
    """Release of nvcc: what it allocates differs from one to the next."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\S+),", version)
    assert match
    return match[1]


@functools.cache
def kernels() -> list[Kernel]:
    found = []
    architecture, name = 0, ""
    for line in _demangled(_dump("--dump-resource-usage")).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s*Function (.*):$", line):
            name = _short(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Kernel(name, architecture, registers, shared, stack, local))
    return sorted(set(found))


@functools.cache
def instructions(architecture: int) -> dict[str, str]:
    """Kernel -> its machine code."""
    text = _demangled(_dump("-sass", "-arch", f"sm_{architecture}"))
    parts = re.split(r"^\s*Function : (.*)$", text, flags=re.MULTILINE)
    return {_short(name): code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def table() -> str:
    """One line a kernel and element type: registers for each architecture, then static shared memory (1 KiB more where the
    system reserves it)."""
    rows: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels():
        rows.setdefault(kernel.name, {})[kernel.architecture] = kernel
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [f"kernel (nvcc {compiler()})", *(f"registers sm_{a}" for a in ARCHITECTURES), "static shared bytes"]
    )
    for name, by_architecture in sorted(rows.items()):
        shared = {kernel.shared for kernel in by_architecture.values()}
        writer.writerow(
            [name, *(by_architecture[a].registers for a in ARCHITECTURES), "/".join(map(str, sorted(shared)))]
        )
    return out.getvalue()


def _short(demangled: str) -> str:
    """``elect_matrices<float, 4, true>`` of the full declaration."""
    match = re.search(r"(\w+(?:<[^()]*>)?)\((?!anonymous)", demangled)
    assert match, demangled
    return match[1].replace(", ", " ")


def _cuobjdump() -> str | None:
    beside = (Path(p) / "nvidia" for p in sys.path)
    shipped: Iterator[Path] = (tool for folder in beside for tool in folder.glob("cu*/bin/cuobjdump"))
    return shutil.which("cuobjdump") or next(map(str, shipped), None)


@functools.cache
def _dump(*options: str) -> str:
    spec = importlib.util.find_spec("dcmerge_ext._cuda")
    tool = _cuobjdump()
    assert spec is not None
    assert spec.origin is not None
    assert tool is not None
    return subprocess.run([tool, *options, spec.origin], capture_output=True, text=True, check=True).stdout


def _demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.stdout.write(table())

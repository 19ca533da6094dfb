"""CUB as a rival: ``cub_baseline.cu``, compiled with nvcc where it is, once for each kind of device, and called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from device_case import DeviceRival
from torch import Tensor

_SOURCE = Path(__file__).with_name("cub_baseline.cu")
_BUILD = Path(__file__).parents[1] / "build/cub"


class Unavailable(Exception):
    """With the reason."""


def kth_magnitude_rivals(x: Tensor, count: int) -> list[DeviceRival]:
    """The ``count``-th largest magnitude of each row of (rows, length)."""
    rows, length = x.shape
    out = x.new_empty(rows)

    def prepared(function: str) -> Callable[[], Tensor]:
        return _prepared(function, x, [ctypes.c_int64(size) for size in (rows, length, count)], out)

    return [
        _rival("CUB radix sort", lambda: prepared("dcm_cub_kth_by_sort")),
        _rival("CUB histogram + scan", lambda: prepared("dcm_cub_kth_by_histogram")),
    ]


def histogram_rival(x: Tensor, shift: int, width: int) -> DeviceRival:
    """Counts of the leading digit of the magnitudes of (length,): int64 (2^width,)."""
    out = torch.empty(1 << width, dtype=torch.int64, device=x.device)
    arguments = [ctypes.c_int64(x.numel()), ctypes.c_int(shift), ctypes.c_int(width)]
    return _rival("CUB histogram", lambda: _prepared("dcm_cub_histogram", x, arguments, out))


def _rival(name: str, prepare: Callable[[], Callable[[], Tensor]]) -> DeviceRival:
    try:
        return DeviceRival(name, prepare())
    except Unavailable as reason:
        return DeviceRival(name, None, note=str(reason))


def _prepared(
    function: str, x: Tensor, arguments: Sequence[ctypes.c_int64 | ctypes.c_int], out: Tensor
) -> Callable[[], Tensor]:
    """The call with its temporary memory allocated: nobody is slowed down."""
    if x.device.type != "cuda":
        raise Unavailable("CUB runs on CUDA devices only")
    library = load(torch.cuda.get_device_capability(x.device))
    needed = ctypes.c_size_t(0)

    def run(temp: int | None) -> None:
        status = getattr(library, function)(
            ctypes.c_void_p(temp),
            ctypes.byref(needed),
            ctypes.c_void_p(x.data_ptr()),
            *arguments,
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int(x.element_size()),
            ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )
        if status:
            raise RuntimeError(f"{function}: {library.dcm_cub_error(status).decode()}")

    run(None)
    temp = torch.empty(max(1, needed.value), dtype=torch.uint8, device=x.device)

    def call() -> Tensor:
        run(temp.data_ptr())
        return out

    return call


@functools.cache
def load(capability: tuple[int, int]) -> ctypes.CDLL:
    """The library for devices of a compute capability. Raises Unavailable with the reason."""
    library = ctypes.CDLL(str(build(capability)))
    library.dcm_cub_error.restype = ctypes.c_char_p
    return library


def build(capability: tuple[int, int]) -> Path:
    """Compile, unless that was done before. Raises Unavailable with the reason."""
    nvcc = _nvcc()
    flags = ["-std=c++17", "-O3", f"-arch=sm_{capability[0]}{capability[1]}", "-shared", "-Xcompiler", "-fPIC"]
    digest = hashlib.sha256(" ".join([nvcc, *flags]).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    library = _BUILD / digest / "libcub_baseline.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        done = subprocess.run(
            [nvcc, *flags, str(_SOURCE), "-o", str(unfinished)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Unavailable(f"nvcc cannot compile {_SOURCE.name}: {done.stderr.strip()[-500:]}")
        return unfinished.replace(library)


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise Unavailable("nvcc is missing: install the CUDA toolkit, or set CUDA_HOME, to time CUB, too")
    return found

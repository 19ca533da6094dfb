"""The CUDA kernels as a backend without a GPU: their sources and bindings, compiled as C++ against the runner of
``cuda_host`` into a Python module, and registered as backend ``cuda_host``, for CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dcmerge_ext._cuda_backend import CudaBackend
from dcmerge_ext.errors import BackendUnavailable

ROOT = Path(__file__).parents[1]
CSRC, RUNNER = ROOT / "csrc", ROOT / "tests/cuda_host"
SOURCES = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bind_cuda.cpp"]
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas"]


def build() -> Path:
    """The module, compiled where sources or compiler have changed. Raises BackendUnavailable with the reason."""
    try:
        import pybind11
    except ImportError as error:
        raise BackendUnavailable(f"the host build of the CUDA kernels needs pybind11: {error}") from None
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = [f"-I{p}" for p in (CSRC, RUNNER, pybind11.get_include(), sysconfig.get_path("include"))]
    command = [*compiler, *FLAGS, *includes, "-DDCMERGE_CUDA_MODULE=_cuda_host"]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in sorted(f for folder in (CSRC, RUNNER) for f in folder.rglob("*") if f.is_file()):
        digest.update(file.read_bytes())
    folder = ROOT / "build/cuda_host" / digest.hexdigest()[:16]
    module = folder / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run([*command, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    unfinished = module.with_suffix(f".{os.getpid()}")
    _run([*command, "-shared", *map(str, objects), "-o", str(unfinished)])
    return unfinished.replace(module)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendUnavailable(f"the host build of the CUDA kernels failed: {done.stderr[-1000:]}")


@functools.cache
def load() -> CudaBackend:
    spec = importlib.util.spec_from_file_location("_cuda_host", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return CudaBackend(module)

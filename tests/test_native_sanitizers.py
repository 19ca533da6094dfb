"""The native core's own tests (tests/native) under sanitizers and for each instruction set; planted bugs must fail them."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted([*(CSRC / "cpu").glob("*.cpp"), *(ROOT / "tests/native").glob("*.cpp")])

COMMON = ["-std=c++17", "-g1", "-pthread", "-ffp-contract=off"]
BUILDS = {
    "address": [
        "-O1",
        "-fopenmp",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-D_GLIBCXX_ASSERTIONS",
    ],
    # -Og: at -O1 g++ copies inline, which ThreadSanitizer does not see.
    "thread": ["-Og", "-fsanitize=thread", "-DDCMERGE_STD_THREADS"],
    # Vectorised for the instruction set of the compiler's default, and nothing chosen at run time.
    "plain": ["-O3", "-DDCM_MULTIVERSION=", "-DDCMERGE_STD_THREADS"],
}
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.endswith("SAN_OPTIONS")}
ENVIRONMENT |= {"TSAN_OPTIONS": "halt_on_error=1", "OMP_WAIT_POLICY": "passive"}  # more threads than cores: no spinning


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Standard output and error come as one text."""
    return subprocess.run(
        [str(part) for part in command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )


class Build(NamedTuple):
    command: list[str]
    """the compiler with all flags"""
    objects: dict[str, Path]
    """of the core as it is and of its tests"""


def compiled(command: list[str], sources: list[Path], csrc: Path, folder: Path) -> dict[str, Path]:
    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        done = run(*command, f"-I{csrc}", "-c", source, "-o", target)
        assert done.returncode == 0, done.stdout
        return target

    with ThreadPoolExecutor(2) as pool:
        return dict(zip([source.name for source in sources], pool.map(compile_one, sources), strict=True))


def linked_and_run(
    command: list[str], objects: dict[str, Path], folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    done = run(*command, *objects.values(), "-o", folder / "native_tests")
    assert done.returncode == 0, done.stdout
    return run(folder / "native_tests", *arguments)


def works(command: list[str], probe: Path) -> tuple[bool, str]:
    """Whether the compiler makes a program that runs here, and what was printed where not."""
    if shutil.which(command[0]) is None:
        return False, f"{command[0]} is not installed"
    program = probe.with_suffix("")
    done = run(*command, probe, "-o", program)
    if done.returncode == 0:
        done = run(program)
    return done.returncode == 0, f"{command[0]}, or what it makes, fails: {' '.join(done.stdout.split())[-200:]}"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Build]:
    """A build by its name, made once. Skips where no compiler makes programs of that kind that run here."""

    @functools.cache
    def made(name: str) -> Build | str:
        folder = tmp_path_factory.mktemp(name)
        probe = folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        reasons = []
        for compiler in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
            command = [*shlex.split(compiler), *COMMON, *BUILDS[name]]
            fine, reason = works(command, probe)
            if fine:
                return Build(command, compiled(command, SOURCES, CSRC, folder))
            reasons.append(reason)
        return "; ".join(reasons)

    def build_or_skip(name: str) -> Build:
        build = made(name)
        if isinstance(build, str):
            pytest.skip(f"no {name} build: {build}")
        return build

    return build_or_skip


@pytest.mark.parametrize("name", BUILDS)
def test_the_native_core_passes_its_tests(name: str, build: Callable[[str], Build], tmp_path: Path) -> None:
    done = linked_and_run(*build(name), tmp_path)
    assert (done.returncode, done.stdout) == (0, "all passed\n")


@pytest.mark.parametrize("name", ["avx2", "avx512f"])
def test_wider_vectors_return_the_same_bits(name: str, build: Callable[[str], Build], tmp_path: Path) -> None:
    command, objects = build("plain")
    wide = [*command, f"-m{name}", "-mfma"]
    probe = tmp_path / "probe.cpp"
    probe.write_text(f'int main() {{ return __builtin_cpu_supports("{name}") ? 0 : 1; }}\n')
    if not works(wide, probe)[0]:
        pytest.skip(f"this processor or compiler knows no {name}")
    kernels = [source for source in SOURCES if source.is_relative_to(CSRC)]
    done = linked_and_run(wide, objects | compiled(wide, kernels, CSRC, tmp_path), tmp_path)
    assert (done.returncode, done.stdout) == (0, "all passed\n")


class Bug(NamedTuple):
    build: str
    """the one that must notice"""
    file: str
    """below csrc/"""
    right: str
    wrong: str
    report: str
    """part of what the failing program prints"""


OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
RACE = "ThreadSanitizer: data race"

BUGS = {
    "write beyond the end": Bug(
        "address", "cpu/philox.cpp", "std::min(kBlockBits, end - first)", "kBlockBits", OVERFLOW
    ),
    "run longer than the matrix": Bug("address", "cpu/elect.cpp", "std::min(kRun, length - done)", "kRun", OVERFLOW),
    "read beyond the last slice": Bug("address", "cpu/select.cpp", "std::min(step, length - begin)", "step", OVERFLOW),
    "signed overflow": Bug(
        "address",
        "kernels/philox.h",
        "const uint64_t p0 = uint64_t{0xD2511F53} *",
        "const int64_t p0 = int64_t{0xD2511F53} *",
        "runtime error: signed integer overflow",
    ),
    "misaligned access": Bug(
        "address",
        "cpu/elect.cpp",
        "p.out + b * size + run.begin)",
        "reinterpret_cast<Float*>(reinterpret_cast<char*>(p.out) + 1) + b * size + run.begin)",
        "runtime error: store to misaligned address",
    ),
    "columns beyond the last": Bug(
        "address", "cpu/orthonormalize.cpp", "std::min(begin + kRun, p.length)", "begin + kRun", OVERFLOW
    ),
    "tail as wide as a tile": Bug("address", "cpu/gram_apply_tile.h", "k = c; k < n", "k = c; k < c + kTile", OVERFLOW),
    "histogram shared by threads": Bug("thread", "cpu/select.cpp", "partial.data() + s * bins", "partial.data()", RACE),
    "scratch shared by threads": Bug(
        "thread", "cpu/elect.cpp", "Float votes[kRun];", "static Float votes[kRun];", RACE
    ),
    "scratch shared by problems": Bug(
        "thread", "cpu/orthonormalize.cpp", "double lanes[kLanes] = {};", "static double lanes[kLanes] = {};", RACE
    ),
    "sums shared by slices": Bug(
        "thread", "cpu/gram_apply.cpp", "(s * padded + g * tiles.rows)", "g * tiles.rows", RACE
    ),
    "runs that overlap": Bug("thread", "cpu/philox.cpp", "(run + 1) * kRun", "(run + 2) * kRun", RACE),
    "more columns than the task has": Bug("address", "cpu/project.cpp", "c + 4 <= rank", "c < rank", OVERFLOW),
    "column shared by tasks": Bug(
        "thread", "cpu/project.cpp", "const int64_t first = firsts", "static int64_t first; first = firsts", RACE
    ),
    "ties at the threshold trimmed": Bug(
        "plain", "cpu/elect.cpp", "+= magnitude >= threshold", "+= magnitude > threshold", "elect_test.cpp"
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_reported(name: str, build: Callable[[str], Build], tmp_path: Path) -> None:
    bug = BUGS[name]
    command, objects = build(bug.build)
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    changed = csrc / bug.file
    text = changed.read_text()
    assert text.count(bug.right) == 1, f"{bug.file} has changed: plant {name!r} elsewhere"
    changed.write_text(text.replace(bug.right, bug.wrong))
    sources = [csrc / source.relative_to(CSRC) if source.is_relative_to(CSRC) else source for source in SOURCES]
    affected = [s for s in sources if s == changed or f'#include "{bug.file}"' in s.read_text()]
    objects = objects | compiled(command, affected, csrc, tmp_path)
    for _ in range(5):  # a race shows only where threads really overlap, which a busy machine can prevent
        done = linked_and_run(command, objects, tmp_path, affected[0].stem)
        if done.returncode != 0:
            break
    assert done.returncode != 0
    assert bug.report in done.stdout

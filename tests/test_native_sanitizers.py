"""The native core's own tests (tests/native) under sanitizers and for each instruction set; planted bugs must fail them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sanitized import OVERFLOW, RACE, ROOT, Bug, Build, Suite, builds_of, compiled, linked, planted, run, works

KERNELS = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
TESTS = sorted((ROOT / "tests/native").glob("*.cpp"))

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
SUITE = Suite(
    sources=[*KERNELS, *TESTS],
    folders=["csrc", "tests/native"],
    flags=["-std=c++17", "-g1", "-pthread", "-ffp-contract=off"],
    builds=BUILDS,
    compilers=["g++", "clang++"],
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Build]:
    return builds_of(SUITE, tmp_path_factory)


@pytest.mark.parametrize("name", BUILDS)
def test_the_native_core_passes_its_tests(name: str, build: Callable[[str], Build], tmp_path: Path) -> None:
    done = run(build(name).program)
    assert (done.returncode, done.stdout) == (0, "all passed\n")


@pytest.mark.parametrize("name", ["avx2", "avx512f"])
def test_wider_vectors_return_the_same_bits(name: str, build: Callable[[str], Build], tmp_path: Path) -> None:
    plain = build("plain")
    wide = [*plain.command, f"-m{name}", "-mfma"]
    probe = tmp_path / "probe.cpp"
    probe.write_text(f'int main() {{ return __builtin_cpu_supports("{name}") ? 0 : 1; }}\n')
    if not works(wide, probe)[0]:
        pytest.skip(f"this processor or compiler knows no {name}")
    objects = plain.objects | compiled(wide, SUITE, KERNELS, tmp_path)
    done = run(linked(wide, objects, tmp_path))
    assert (done.returncode, done.stdout) == (0, "all passed\n")


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
    "tile beyond the rows": Bug("address", "cpu/gram.cpp", "row + tile.rows,", "row + 2 * tile.rows,", OVERFLOW),
    "pieces that overlap": Bug("thread", "cpu/gram.cpp", "(piece + 1) * columns / pieces,", "columns,", RACE),
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
    program, test = planted(bug, build(bug.build), tmp_path)
    for _ in range(5):  # a race shows only where threads really overlap, which a busy machine can prevent
        done = run(program, test)
        if done.returncode != 0:
            break
    assert done.returncode != 0
    assert bug.report in done.stdout

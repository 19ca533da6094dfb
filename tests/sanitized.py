"""Programs of native tests: compiled once for each kind of build, linked again for each change."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.endswith("SAN_OPTIONS")}
ENVIRONMENT |= {"TSAN_OPTIONS": "halt_on_error=1", "OMP_WAIT_POLICY": "passive"}  # more threads than cores: no spinning

OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
RACE = "ThreadSanitizer: data race"


class Suite(NamedTuple):
    sources: list[Path]
    """the code under test and its tests, below ROOT"""
    folders: list[str]
    """where #include looks, below ROOT"""
    flags: list[str]
    """of every build"""
    builds: dict[str, list[str]]
    """further flags, by the name of the build"""
    compilers: Sequence[str]
    """in order of preference, after $CXX"""


class Build(NamedTuple):
    suite: Suite
    command: list[str]
    """the compiler with all flags"""
    objects: dict[str, Path]
    """of the sources as they are, by file name"""
    program: Path


class Bug(NamedTuple):
    build: str
    """the one that must notice"""
    file: str
    """as an #include names it"""
    right: str
    wrong: str
    report: str
    """part of what the failing program prints"""
    test: str = ""
    """that must fail; empty: the one named like the first source that the bug reaches"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Standard output and error come as one text."""
    return subprocess.run(
        [str(part) for part in command],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )


def compiled(
    command: list[str], suite: Suite, sources: Sequence[Path], folder: Path, root: Path = ROOT
) -> dict[str, Path]:
    """Objects in ``folder``; everything below ``root``, be it a copy, is read there."""
    include = [f"-I{root / name}" for name in suite.folders]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        done = run(*command, *include, "-c", "-x", "c++", root / source.relative_to(ROOT), "-o", target)
        assert done.returncode == 0, done.stdout
        return target

    with ThreadPoolExecutor(2) as pool:
        return dict(zip([source.name for source in sources], pool.map(compile_one, sources), strict=True))


def linked(command: list[str], objects: dict[str, Path], folder: Path) -> Path:
    program = folder / "native_tests"
    done = run(*command, *objects.values(), "-o", program)
    assert done.returncode == 0, done.stdout
    return program


def works(command: list[str], probe: Path) -> tuple[bool, str]:
    """Whether the compiler makes a program that runs here, and what was printed where not."""
    if shutil.which(command[0]) is None:
        return False, f"{command[0]} is not installed"
    program = probe.with_suffix("")
    done = run(*command, probe, "-o", program)
    if done.returncode == 0:
        done = run(program)
    return done.returncode == 0, f"{command[0]}, or what it makes, fails: {' '.join(done.stdout.split())[-200:]}"


def builds_of(suite: Suite, factory: pytest.TempPathFactory) -> Callable[[str], Build]:
    """A build by its name, made once. Skips where no compiler makes programs of that kind that run here."""

    lock = threading.Lock()  # of the cache, which would make a build twice

    @functools.cache
    def made(name: str) -> Build | str:
        folder = factory.mktemp(name)
        probe = folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        reasons = []
        for compiler in filter(None, (os.environ.get("CXX"), *suite.compilers)):
            command = [*shlex.split(compiler), *suite.flags, *suite.builds[name]]
            fine, reason = works(command, probe)
            if fine:
                objects = compiled(command, suite, suite.sources, folder)
                return Build(suite, command, objects, linked(command, objects, folder))
            reasons.append(reason)
        return "; ".join(reasons)

    def build_or_skip(name: str) -> Build:
        with lock:
            build = made(name)
        if isinstance(build, str):
            pytest.skip(f"no {name} build: {build}")
        return build

    return build_or_skip


def includes(file: Path, suite: Suite) -> set[Path]:
    """The file and what it includes, directly or not, by name or by a macro, of what is below the suite's folders."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'#(?:include|define \w+) "(.+)"', file.read_text()):
            waiting += [path for folder in suite.folders if (path := ROOT / folder / name).exists()][:1]
    return found


def planted(bug: Bug, build: Build, folder: Path) -> tuple[Path, str]:
    """A program with the bug, and the test that must fail."""
    suite = build.suite
    file = next(ROOT / name / bug.file for name in suite.folders if (ROOT / name / bug.file).exists())
    text = file.read_text()
    assert text.count(bug.right) == 1, f"{bug.file} has changed: plant the bug elsewhere"
    for name in suite.folders:
        shutil.copytree(ROOT / name, folder / name)
    (folder / file.relative_to(ROOT)).write_text(text.replace(bug.right, bug.wrong))
    affected = [source for source in suite.sources if file in includes(source, suite)]
    objects = build.objects | compiled(build.command, suite, affected, folder, root=folder)
    return linked(build.command, objects, folder), bug.test or affected[0].stem.removesuffix("_test")

"""A short run of the fuzzer, the same cases every time; CONTRIBUTING.md has the long one. And that it would notice."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random
from threading import Timer
from typing import Any

import pytest
from fuzz import case, inputs, mutate
from fuzz.jobs import merge
from fuzz.pool import Worker
from fuzz.targets import TARGETS
from fuzz.worker import Guard, Trespass

from dcmerge_ext.errors import InputError

CASES = 250


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_ends_in_a_merge_or_one_clean_error(target: str, worker: Worker) -> None:
    ended = list(worker.run((target, 0, number) for number in range(CASES)))
    assert [f"{e.again}\n{e.outcome.text}" for e in ended if e.outcome.kind == "finding"] == []
    kinds = Counter(e.outcome.kind for e in ended)
    assert kinds["refused"] >= CASES // 10, kinds  # else it mutates nothing
    assert kinds["merged"] >= 2, kinds  # else it does not reach what it is after


def test_a_case_is_the_same_every_time(worker: Worker) -> None:
    cases = [(target, 7, 3) for target in TARGETS]
    assert list(worker.run(cases)) == list(worker.run(cases))
    assert [mutate.value(Random("1/x/2")) for _ in range(3)] == [mutate.value(Random("1/x/2")) for _ in range(3)]


class TestItWouldNotice:
    """Jobs that do what no input may make the package do."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "case").mkdir()
        monkeypatch.chdir(tmp_path / "case")

    def found(self, monkeypatch: pytest.MonkeyPatch, job: Callable[[], Any]) -> str:
        def target(random: Random) -> Any:
            inputs.put("base", "task0")
            return job

        monkeypatch.setitem(TARGETS, "planted", target)
        outcome = case.run_case("planted", 0, 0, nullcontext())
        assert outcome.kind == "finding"
        return outcome.text

    def test_another_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "KeyError" in self.found(monkeypatch, lambda: {}["a"])

    def test_partial_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def job() -> None:
            Path("out.partial").mkdir()
            raise InputError("wrong")

        assert "left behind" in self.found(monkeypatch, job)

    def test_a_changed_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def job() -> Path:
            out = merge(["task0"])()
            Path("base/config.json").write_text("{}")
            return out  # type: ignore[return-value]

        assert "config.json" in self.found(monkeypatch, job)

    def test_an_output_that_is_not_finite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def job() -> Path:
            out = merge(["task0"])()
            file = Path("out/model.safetensors")
            data = file.read_bytes()
            file.write_bytes(data[:-12] + bytes([0, 0, 0xC0, 0x7F]) + data[-8:])
            return out  # type: ignore[return-value]

        assert "not finite" in self.found(monkeypatch, job)

    def test_a_secret_in_the_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def job() -> Path:
            out = merge(["task0"])()
            Path("out/notes.txt").write_text("nobody's business")
            return out  # type: ignore[return-value]

        assert "outside the inputs" in self.found(monkeypatch, job)

    @pytest.mark.parametrize(
        ("event", "arguments"),
        [
            ("open", ("../elsewhere", "w", 0)),
            ("open", ("/elsewhere", None, os.O_CREAT)),
            ("open", ("outside/secret.txt", "r", 0)),
            ("os.mkdir", ("../elsewhere", 0, -1)),
            ("os.rename", ("out", "../elsewhere", -1, -1)),
            ("subprocess.Popen", ("true", [], None, None)),
            ("os.system", ("true",)),
            ("socket.connect", (None, ("localhost", 1))),
        ],
    )
    def test_trespass(self, event: str, arguments: tuple[Any, ...]) -> None:
        guard = Guard(Path())
        guard(event, arguments)  # outside its block
        with guard:
            guard("open", ("inside", "w", 0))
            with pytest.raises(Trespass):
                guard(event, arguments)
        assert len(guard.seen) == 1

    @pytest.mark.parametrize(("killed", "says"), [(False, "took longer"), (True, "died with status -9")])
    def test_a_worker_that_hangs_or_dies(self, killed: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fuzz.pool._TICKS", 8)
        with Worker() as worker:
            process = worker._process
            process.send_signal(signal.SIGSTOP)
            if killed:
                Timer(0.5, process.kill).start()
            (ended,) = worker.run([("model_configs", 0, 0)])
            assert ended.outcome.kind == "finding"
            assert says in ended.outcome.text
            (again,) = worker.run([("model_configs", 0, 0)])  # by another process
            assert again.outcome.kind in ("merged", "refused")

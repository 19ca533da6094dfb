"""Several processes under torchrun: the bytes of one process, one clear error for all, and nothing that hangs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch.distributed as dist
from families import run, tasks

from dcmerge_ext import distributed, list_methods, merge_checkpoints
from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.checkpoints.deal import cost, deal
from dcmerge_ext.checkpoints.fingerprint import refuse_differences
from dcmerge_ext.checkpoints.journal import read_journals
from dcmerge_ext.checkpoints.run import prepare
from dcmerge_ext.distributed import Group, Processes
from dcmerge_ext.errors import InputError, RunError

BASE = families.toy()
Tree = dict[str, bytes | str | None]

DRIVER = """
import errno, json, os, signal, sys, time
from pathlib import Path
import torch
from dcmerge_ext.checkpoints import journal, output
from dcmerge_ext.cli import main
torch.set_num_threads(1)
journal._COMMIT_SECONDS = 0.0
output._SEEN_WITHIN_SECONDS = 1.0
rank = int(os.environ["RANK"])
statuses = []
for code, arguments in json.loads(sys.argv[1]):
    exec(code)
    statuses.append(main(arguments))
    print(flush=True)
    if rank == 0:
        print("end of run", file=sys.stderr, flush=True)
Path(sys.argv[2], f"statuses{rank}").write_text(json.dumps(statuses))
"""


@dataclass(frozen=True)
class Outcome:
    returncode: int
    statuses: list[list[int]]
    """By process, of every run."""
    errors: list[str]
    """What every run printed to the standard error."""


@pytest.fixture
def torchrun(tmp_path: Path) -> Callable[..., Outcome]:
    def start(processes: int, *runs: tuple[str, Sequence[str | Path]]) -> Outcome:
        folder = Path(tempfile.mkdtemp(dir=tmp_path, prefix="driver"))
        (folder / "driver.py").write_text(DRIVER)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
                *(folder / "driver.py", json.dumps([(code, [str(a) for a in given]) for code, given in runs]), folder),
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
        )
        statuses = [json.loads(path.read_text()) for path in sorted(folder.glob("statuses*"))]
        shutil.rmtree(folder)
        return Outcome(done.returncode, statuses, done.stderr.split("end of run\n"))

    return start


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "base", BASE)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [families.write_model(tmp_path / f"task{i}", families.tuned(BASE, i)) for i in range(2)]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [families.write_adapter(tmp_path / f"adapter{i}", BASE, rank=2 + i, seed=i) for i in range(2)]


def taken(out: Path) -> Tree:
    """Everything that two runs of the same merge must agree on. Takes the output away."""
    found = families.tree(out)
    del found["dcmerge_timings.json"]
    shutil.rmtree(out)
    return found


@pytest.fixture
def merges(base: Path, models: list[Path], adapters: list[Path], tmp_path: Path) -> dict[str, list[str | Path]]:
    """Command lines, by the name of their output."""
    full = ["merge", "--base", base, *tasks(*models, adapters[0])]
    low = ["merge", *tasks(*adapters)]
    lines: dict[str, list[str | Path]] = {
        "dc_merge": [*full, "--verify"],
        "sharded": [*full, "--shard-size", "1KB", "--dtype", "bfloat16"],
        "adapter": low,
        "knots": [*low, "--method", "knots"],
        **{m: [*full, "--method", m] for m in ("ties", "pcb", "doge", "esm", "dare", "consensus")},
    }
    return {name: [*line, "--out", tmp_path / name, "-q"] for name, line in lines.items()}


def test_every_method_of_the_whole_model_is_tried(merges: dict[str, list[str | Path]]) -> None:
    assert {name for name, method in list_methods().items() if method.scope == "model"} <= merges.keys()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_same_bytes(
    processes: int, merges: dict[str, list[str | Path]], torchrun: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = {}
    for name, line in merges.items():
        result = run(capsys, *line)
        assert result.status == 0, result.err
        expected[name] = taken(tmp_path / name)
    outcome = torchrun(processes, *(("", line) for line in merges.values()))
    assert outcome.statuses == [[0] * len(merges)] * processes, outcome.errors
    for name, tree in expected.items():
        found = taken(tmp_path / name)
        assert {n for n in tree.keys() | found.keys() if tree.get(n) != found.get(n)} == set(), name


KILLED = """
if rank == {rank}:
    from dcmerge_ext.checkpoints.journal import Journal
    append, left = Journal.append, [{after}]
    def killed(*arguments):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        append(*arguments)
    Journal.append = killed
"""


@pytest.mark.parametrize(("processes", "rank", "then"), [(2, 1, 3), (3, 0, 1), (3, 2, 2)])
def test_a_killed_process_ends_the_run_which_goes_on_with_any_number(
    processes: int, rank: int, then: int, merges: dict[str, list[str | Path]], torchrun: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line, out = merges["ties"], tmp_path / "ties"
    assert run(capsys, *line).status == 0
    expected = taken(out)
    outcome = torchrun(processes, (KILLED.format(rank=rank, after=2), line))
    assert outcome.returncode != 0
    assert not out.exists()
    earlier = read_journals(tmp_path / "ties.partial")
    assert earlier is not None
    assert 0 < len(earlier.entries) < len(BASE)
    if then == 1:
        assert run(capsys, *line, "--resume").status == 0
    else:
        assert torchrun(then, ("", [*line, "--resume"])).statuses == [[0]] * then
    assert taken(out) == expected


def test_failures_reach_every_process(
    base: Path, models: list[Path], torchrun: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one message, by the first process, and the same status in all."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    broken = families.tuned(BASE, 1)
    for name in ("embed_tokens.weight", "layers.0.gain"):
        broken[name].view(-1)[0] = torch.nan
    bad = families.write_model(tmp_path / "bad", broken)
    line = ["merge", "--base", base, *tasks(*models), "--out", out]
    full = (
        "original = os.pwrite\n"
        "calls = [3]\n"
        "def pwrite(*arguments):\n"
        "    calls[0] -= rank == 1\n"
        "    if calls[0] < 0:\n"
        "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "    return original(*arguments)\n"
        "os.pwrite = pwrite\n"
    )
    runs = {
        "an input that is not there": ("", ["merge", "--base", base, "--task", tmp_path / "none", "--out", out]),
        "an input that one process does not see": (
            "if rank == 1: os.environ['HOME'] = '/nowhere'",
            ["merge", "--base", base, "--task", "~/task0", "--out", out],
        ),
        "a value that is not finite": ("", ["merge", "--base", base, *tasks(models[0], bad), "--out", out]),
        "other threads": ("torch.set_num_threads(1 + rank)", line),
        "not a shared place": (
            "torch.set_num_threads(1); os.makedirs(f'own{rank}'); os.chdir(f'own{rank}')",
            [*line[:-1], "out"],
        ),
        "a method that fails": (
            "from dcmerge_ext.methods.dc_merge import DCMerge\n"
            "if rank == 1:\n"
            "    merge = DCMerge.merge\n"
            "    DCMerge.merge = lambda *given: 1 / 0",
            line,
        ),
        "a full disk": ("if rank == 1: DCMerge.merge = merge\n" + full, [*line, "--overwrite"]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        outcome = torchrun(2, *runs.values())
    says = {
        "an input that is not there": f"error: {tmp_path / 'none'}: no such file",
        "an input that one process does not see": "error: ~/task0: no such file or directory",
        "a value that is not finite": f"error: {bad / 'model.safetensors'}: tensor ",
        "other threads": "error: process 1 does not run the same as process 0: threads was 1 and is 2",
        "not a shared place": "out.partial: process 1 on ",
        "a method that fails": "failed: ZeroDivisionError: division by zero (process 1 on ",
        "a full disk": f"failed: {out}: writing failed (No space left on device (process 1 on ",
    }
    statuses = [1, 1, 1, 1, 1, 3, 3]
    assert outcome.statuses == [statuses, statuses], outcome.errors
    for (name, said), errors in zip(says.items(), outcome.errors, strict=False):
        messages = [text for text in errors.splitlines() if text.startswith(("error: ", "failed: "))]
        assert len(messages) == 1, errors
        assert said in messages[0], (name, errors)
    assert "─ Traceback" in "".join(outcome.errors)  # the process where the mistake was shows it
    assert not out.exists()
    assert partial.exists()  # of the full disk
    assert run(capsys, *line, "--resume").status == 0


def test_a_process_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen, or on a machine that is gone: nobody ends the others then. Here the second process never comes."""
    group = Group.__new__(Group)
    group.rank, group.size, group._meetings, group._store = 0, 2, 0, dist.HashStore()
    alive = []
    monkeypatch.setattr(distributed, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(distributed.time, "sleep", lambda _: alive.append(group._store.add("beats-0", 1)))
    with pytest.raises(RunError, match="process 1 no longer answers; continue with --resume"):
        group.meet()
    waited = len(alive)
    assert waited >= distributed._SILENT_BEATS * distributed._POLLS_PER_BEAT
    # a slow one that gives signs of life is waited for, here three times as long
    monkeypatch.setattr(
        distributed.time, "sleep",
        lambda _: (group._store.add("beats-0", 1), group._store.add("beats-1", 1), alive.append(0),
                   len(alive) == 4 * waited and group._store.add("meeting-2", 1)),
    )  # fmt: skip
    group.meet()
    assert len(alive) == 4 * waited


def test_only_a_merge_runs_in_several_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    result = run(capsys, "demo", "--out", tmp_path / "demo")
    assert result.status == 1
    assert "only dcmerge merge runs in several processes" in result.err
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "demo", "--out", tmp_path / "demo").err == ""


class TestDealing:
    def plan(self, base: Path, models: list[Path], out: Path, method: str) -> Any:
        values = {"base": str(base), "tasks": [str(m) for m in models], "out": str(out), "method": method}
        return prepare(build_config(values)).plan

    @pytest.mark.parametrize("method", ["dc_merge", "ties"])
    @pytest.mark.parametrize("size", [1, 2, 5, 40])
    def test_every_tensor_once_and_evenly(
        self, method: str, size: int, base: Path, models: list[Path], tmp_path: Path
    ) -> None:
        tensors = self.plan(base, models, tmp_path / "out", method).tensors
        hands = deal(tensors, size)
        assert len(hands) == size
        assert sorted(t.name for hand in hands for t in hand) == sorted(BASE)
        assert hands == deal(tuple(reversed(tensors)), size)
        loads = [sum(map(cost, hand)) for hand in hands]
        # a greedy deal is never worse than the mean and the largest piece together
        assert max(loads) <= sum(loads) / size + max(map(cost, tensors))

    def test_computing_counts(self, base: Path, models: list[Path], tmp_path: Path) -> None:
        by_method = {
            method: {t.name: cost(t) for t in self.plan(base, models, tmp_path / "out", method).tensors}
            for method in ("dc_merge", "ties")
        }
        assert by_method["dc_merge"]["lm_head.weight"] > by_method["ties"]["lm_head.weight"]
        assert by_method["ties"]["lm_head.weight"] > by_method["ties"]["layers.0.norm.weight"]


def test_copies_of_the_inputs_may_differ_in_time_alone() -> None:
    one = {"inputs": {"a": {"size": 1, "modified_ns": 5, "header": "x"}}, "settings": {"scale": 1.0}}
    later = {"inputs": {"a": {"size": 1, "modified_ns": 6, "header": "x"}}, "settings": {"scale": 1.0}}
    refuse_differences([one, later, one])
    other = {"inputs": {"a": {"size": 1, "modified_ns": 5, "header": "y"}}, "settings": {"scale": 1.0}}
    with pytest.raises(InputError, match=r"process 2 does not run the same as process 0: a has changed"):
        refuse_differences([one, later, other])


def test_one_process_needs_no_torchrun(base: Path, models: list[Path], tmp_path: Path) -> None:
    alone = Processes()
    assert alone.first
    assert alone.gather(3) == [3]
    merge_checkpoints(base, models, tmp_path / "out")

"""A run that is stopped at any instant and continued ends with the bytes of one that nobody disturbed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import refused, run, tasks

import dcmerge_ext
from dcmerge_ext import merge_checkpoints
from dcmerge_ext.checkpoints import fingerprint, journal
from dcmerge_ext.checkpoints.journal import Journal, has_finished, read_journals
from dcmerge_ext.checkpoints.safetensors_writer import SafetensorsWriter
from dcmerge_ext.errors import InputError, RunError

BASE = families.toy()
TENSORS = len(BASE)
Capsys = pytest.CaptureFixture[str]
Tree = dict[str, bytes | str | None]


@pytest.fixture(autouse=True)
def _commit_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_COMMIT_SECONDS", 0.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "base", BASE)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [families.write_model(tmp_path / f"task{i}", families.tuned(BASE, i)) for i in range(2)]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [families.write_adapter(tmp_path / f"adapter{i}", BASE, rank=2, seed=i) for i in range(2)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


def result_of(out: Path) -> Tree:
    """Everything that two runs of the same merge must agree on. Takes the output away."""
    found = families.tree(out)
    del found["dcmerge_timings.json"]
    shutil.rmtree(out)
    return found


def undisturbed(merge: Callable[..., object], out: Path) -> Tree:
    merge()
    return result_of(out)


KINDS = {
    "dc_merge": {},
    "ties in shards": {"method": "ties", "shard_size": "1KB"},
    "half": {"method": "averaging", "dtype": "bfloat16"},
    "adapter": {"save_as": "adapter", "adapter_rank": 3},
}


@pytest.fixture(params=KINDS)
def merge(
    request: pytest.FixtureRequest, base: Path, models: list[Path], adapters: list[Path], out: Path
) -> Callable[..., object]:
    options: dict[str, Any] = KINDS[request.param]
    chosen = adapters if request.param == "adapter" else [*models, adapters[0]]
    return lambda **more: merge_checkpoints(base, chosen, out, **options, **more)


class Instants:
    """Copies of the work directory at every instant that matters: what a kill there would leave."""

    def __init__(self, partial: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[Path] = []

        def taking(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                self._take(partial, folder)
                result = function(*arguments, **options)
                self._take(partial, folder)
                return result

            return wrapped

        monkeypatch.setattr(Journal, "_write", taking(Journal._write))
        monkeypatch.setattr(SafetensorsWriter, "write", taking(SafetensorsWriter.write))
        monkeypatch.setattr(Path, "write_text", taking(Path.write_text))
        monkeypatch.setattr(Path, "unlink", taking(Path.unlink))

    def _take(self, partial: Path, folder: Path) -> None:
        if partial.exists():
            self.places.append(folder / f"instant{len(self.places)}")
            shutil.copytree(partial, self.places[-1])


def test_killed_at_every_boundary(
    merge: Callable[..., object], out: Path, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        instants = Instants(partial, tmp_path, patch)
        expected = undisturbed(merge, out)
    finished = set()
    for place in instants.places:
        earlier = read_journals(place)
        finished.add(len(earlier.entries) if earlier else 0)
        place.rename(partial)
        merge(resume=True)
        assert result_of(out) == expected
        assert not partial.exists()
    assert len(finished) >= min(len(expected), 3)
    assert max(finished) == len({t["name"] for t in json.loads(expected["dcmerge.json"] or b"")["tensors"]})
    assert "damaged" not in caplog.text


def test_power_failure(
    merge: Callable[..., object], out: Path, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Only what was synchronised survives; a tensor that the journal claims is among it."""
    disk, places = tmp_path / "disk", []

    def synced(function: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(file: int) -> None:
            function(file)
            path = Path(f"/proc/self/fd/{file}").readlink()
            if partial in path.parents:
                survivor = disk / path.relative_to(partial)
                survivor.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, survivor)
                places.append(tmp_path / f"failure{len(places)}")
                shutil.copytree(disk, places[-1])

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", synced(os.fdatasync))
        expected = undisturbed(merge, out)
    assert any(has_finished(place) for place in places)
    for place in places:
        place.rename(partial)
        merge(resume=True)
        assert result_of(out) == expected
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("cut", [1, 20])
def test_torn_last_line(cut: int, merge: Callable[..., object], out: Path, partial: Path, stop: Any) -> None:
    expected = undisturbed(merge, out)
    stop(merge, after=2)
    (file,) = partial.glob("journal-*")
    file.write_bytes(file.read_bytes()[:-cut])
    before = read_journals(partial)
    assert before is not None
    assert len(before.entries) == 1
    merge(resume=True)
    assert result_of(out) == expected


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch, partial: Path) -> Callable[..., None]:
    """Runs a merge that is interrupted after some tensors."""

    def stopped(merge: Callable[..., object], *, after: int, error: BaseException | None = None, **more: Any) -> None:
        append, left = Journal.append, [after]

        def counted(*arguments: Any) -> None:
            append(*arguments)
            left[0] -= 1
            if left[0] == 0:
                raise error or KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", counted)
            with pytest.raises((KeyboardInterrupt, RunError)):
                merge(**more)
        assert has_finished(partial)

    return stopped


def test_stopped_twice(merge: Callable[..., object], out: Path, partial: Path, stop: Any) -> None:
    expected = undisturbed(merge, out)
    stop(merge, after=1)
    stop(merge, after=1, resume=True)
    earlier = read_journals(partial)
    assert earlier is not None
    assert len(earlier.entries) == 2
    merge(resume=True)
    assert result_of(out) == expected


def test_warnings_of_finished_tensors_are_kept(
    base: Path, models: list[Path], out: Path, stop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """More tasks than rows: DC-Merge says so once, for the first tensor; the resumed run does not see it again."""

    def merge(**more: Any) -> object:
        return merge_checkpoints(base, [models[0]] * 9, out, **more)

    expected = undisturbed(merge, out)
    warned = json.loads(expected["dcmerge.json"] or b"")["warnings"]
    assert any(w.startswith("layers.0.mlp.weight") for w in warned)
    stop(merge, after=TENSORS - 1)
    caplog.clear()
    merge(resume=True)
    assert "layers.0.mlp.weight" not in caplog.text
    assert result_of(out) == expected


def test_interrupted_command(
    base: Path, models: list[Path], out: Path, partial: Path, stop: Any, capsys: Capsys, tmp_path: Path
) -> None:
    arguments = ("--base", base, *tasks(*models), "--out", out)
    status = []
    with pytest.MonkeyPatch.context() as patch:
        append = Journal.append

        def interrupted(*given: Any) -> None:
            append(*given)
            raise KeyboardInterrupt

        patch.setattr(Journal, "append", interrupted)
        result = run(capsys, "merge", *arguments)
        status.append(result.status)
    assert status == [130]
    assert f"interrupted; what is finished stays in {partial}; continue with --resume" in result.err
    refused(capsys, tmp_path, *arguments, says=[partial, "continue it with --resume", "--overwrite"])
    result = run(capsys, "merge", *arguments, "--resume", "-v")
    assert result.status == 0, result.err
    assert f"{partial}: 1 tensors are finished" in result.err
    assert families.read_model(out).keys() == BASE.keys()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_disk_full_or_permission_lost(
    code: int, base: Path, models: list[Path], out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    arguments = ("merge", "--base", base, *tasks(*models), "--out", out)
    expected = undisturbed(lambda: run(capsys, *arguments), out)
    write, left = os.pwrite, [6]

    def failing(*given: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        result = run(capsys, *arguments)
    assert result.status == 3
    assert "Traceback" not in result.err
    assert f"failed: {out}: writing failed ({os.strerror(code)}); what is finished stays in {partial}; " in result.err
    assert "continue with --resume" in result.err
    earlier = read_journals(partial)
    assert earlier is not None
    assert len(earlier.entries) == 6  # the header takes one write, the empty tensor none
    assert run(capsys, *arguments, "--resume").status == 0
    assert result_of(out) == expected


KILLED = """
import os, signal, sys
import torch
from dcmerge_ext.checkpoints import journal
from dcmerge_ext.cli import main
journal._COMMIT_SECONDS = 0.0
torch.set_num_threads(1)
left, function = int(sys.argv[1]), sys.argv[2]
original = getattr(os, function)
def killed(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(os, function, killed)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("function", "calls"), [("pwrite", 7), ("fdatasync", 9), ("write", 4)])
def test_sigkill(function: str, calls: int, base: Path, models: list[Path], out: Path, partial: Path) -> None:
    """The kernel ends the process, inside a system call of the writer or of the journal."""

    def merge(**more: Any) -> object:
        return merge_checkpoints(base, models, out, "ties", **more)

    expected = undisturbed(merge, out)
    arguments = ["merge", "--base", base, *tasks(*models), "--method", "ties", "--out", out]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(calls), function, *map(str, arguments)],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert has_finished(partial)
    merge(resume=True)
    assert result_of(out) == expected


class TestRefused:
    """Anything that could change the bytes: what differs is named, and what is finished stays."""

    @pytest.fixture
    def begun(self, base: Path, models: list[Path], out: Path, stop: Any) -> Iterator[Callable[..., object]]:
        def merge(**more: Any) -> object:
            return merge_checkpoints(base, models, out, **{"method": "ties", "resume": True, **more})

        stop(merge, after=3)
        yield merge
        before = read_journals(out.with_name("out.partial"))
        assert before is not None
        assert len(before.entries) == 3

    def test_another_option(self, begun: Callable[..., object], partial: Path) -> None:
        with pytest.raises(InputError, match=rf"{partial}: was begun by another run: options was {{}} and is"):
            begun(keep=0.3)

    def test_another_method_and_scale(self, begun: Callable[..., object]) -> None:
        with pytest.raises(
            InputError, match=r"method was 'ties' and is 'averaging'; scale was None and is 0.5; .*anew"
        ):
            begun(method="averaging", scale=0.5)

    def test_another_task(self, begun: Callable[..., object], base: Path, models: list[Path], out: Path) -> None:
        with pytest.raises(InputError, match=r"tasks was .* and is .*task0.* was read then and is not now"):
            merge_checkpoints(base, models[1:], out, "ties", resume=True)

    def test_a_replaced_file(self, begun: Callable[..., object], models: list[Path]) -> None:
        shutil.rmtree(models[1])
        families.write_model(models[1], families.tuned(BASE, 7))
        with pytest.raises(InputError, match=rf"{models[1]}/model.safetensors has changed since \(time"):
            begun()

    def test_a_file_with_another_header_and_its_old_time(self, begun: Callable[..., object], base: Path) -> None:
        file = base / "model.safetensors"
        state = file.stat()
        content = bytearray(file.read_bytes())
        at = content.index(b"F32")
        content[at : at + 3] = b"I32"  # of the same size
        file.write_bytes(content)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        with pytest.raises(InputError, match=rf"{file} has changed since \(header"):
            begun(extra="ignore", overrides=[])

    def test_a_changed_configuration(self, begun: Callable[..., object], base: Path) -> None:
        (base / "config.json").write_text(json.dumps({"model_type": "toy", "dtype": "float32", "more": 1}))
        with pytest.raises(InputError, match=rf"{base}/config.json has changed since \(size"):
            begun()

    def test_another_version(self, begun: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dcmerge_ext.checkpoints.record.__version__", "0.0.9")
        with pytest.raises(InputError, match=f"dcmerge_ext was '{dcmerge_ext.__version__}' and is '0.0.9'"):
            begun()

    @pytest.mark.usefixtures("restore_threads")
    def test_other_threads(self, begun: Callable[..., object]) -> None:
        torch.set_num_threads(2)
        with pytest.raises(InputError, match="threads was 1 and is 2"):
            begun()

    def test_another_device(self, begun: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fingerprint.torch.backends.cpu, "get_cpu_capability", lambda: "other")
        with pytest.raises(InputError, match=r"cpu was .* and is .*other"):
            begun()


def test_resume_and_overwrite_do_not_count_as_changes(merge: Callable[..., object], out: Path, stop: Any) -> None:
    expected = undisturbed(merge, out)
    stop(merge, after=2, overwrite=True)
    merge(resume=True, verify=True)
    assert result_of(out) == expected


def test_overwrite_starts_anew(merge: Callable[..., object], out: Path, partial: Path, stop: Any) -> None:
    expected = undisturbed(merge, out)
    stop(merge, after=2)
    (partial / "stray").write_text("not part of any merge")
    merge(overwrite=True)
    assert result_of(out) == expected


def test_nothing_to_continue(merge: Callable[..., object], out: Path, partial: Path) -> None:
    """A scheduler gives the same command the first time and every time after."""
    expected = undisturbed(merge, out)
    merge(resume=True)
    assert result_of(out) == expected
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"of a version that kept no journal")
    (partial / "stray").write_text("not part of any merge")
    merge(resume=True)
    assert result_of(out) == expected


def test_wrong_input_takes_the_work_away(base: Path, models: list[Path], out: Path, partial: Path, stop: Any) -> None:
    """Found after some tensors are finished: continuing could not help."""
    broken = families.tuned(BASE, 1)
    broken["lm_head.weight"][0, 0] = torch.nan
    bad = families.write_model(models[0].parent / "bad", broken)

    def merge(**more: Any) -> object:
        return merge_checkpoints(base, [bad], out, **more)

    stop(merge, after=3)
    with pytest.raises(InputError, match="NaN or Inf"):
        merge(resume=True)
    assert not partial.exists()


def test_damaged_work_is_done_again(
    merge: Callable[..., object], out: Path, partial: Path, stop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk may lose what it confirmed: the files are read before they are believed."""
    expected = undisturbed(merge, out)
    stop(merge, after=2)
    for file in partial.glob("*.safetensors"):
        size = file.stat().st_size
        file.write_bytes(b"")
        os.truncate(file, size)
    merge(resume=True)
    assert result_of(out) == expected
    assert "is damaged; it is merged again" in caplog.text


@pytest.mark.parametrize("step", [0, 1])
def test_killed_while_the_earlier_output_is_replaced(
    step: int, merge: Callable[..., object], out: Path, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(merge, out)
    merge()
    (out / "earlier").write_text("the earlier output")
    rename, snapshots = Path.rename, []

    def taking(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        snapshots.append(tmp_path / f"snapshot{len(snapshots)}")
        for name in ("out", "out.partial", "out.replaced"):
            if (tmp_path / name).exists():
                shutil.copytree(tmp_path / name, snapshots[-1] / name)
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", taking)
        merge(overwrite=True)
    assert result_of(out) == expected
    names = sorted(path.name for path in snapshots[step].iterdir())
    for path in snapshots[step].iterdir():
        rename(path, tmp_path / path.name)
    if step == 0:
        assert names == ["out.partial", "out.replaced"]
        merge(overwrite=True, resume=True)
        assert not (tmp_path / "out.replaced").exists()
    else:
        assert names == ["out", "out.replaced"]  # the new output stands
    assert result_of(out) == expected


@pytest.mark.usefixtures("restore_threads")
def test_a_tensor_gets_the_same_threads_however_many_are_left(
    base: Path, models: list[Path], out: Path, partial: Path, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK's results depend on its number of threads."""
    torch.set_num_threads(4)
    method = dcmerge_ext.list_methods()["dc_merge"]
    merging, threads = method.merge, []

    def noted(*given: Any) -> Any:
        threads.append(torch.get_num_threads())
        return merging(*given)

    def merge(**more: Any) -> object:
        return merge_checkpoints(base, models, out, **more)

    expected = undisturbed(merge, out)
    stop(merge, after=TENSORS - 1)
    earlier = read_journals(partial)
    assert earlier is not None
    (file,) = partial.glob("journal-*")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(line for line in lines if b'"name":"layers.0.mlp.weight"' not in line))
    monkeypatch.setattr(method, "merge", noted)
    merge(resume=True)
    assert threads == [1]
    assert result_of(out) == expected


def test_a_sweep_cannot_be_resumed(base: Path, models: list[Path], out: Path) -> None:
    with pytest.raises(InputError, match="resume and verify belong to a merge"):
        dcmerge_ext.sweep(base, models, out, lambda path: 1.0, resume=True)


def test_finished_tensors_are_not_merged_again(
    base: Path, models: list[Path], out: Path, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(**more: Any) -> object:
        return merge_checkpoints(base, models, out, "ties", **more)

    stop(merge, after=TENSORS)  # everything but the record
    monkeypatch.setattr(dcmerge_ext.list_methods()["ties"], "survey", lambda *_: pytest.fail("surveyed"))
    monkeypatch.setattr(dcmerge_ext.list_methods()["ties"], "merge", lambda *_: pytest.fail("merged"))
    merge(resume=True)
    assert families.read_model(out).keys() == BASE.keys()

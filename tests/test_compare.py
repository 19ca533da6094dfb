"""The comparison of a merged checkpoint with its tasks: numbers against plain float64, the page, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import msgspec
import pytest
import torch
from families import write_adapter, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import dcmerge_ext as dcm
from dcmerge_ext.cli import main
from dcmerge_ext.comparison.measure import POINTS, measure
from dcmerge_ext.comparison.page import labels
from dcmerge_ext.comparison.result import Comparison
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.updates import Updates


def updates(count: int = 3, m: int = 20, n: int = 14, seed: int = 1) -> list[Tensor]:
    return [
        cases.with_spectrum(m, n, cases.power_law(min(m, n), 0.7), seed=seed + i).to(torch.float64)
        for i in range(count)
    ]


class Oracle:
    """Plain float64 forms of the documented definitions."""

    def __init__(self, deltas: list[Tensor], merged: Tensor, ranks: list[int]) -> None:
        self.deltas, self.merged = deltas, merged
        self.parts = []
        for delta, r in zip(deltas, ranks, strict=True):
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            self.parts.append((U[:, :r], S[:r], Vh[:r]))
        U, _, Vh = torch.linalg.svd(merged, full_matrices=False)
        k = min(sum(ranks), *merged.shape)
        self.whole = U[:, :k] @ Vh[:k]

    def task(self, i: int) -> dict[str, float]:
        (U, S, Vh), delta, M = self.parts[i], self.deltas[i], self.merged
        projected = U @ U.T @ M
        u, s, vh = torch.linalg.svd(projected, full_matrices=False)
        rank = int((s > 1e-9 * s[0]).sum())
        isometry = u[:, :rank] @ vh[:rank]
        lead, both = (U * S) @ Vh, U @ U.T @ M @ Vh.T @ Vh
        c = max(0.0, float((delta * both).sum() / both.square().sum()))

        def cosine(a: Tensor, b: Tensor) -> float:
            return float((a * b).sum() / (a.norm() * b.norm()))

        return {
            "norm": float(delta.norm()),
            "dir_sim": cosine(U @ Vh, self.whole),
            "cos_sim": cosine(delta, M),
            "projected_dir_sim": cosine(U @ Vh, isometry),
            "projected_cos_sim": cosine(lead, projected),
            "lost": min(1.0, 1 - cosine(U @ Vh, isometry)),
            "error": float((delta - c * both).norm() / delta.norm()),
            "truncation_error": float((delta - lead).norm() / delta.norm()),
        }

    def blocks(self) -> Tensor:
        bases = [torch.cat([p[side] if side == 0 else p[side].T for p in self.parts], 1) for side in (0, 2)]
        polars = []
        for basis in bases:
            a, _, bh = torch.linalg.svd(basis, full_matrices=False)
            polars.append(a @ bh)
        core = (polars[0].T @ self.merged @ polars[1]).square() / self.merged.square().sum()
        ranks = [len(p[1]) for p in self.parts]
        return torch.stack([torch.stack([b.sum() for b in row.split(ranks, 1)]) for row in core.split(ranks, 0)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "adapters"])
def test_the_numbers_are_those_of_their_definitions(kind: str, dtype: torch.dtype) -> None:
    if kind == "dense":
        deltas: list[Any] = [u.to(dtype) for u in updates()]
        ranks = [4, 4, 4]
    else:
        deltas = [LowRank(cases.normal(20, r, seed=r), cases.normal(r, 14, seed=r + 9)).to(dtype) for r in (2, 3, 4)]
        ranks = [2, 3, 4]
    merged = dcm.methods.dc_merge(deltas, aggregate="sum", block_size=0)
    dense = [cases.dense(d).double() for d in deltas]
    oracle = Oracle(dense, cases.dense(merged).double(), ranks)
    found = measure("layer", Updates.of(deltas), merged, None, None)
    bound = 1e-9 if dtype == torch.float64 else 2e-5
    assert found.ranks == ranks
    for i, task in enumerate(found.tasks):
        assert task is not None
        expected = oracle.task(i)
        for number, value in msgspec.structs.asdict(task).items():
            # these two are roots of differences from 1: 0 is met to the root of the round-off
            floor = 1e-7 if number in ("error", "truncation_error") else 0
            assert value == pytest.approx(expected[number], abs=max(bound, floor)), number
    torch.testing.assert_close(torch.tensor(found.blocks, dtype=torch.float64), oracle.blocks(), rtol=0, atol=bound)
    assert found.outside == pytest.approx(1 - float(oracle.blocks().sum()), abs=bound)
    for i in range(3):
        for j in range(3):
            U, S, Vh = oracle.parts[i]
            a, s, bh = oracle.parts[j]
            R = (U.T @ a) * (Vh @ bh.T)
            assert found.dir_sim[i][j] == pytest.approx(float(R.sum()) / (len(S) * len(s)) ** 0.5, abs=bound)
            assert found.cos_sim[i][j] == pytest.approx(float(S @ R @ s / (S.norm() * s.norm())), abs=bound)
    for curve, (_, S, _) in zip(found.spectra.tasks, oracle.parts, strict=True):
        assert curve is not None
        assert curve.values == pytest.approx([float(S[i - 1]) for i in curve.index], abs=bound * float(S[0]))


def test_one_task_alone_loses_nothing() -> None:
    update = updates(1)[0]
    found = measure("layer", Updates.of([update]), 0.3 * update, None, None)
    (task,) = found.tasks
    assert task is not None
    assert (task.lost, task.error, task.truncation_error) == pytest.approx((0, 0, 0), abs=1e-6)
    assert found.blocks == [[pytest.approx(1)]]


def test_a_task_that_is_turned_round_is_lost() -> None:
    first, second = updates(2)
    found = measure("layer", Updates.of([first, second]), first - 3 * second, None, None)
    assert found.tasks[1] is not None
    assert (found.tasks[1].lost, found.tasks[1].error) == (1, 1)


def test_degenerate_input_has_numbers() -> None:
    zero, some = torch.zeros(6, 5), torch.ones(6, 5)
    untouched = LowRank(torch.zeros(6, 0), torch.zeros(0, 5))
    for deltas, merged in (
        ([zero, zero], zero),
        ([zero, some], some),
        ([some, some], some),
        ([some, untouched], some),
        ([torch.ones(1, 1)] * 3, torch.ones(1, 1)),
        ([torch.ones(2, 6, 5), torch.ones(2, 6, 5)], torch.ones(2, 6, 5)),
    ):
        found = measure("layer", Updates.of(deltas), merged, None, None)
        values = [x for task in found.tasks if task for x in msgspec.structs.astuple(task)]
        assert torch.tensor([*values, found.outside]).isfinite().all()
    assert found.tasks[0] is not None
    found = measure("layer", Updates.of([some, untouched]), some, None, None)
    assert found.tasks[1] is None
    assert found.blocks[1] == [None, None]


def test_a_task_that_left_a_matrix_as_it_was_has_no_numbers(tmp_path: Path) -> None:
    frozen, trained = torch.randn(9, 8), torch.randn(9, 8)
    write_model(tmp_path / "base", {"frozen.weight": frozen, "trained.weight": trained})
    for i in range(3):
        update = (i < 2) * torch.randn(9, 8, generator=torch.Generator().manual_seed(i))
        write_model(tmp_path / f"task{i}", {"frozen.weight": frozen, "trained.weight": trained + update})
    (matrix,) = dcm.compare(merge(tmp_path)).matrices
    assert matrix.name == "trained.weight"
    assert matrix.ranks == [2, 2, 0]  # int(8 / 3)
    assert [task is None for task in matrix.tasks] == [False, False, True]
    assert matrix.blocks[2] == [None, None, None]
    assert len(matrix.spectra.merged.index) == 4


def test_long_spectra_are_sampled_to_their_end() -> None:
    update = cases.with_spectrum(300, 300, cases.power_law(300, 0.5), seed=1)
    curve = measure("layer", Updates.of([update]), update, None, None).spectra.merged
    assert len(curve.index) <= POINTS
    assert (curve.index[0], curve.index[-1]) == (1, 300)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Three fine-tunes of a model with two matrices and a vector, merged by DC-Merge."""
    base = {"a.2.weight": torch.randn(20, 14), "a.10.weight": torch.randn(12, 12), "norm.weight": torch.ones(14)}
    write_model(tmp_path / "base", base)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        write_model(
            tmp_path / f"task{i}",
            {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()},
        )
    return tmp_path


def merge(family: Path, method: str = "dc_merge", **options: Any) -> Path:
    out = family / f"merged_{method}"
    dcm.merge_checkpoints(family / "base", [family / f"task{i}" for i in range(3)], out, method, **options)
    return out


@pytest.mark.parametrize("method", ["dc_merge", "ties", "averaging"])
def test_a_merged_checkpoint_names_its_inputs(family: Path, method: str) -> None:
    out = merge(family, method)
    found = dcm.compare(out)
    assert (found.method, len(found.tasks), found.base) == (method, 3, str(family / "base"))
    assert [m.name for m in found.matrices] == ["a.2.weight", "a.10.weight"]  # as people count
    assert [o.name for o in found.others] == ["norm.weight"]
    base, merged = (load_file(family / name / "model.safetensors") for name in ("base", out.name))
    name = "a.2.weight"
    deltas = [load_file(family / f"task{i}" / "model.safetensors")[name] - base[name] for i in range(3)]
    expected = measure(name, Updates.of(deltas), merged[name] - base[name], None, None)
    assert found.matrices[0].tasks == expected.tasks
    assert (found.matrices[0].spectra.smoothed is not None) == (method == "dc_merge")
    for summary, i in zip(found.summary, range(3), strict=True):
        tasks = [m.tasks[i] for m in found.matrices]
        assert summary.lost == pytest.approx(sum(t.lost for t in tasks if t) / 2)


def test_some_of_the_tasks_are_refused(family: Path) -> None:
    """The share of components that counts depends on their number."""
    with pytest.raises(InputError, match=r"2 tasks for a merge of 3; give all of them, in the order of dcmerge\.json"):
        dcm.compare(merge(family), tasks=[family / "task0", family / "task1"])


def test_smoothed_spectra_are_those_of_the_run(family: Path) -> None:
    found = dcm.compare(merge(family, smoothing="average")).matrices[0].spectra
    assert found.smoothed is not None
    for task, smoothed in zip(found.tasks, found.smoothed, strict=True):
        assert task is not None
        assert smoothed is not None
        assert smoothed.values == pytest.approx([sum(task.values) / len(task.values)] * len(task.values), rel=1e-5)


def test_what_another_tool_merged_and_inputs_that_moved(family: Path) -> None:
    out = merge(family)
    expected = dcm.compare(out)
    (out / "dcmerge.json").unlink()
    with pytest.raises(InputError, match=r"no dcmerge\.json that names its tasks"):
        dcm.compare(out)
    moved = [(family / f"task{i}").rename(family / f"moved{i}") for i in range(3)]
    found = dcm.compare(out, family / "base", moved)
    assert found.method is None
    assert [m.tasks for m in found.matrices] == [m.tasks for m in expected.matrices]
    with pytest.raises(InputError, match="no such file or directory"):
        dcm.compare(out, family / "base", [family / "task0"])
    write_model(family / "other", {"a.2.weight": torch.ones(3, 3), "a.10.weight": torch.ones(12, 12)})
    with pytest.raises(InputError, match=r"a\.2\.weight"):
        dcm.compare(out, family / "other", moved)


def test_weights_and_matches_and_ranks(family: Path) -> None:
    out = merge(family, weights=[1.0, -1.0, 0.5])
    found = dcm.compare(out, match=r"a\.2\..*", rank=2)
    assert found.weights == [1.0, -1.0, 0.5]
    assert [m.name for m in found.matrices] == ["a.2.weight"]
    assert found.matrices[0].ranks == [2, 2, 2]
    assert found.others == []
    for arguments, says in (({"match": "b"}, "none of 3 tensors"), ({"match": "("}, "regular"), ({"rank": 0}, "1 or")):
        with pytest.raises(OptionError, match=says):
            dcm.compare(out, **arguments)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 100), (torch.bfloat16, 1)])
def test_rounding_adds_no_directions(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    """The merge keeps the first of two tasks with no direction in common, in files that round all they hold."""
    base = size * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    P, Q = cases.orthonormal(64, 4, 1).float(), cases.orthonormal(48, 4, 2).float()
    first, second = (P[:, i] @ Q[:, i].T for i in (slice(0, 2), slice(2, 4)))
    for name, update in (("base", 0 * first), ("first", first), ("second", second), ("merged", first)):
        write_model(tmp_path / name, {"a.weight": (base + update).to(dtype)})
    paths = [tmp_path / name for name in ("merged", "base", "first", "second")]
    (matrix,) = dcm.compare(paths[0], paths[1], paths[2:], rank=2).matrices
    assert matrix.spectra.merged.index[-1] == 4
    assert matrix.spectra.merged.values[-1] > 0  # the page shows it
    found = [task.dir_sim for task in matrix.tasks if task]
    assert found == pytest.approx([1, 0], abs=0.01)


def test_adapters_are_compared_as_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["layers.0.q_proj", "layers.1.q_proj"]
    base = {f"{name}.weight": torch.zeros(16, 12) for name in names}
    for i in range(3):
        write_adapter(tmp_path / f"task{i}", base, names[: 1 + (i > 0)], rank=2, seed=i)
    dcm.merge_checkpoints(None, [tmp_path / f"task{i}" for i in range(3)], tmp_path / "merged")
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("made dense"))
    found = dcm.compare(tmp_path / "merged")
    assert [m.ranks for m in found.matrices] == [[2, 2, 2], [0, 2, 2]]
    assert found.matrices[1].tasks[0] is None
    assert all(t.truncation_error < 1e-6 for m in found.matrices for t in m.tasks if t)


# --- the page and the command ----------------------------------------------------------------------------------------


def test_the_command_writes_both_files(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = merge(family)
    report, numbers = family / "report.html", family / "sub" / "report.json"
    assert main(["compare", str(out), "--out", str(report), "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    assert "lost most" in shown
    parsed = msgspec.json.decode(numbers.read_bytes(), type=Comparison)
    assert parsed == dcm.compare(out)
    assert json.loads(numbers.read_text())["schema"] == 1
    page = report.read_text()
    assert "a.10.weight" in page
    for asks in ('src="http', "src='http", 'href="http', "@import", "url(http"):  # nothing is fetched
        assert asks not in page
    before = report.read_bytes()
    assert main(["compare", str(out), "--out", str(report)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert report.read_bytes() == before
    assert main(["compare", str(out), "--out", str(report), "--overwrite", "-q"]) == 0
    assert sorted(p.name for p in family.glob("*.partial")) == []


def test_the_command_asks_for_a_file(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(family)]) == 1
    assert "give --out" in capsys.readouterr().err


def test_names_are_escaped(family: Path) -> None:
    odd = family / "<script>alert(1)<script>&task"
    (family / "task0").rename(odd)
    out = family / "m"
    dcm.merge_checkpoints(family / "base", [odd, family / "task1"], out)
    dcm.compare(out).save_html(family / "report.html")
    page = (family / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_no_task_is_labelled_as_another_or_as_the_merged_update() -> None:
    assert labels(["x/law", "x/code/"]) == ["law", "code"]
    for paths in (["x/law", "x/merged"], ["x/a", "y/a"], ["x/a", "x/a"]):
        assert len({*labels(paths), "merged"}) == 3, paths


def test_two_hundred_layers_stay_below_5_mb(tmp_path: Path) -> None:
    update = torch.randn(2, 64, 64)
    one = measure("x", Updates.of(list(update)), update.sum(0), None, lambda spectra, _: spectra)
    matrices = [msgspec.structs.replace(one, name=f"model.layers.{i}.self_attn.q_proj.weight") for i in range(200)]
    family = Comparison(1, "0", "m", "b", ["t/1", "t/2"], [1, 1], "ties", {}, 1.0, [], matrices, [])
    family.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_the_page_says_what_it_needs(family: Path) -> None:
    out = merge(family)
    code = f"""
import sys
sys.modules["altair"] = None
from dcmerge_ext.cli import main
assert main(["compare", {str(out)!r}, "--json", {str(family / "n.json")!r}, "-q"]) == 0
sys.exit(main(["compare", {str(out)!r}, "--out", {str(family / "n.html")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "pip install 'dcmerge-ext[compare]'" in done.stderr
    assert (family / "n.json").exists()
    assert not (family / "n.html").exists()


def test_nan_in_the_merged_checkpoint_is_named(family: Path) -> None:
    out = merge(family)
    tensors = load_file(out / "model.safetensors")
    tensors["a.2.weight"][0, 0] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"a\.2\.weight"):
        dcm.compare(out)

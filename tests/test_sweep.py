"""The search of the scale: one merge, the bytes of a merge at the scale that won."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import refused, run
from safetensors.torch import load_file

import dcmerge_ext
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.methods.dc_merge import DCMerge

Capsys = pytest.CaptureFixture[str]
BASE = families.toy()
SCALES = (0.5, 1.0, 2.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "base", BASE)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [families.write_model(tmp_path / f"task{i}", families.tuned(BASE, i)) for i in range(2)]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [families.write_adapter(tmp_path / f"adapter{i}", BASE, rank=2 + i, seed=i) for i in range(2)]


def weights(directory: Path) -> dict[str, bytes | str | None]:
    return {name: data for name, data in families.tree(directory).items() if name.endswith(".safetensors")}


def norm(directory: Path) -> float:
    """A score that differs between scales."""
    tensors = [t for file in directory.glob("*.safetensors") for t in load_file(file).values() if t.is_floating_point()]
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def nearest_to(scale: float) -> Any:
    """An evaluation that ``scale`` wins, whatever is merged: counts its calls."""
    scores = iter([-abs(s - scale) for s in SCALES])
    return lambda directory: next(scores)


class TestTheWinner:
    @pytest.mark.parametrize("method", ["dc_merge", "ties", "averaging", "task_arithmetic"])
    @pytest.mark.parametrize(
        "settings", [{}, {"dtype": "bfloat16"}, {"weights": [1.0, 0.5, 1.0, 2.0], "shard_size": "2KB"}]
    )
    def test_holds_the_bytes_of_a_merge_at_its_scale(
        self,
        method: str,
        settings: dict[str, Any],
        base: Path,
        models: list[Path],
        adapters: list[Path],
        tmp_path: Path,
    ) -> None:
        tasks = [*models, *adapters]
        report = dcmerge_ext.sweep(base, tasks, tmp_path / "best", nearest_to(2.0), SCALES, method, **settings)
        assert report.best == 2.0
        direct = dcmerge_ext.merge_checkpoints(base, tasks, tmp_path / "direct", method, 2.0, **settings)
        assert weights(tmp_path / "best") == weights(tmp_path / "direct") != {}
        found, expected = report.merge.record, direct.record
        assert found.pop("sweep") == [{"scale": s, "score": -abs(s - 2.0)} for s in SCALES]
        assert found.pop("config") == {**expected.pop("config"), "out": str(tmp_path / "best")}
        assert found == expected

    @pytest.mark.parametrize("settings", [{}, {"adapter_rank": 3}])
    def test_of_adapters(self, settings: dict[str, Any], adapters: list[Path], tmp_path: Path) -> None:
        dcmerge_ext.sweep(None, adapters, tmp_path / "best", nearest_to(0.5), SCALES, **settings)
        dcmerge_ext.merge_checkpoints(None, adapters, tmp_path / "direct", scale=0.5, **settings)
        assert weights(tmp_path / "best") == weights(tmp_path / "direct") != {}

    def test_leaves_overrides_their_own_scale(self, base: Path, models: list[Path], tmp_path: Path) -> None:
        overrides = [{"match": ".*bias", "scale": 0.25}]
        dcmerge_ext.sweep(base, models, tmp_path / "best", nearest_to(1.0), SCALES, overrides=overrides)
        dcmerge_ext.merge_checkpoints(base, models, tmp_path / "direct", scale=1.0, overrides=overrides)
        assert weights(tmp_path / "best") == weights(tmp_path / "direct")

    def test_is_the_first_of_equals_or_the_lowest(self, base: Path, models: list[Path], tmp_path: Path) -> None:
        equal = dcmerge_ext.sweep(base, models, tmp_path / "equal", lambda directory: 1.0, SCALES)
        assert equal.best == 0.5
        lowest = dcmerge_ext.sweep(base, models, tmp_path / "low", nearest_to(1.0), SCALES, maximize=False)
        assert lowest.best == 2.0
        assert lowest.scores == (-0.5, 0.0, -1.0)


def test_candidates_are_complete_checkpoints_at_their_scales(base: Path, models: list[Path], tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(directory: Path) -> float:
        assert (directory / "config.json").exists() == (base / "config.json").exists()
        seen.append(families.read_model(directory))
        return 0.0

    dcmerge_ext.sweep(base, models, tmp_path / "best", evaluate, SCALES)
    for scale, found in zip(SCALES, seen, strict=True):
        dcmerge_ext.merge_checkpoints(base, models, tmp_path / f"at{scale}", scale=scale)
        expected = families.read_model(tmp_path / f"at{scale}")
        assert all(families.same_bits(found[name], expected[name]) for name in expected)


def test_merges_once(base: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    merge = DCMerge.merge

    def counted(self: DCMerge, updates: Any, ctx: Any) -> Any:
        keys.append(ctx.key)
        return merge(self, updates, ctx)

    monkeypatch.setattr(DCMerge, "merge", counted)
    dcmerge_ext.sweep(base, models, tmp_path / "best", norm, SCALES)
    assert keys
    assert len(keys) == len(set(keys))


def test_scales_are_multiples_of_the_default_where_none_are_given(
    base: Path, models: list[Path], tmp_path: Path
) -> None:
    report = dcmerge_ext.sweep(base, models, tmp_path / "best", norm)
    assert report.scales == (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    assert report.scores == tuple(sorted(report.scores))  # the norm grows with the scale
    assert report.best == 3.0


class TestRefusals:
    @pytest.mark.parametrize("scales", [(), (1.0, 1.0), (1.0, math.nan), (math.inf,)])
    def test_of_scales(self, scales: tuple[float, ...], base: Path, models: list[Path], tmp_path: Path) -> None:
        before = families.tree(tmp_path)
        with pytest.raises(OptionError, match="scales must be finite numbers, each once"):
            dcmerge_ext.sweep(base, models, tmp_path / "best", norm, scales)
        assert families.tree(tmp_path) == before

    def test_of_a_single_scale(self, base: Path, models: list[Path], tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="give scales"):
            dcmerge_ext.sweep(base, models, tmp_path / "best", norm, scale=1.0)

    @pytest.mark.parametrize("score", [math.nan, math.inf, None, "high"])
    def test_of_a_score(self, score: Any, base: Path, models: list[Path], tmp_path: Path) -> None:
        before = families.tree(tmp_path)
        with pytest.raises(InputError, match=r"at scale 0\.5; it must return a finite number"):
            dcmerge_ext.sweep(base, models, tmp_path / "best", lambda directory: score, SCALES)
        assert families.tree(tmp_path) == before

    def test_an_evaluation_that_raises_leaves_nothing(self, base: Path, models: list[Path], tmp_path: Path) -> None:
        def evaluate(directory: Path) -> float:
            raise RuntimeError("no validation data")

        before = families.tree(tmp_path)
        with pytest.raises(RuntimeError, match="no validation data"):
            dcmerge_ext.sweep(base, models, tmp_path / "best", evaluate, SCALES)
        assert families.tree(tmp_path) == before

    def test_an_output_that_exists(self, base: Path, models: list[Path], tmp_path: Path) -> None:
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / "precious").write_text("")
        with pytest.raises(InputError, match="exists already"):
            dcmerge_ext.sweep(base, models, tmp_path / "best", norm, SCALES)


class TestTheCommand:
    @pytest.fixture
    def arguments(self, base: Path, models: list[Path]) -> list[str | Path]:
        return ["--base", base, "--task", models[0], "--task", models[1]]

    @pytest.fixture
    def evaluation(self, tmp_path: Path) -> Path:
        path = tmp_path / "evaluation.py"
        path.write_text(
            "from safetensors.torch import load_file\n"
            "NOT_A_FUNCTION = 1\n"
            "def score(directory):\n"
            "    return -sum(t.double().norm().item() for t in load_file(directory / 'model.safetensors').values())\n"
            "def fails(directory):\n"
            "    raise ValueError('no data')\n"
        )
        return path

    def test_prints_and_writes(
        self, arguments: list[str | Path], evaluation: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        out = tmp_path / "best"
        done = run(
            capsys, "sweep", *arguments, "--out", out, "--scales", "2", "0.5", "1", "--evaluate", f"{evaluation}:score"
        )
        assert done.status == 0, done.err
        assert "best" in next(line for line in done.out.splitlines() if line.lstrip("│ ").startswith("0.5"))
        assert f"{out}: scale 0.5" in done.out.replace("\n", "")
        assert "at the edge of those tried" in done.out
        dcmerge_ext.merge_checkpoints(*[arguments[1], [arguments[3], arguments[5]], tmp_path / "direct"], scale=0.5)
        assert weights(out) == weights(tmp_path / "direct")

    def test_lowest(self, arguments: list[str | Path], evaluation: Path, tmp_path: Path, capsys: Capsys) -> None:
        done = run(
            capsys, "sweep", *arguments, "--out", tmp_path / "best", "--scales", "1", "2", "--minimize",
            "--evaluate", f"{evaluation}:score", "--set", "rank=2",
        )  # fmt: skip
        assert done.status == 0, done.err
        assert "scale 2 in" in done.out.replace("\n", " ")

    def test_a_best_scale_between_others_is_no_edge(
        self, arguments: list[str | Path], evaluation: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        evaluation.write_text("calls = iter([1, 3, 2])\ndef score(directory):\n    return next(calls)\n")
        done = run(
            capsys, "sweep", *arguments, "--out", tmp_path / "best", "--scales", "1", "2", "3",
            "--evaluate", f"{evaluation}:score",
        )  # fmt: skip
        assert done.status == 0, done.err
        assert "scale 2 in" in done.out.replace("\n", " ")
        assert "edge" not in done.out

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("score", "write FILE.py:FUNCTION or MODULE:FUNCTION"),
            ("missing.py:score", "missing.py does not exist"),
            ("{evaluation}:other", "has no function 'other'"),
            ("{evaluation}:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
            ("no_such_module_anywhere:score", "fails to import (ModuleNotFoundError"),
        ],
    )
    def test_evaluations_that_cannot_be_found(
        self, text: str, says: str, arguments: list[str | Path], evaluation: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        refused(
            capsys, tmp_path, *arguments, "--out", tmp_path / "best", "--evaluate", text.format(evaluation=evaluation),
            command="sweep", says=[says],
        )  # fmt: skip

    def test_an_evaluation_that_raises(
        self, arguments: list[str | Path], evaluation: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        before = families.tree(tmp_path)
        done = run(capsys, "sweep", *arguments, "--out", tmp_path / "best", "--evaluate", f"{evaluation}:fails", "-q")
        assert done.status == 1
        assert f"evaluation.py:fails: failed (ValueError: no data; {evaluation}:6)" in done.err.replace("\n", "")
        assert families.tree(tmp_path) == before

    def test_a_file_that_fails(self, arguments: list[str | Path], tmp_path: Path, capsys: Capsys) -> None:
        (tmp_path / "broken.py").write_text("1 / 0\n")
        refused(
            capsys, tmp_path, *arguments, "--out", tmp_path / "best", "--evaluate", f"{tmp_path}/broken.py:f",
            command="sweep", says=["broken.py fails to import (ZeroDivisionError"],
        )  # fmt: skip

    def test_a_scale(self, arguments: list[str | Path], evaluation: Path, tmp_path: Path, capsys: Capsys) -> None:
        refused(
            capsys, tmp_path, *arguments, "--out", tmp_path / "best", "--evaluate", f"{evaluation}:score",
            "--scale", "1", command="sweep", says=["scale is what a sweep searches; give scales (--scales)"],
        )  # fmt: skip

    def test_a_scale_in_the_configuration_file(
        self, arguments: list[str | Path], evaluation: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        (tmp_path / "merge.yaml").write_text("scale: 1.5\n")
        refused(
            capsys, tmp_path, *arguments, "--out", tmp_path / "best", "--evaluate", f"{evaluation}:score",
            "--config", tmp_path / "merge.yaml", command="sweep", says=["scale is what a sweep searches"],
        )  # fmt: skip


def test_what_a_killed_run_leaves_is_in_one_place(base: Path, models: list[Path], tmp_path: Path) -> None:
    """All that a sweep writes lies in OUT.partial, which the next run names and --overwrite takes away."""
    before, seen = families.tree(tmp_path), []

    def look(directory: Path) -> float:
        seen.append({path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path not in before})
        return 0.0

    dcmerge_ext.sweep(base, models, tmp_path / "out", look, [0.5, 1.0])
    assert all("out.partial" in names for names in seen)
    new = {path.name for path in tmp_path.iterdir()} | {"out.partial"}
    assert all(names <= new for names in seen)
    assert not any(path.name.startswith("sweep-") for path in (tmp_path / "out").iterdir())

"""The demo: its data, one quick run from end to end, and what it says."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dcmerge_ext.cli import main
from dcmerge_ext.demo import DemoResult, FamilyResult, Row, report, run, run_demo, training
from dcmerge_ext.demo.data import QUESTIONS, TASKS, load_splits, num_outputs, outputs_of
from dcmerge_ext.demo.environment import prepare_folder, quiet_libraries
from dcmerge_ext.errors import InputError, RunError
from dcmerge_ext.metrics import normalized_accuracy

METHODS = ["averaging", "task_arithmetic", "ties", "dc_merge"]


# --- data ---------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_complete_and_stratified() -> None:
    splits = load_splits(0)
    parts = [splits.base, splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [400, 697, 300, 400]
    index = torch.cat([part.index for part in parts])
    assert index.sort().values.tolist() == list(range(1797))
    whole = torch.cat([part.digits for part in parts]).bincount(minlength=10) / 1797
    for part in parts:
        share = part.digits.bincount(minlength=10) / len(part)
        assert (share - whole).abs().max() < 0.005
        assert part.pixels.shape == (len(part), 8, 8)
        assert part.pixels.min() == 0
        assert part.pixels.max() == 1


def test_splits_depend_on_the_seed_alone() -> None:
    first, again, other = (load_splits(seed).test for seed in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels)
    assert first.index.tolist() == again.index.tolist() != other.index.tolist()


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("which digit?", "0123456789"),
        ("odd or even?", ["even", "odd"] * 5),
        ("how many closed loops?", "1000001021"),
        ("greater than four?", ["no"] * 5 + ["yes"] * 5),
        ("prime number?", ["no", "no", "yes", "yes", "no", "yes", "no", "yes", "no", "no"]),
    ],
)
def test_labels_are_right(question: str, expected: list[str]) -> None:
    asked = next(q for q in QUESTIONS if q.text == question)
    assert [asked.answers[i] for i in asked.label(torch.arange(10)).tolist()] == list(expected)


def test_questions_share_out_the_classifier() -> None:
    outputs = [i for question in QUESTIONS for i in range(num_outputs())[outputs_of(question)]]
    assert outputs == list(range(num_outputs())) == list(range(19))
    assert {task.question.text for task in TASKS} == {question.text for question in QUESTIONS}


@pytest.mark.parametrize(
    ("task", "where", "value"),
    [
        ("upside_down", (7, 6), 1),
        ("negative", (0, 1), 0),
        ("striped", (0, 1), 0),
        ("mirrored", (0, 6), 1),
        ("sideways", (6, 0), 1),
    ],
)
def test_tasks_show_the_image_in_their_way(task: str, where: tuple[int, int], value: float) -> None:
    dot = torch.zeros(1, 8, 8)
    dot[0, 0, 1] = 1
    shown = next(t for t in TASKS if t.name == task).show(dot)
    assert shown.shape == dot.shape
    assert shown[0][where] == value
    background = {"negative": 63, "striped": 31}.get(task, 0)  # bright pixels beside the dot's own
    assert shown.sum() == background + value


# --- normalized accuracy ------------------------------------------------------------------------------------------


def test_normalized_accuracy_is_the_mean_of_the_ratios() -> None:
    assert normalized_accuracy([0.4, 0.9], [0.8, 0.9]) == pytest.approx(0.75)  # the ratio of the means is 0.765
    assert normalized_accuracy([50.0], [40.0]) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("merged", "finetuned", "message"),
    [
        ([0.5, 0.5], [0.9, 0.0], "task 1 has accuracy 0.0"),
        ([0.5], [float("nan")], "task 0 has accuracy nan"),
        ([0.5], [0.9, 0.9], "1 of the merged model and 2 of"),
        ([], [], "0 of the merged model and 0 of"),
    ],
)
def test_normalized_accuracy_refuses(merged: list[float], finetuned: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        normalized_accuracy(merged, finetuned)


# --- a quick run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Result and printed text of a quick run, and the global state before and after it."""
    import transformers

    def state() -> tuple[Any, ...]:
        logging = transformers.utils.logging
        return (
            torch.get_rng_state().tolist(), torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled(),
        )  # fmt: skip

    torch.set_num_threads(2)
    try:
        before = state()
        text = io.StringIO()
        out = tmp_path_factory.mktemp("demo") / "digits"
        result = run_demo(out, seed=5, quick=True, console=Console(file=text, width=80))
        after = state()
    finally:
        torch.set_num_threads(1)
    return SimpleNamespace(result=result, text=text.getvalue(), before=before, after=after)


def test_quick_run_leaves_global_state_as_it_was(quick: Any) -> None:
    assert quick.before == quick.after


def test_tables_have_every_row(quick: Any) -> None:
    assert [family.name for family in quick.result.families] == ["full", "lora"]
    for family in quick.result.families:
        assert [row.method for row in family.rows] == ["zero-shot", "fine-tuned", *METHODS]
        for row in family.rows:
            assert len(row.accuracies) == len(TASKS)
            assert all(0 <= share <= 1 for share in row.accuracies)
            assert row.normalized_accuracy == normalized_accuracy(row.accuracies, family.row("fine-tuned").accuracies)
        assert [row.method for row in family.merges] == METHODS
        assert [row.default_scale for row in family.merges] == [1.0, 0.3, 1.0, 2.0]
        assert all(row.seconds is not None and row.seconds > 0 for row in family.merges)


def test_scale_is_the_best_on_validation(quick: Any) -> None:
    for family in quick.result.families:
        averaging, *others = family.merges
        assert (averaging.scale, averaging.validation_curve) == (1.0, None)
        for row in others:
            best = max(zip(row.validation_curve, [-s for s in quick.result.scales], strict=True))  # first of equals
            assert row.scale == -best[1]


def test_checkpoints_are_ordinary_and_are_what_was_measured(quick: Any) -> None:
    out = quick.result.out
    test = load_splits(quick.result.seed).test
    saved = json.loads(quick.result.results.read_text())
    assert (saved["seed"], saved["quick"], saved["num_test"]) == (5, True, 400)
    for family, entry in zip(quick.result.families, saved["families"], strict=True):
        rows = {row["method"]: row for row in entry["rows"]}
        assert rows["zero-shot"]["accuracies"] == training.accuracies(training.load_model(out / "base"), test)
        with quiet_libraries():
            tuned = [training.load_tuned(out, family.name, task.name) for task in TASKS]
        measured = [training.accuracy(model, test, task) for model, task in zip(tuned, TASKS, strict=True)]
        assert rows["fine-tuned"]["accuracies"] == measured
        for method in METHODS:
            checkpoint = out / rows[method]["checkpoint"]
            assert checkpoint == out / "merged" / f"{family.name}_{method}"
            assert rows[method]["accuracies"] == training.accuracies(training.load_model(checkpoint), test)
            assert json.loads((checkpoint / "dcmerge.json").read_text())["scale"] == rows[method]["scale"]
            assert rows[method]["mean_accuracy"] == pytest.approx(sum(rows[method]["accuracies"]) / len(TASKS))


def test_fine_tunes_change_all_but_the_classifier(quick: Any) -> None:
    base = load_file(quick.result.out / "base" / "model.safetensors")
    for task in TASKS:
        tuned = load_file(quick.result.out / "full" / task.name / "model.safetensors")
        unchanged = {name for name, weight in tuned.items() if torch.equal(weight, base[name])}
        assert unchanged == {"classifier.weight", "classifier.bias"}


def test_adapters_cover_every_linear_layer_but_the_classifier(quick: Any) -> None:
    for task in TASKS:
        directory = quick.result.out / "lora" / task.name
        config = json.loads((directory / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (8, 16)
        assert config["base_model_name_or_path"] == str(quick.result.out / "base")
        factors = load_file(directory / "adapter_model.safetensors")
        assert len(factors) == 3 * 6 * 2  # layers, linear layers in each, factors
        assert not any("classifier" in name for name in factors)
        assert all(weight.abs().max() > 0 for weight in factors.values())


def test_averaging_is_the_mean_of_the_fine_tuned_weights(quick: Any) -> None:
    out = quick.result.out
    tuned = [load_file(out / "full" / task.name / "model.safetensors") for task in TASKS]
    merged = load_file(out / "merged" / "full_averaging" / "model.safetensors")
    for name, weight in merged.items():
        mean = torch.stack([weights[name].double() for weights in tuned]).mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=0, atol=4e-7 * float(mean.abs().max()))


def test_printed_command_writes_the_same_model(quick: Any) -> None:
    out = quick.result.out
    program, *arguments = report.command(quick.result)
    assert program == "dcmerge"
    assert " ".join([program, *arguments]) in quick.text
    assert main([*arguments, "-q"]) == 0
    by_hand, merged = (out / "merged" / name / "model.safetensors" for name in ("by_hand", "lora_dc_merge"))
    assert by_hand.read_bytes() == merged.read_bytes()


def test_everything_printed_fits_a_terminal(quick: Any) -> None:
    for title in ("Full fine-tunes: accuracy", "LoRA adapters: accuracy", "normalized accuracy", "Quick run:"):
        assert title in quick.text
    tables = [line for line in quick.text.splitlines() if not line.startswith(("dcmerge merge", "Picture:"))]
    assert max(map(len, tables)) <= 80
    assert "…" not in quick.text
    rows = quick.result.family("full").rows
    line = next(line for line in quick.text.splitlines() if line.strip().startswith("normalized accuracy"))
    assert line.split()[2:] == [f"{100 * row.normalized_accuracy:.1f}" for row in rows]


def test_picture_is_drawn(quick: Any) -> None:
    from matplotlib.image import imread

    pixels = imread(quick.result.picture)
    assert pixels.shape[0] > 1000
    assert pixels.shape[1] > 1500
    assert pixels[..., :3].std() > 0.1  # a blank page has none


# --- the folder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_splits", lambda seed: pytest.fail("work began before the folder was checked"))


@pytest.mark.usefixtures("no_training")
def test_existing_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="not empty; choose another --out or pass --overwrite"):
        run_demo(tmp_path)
    with pytest.raises(InputError, match=r"not an earlier demo \(no results.json\)"):
        run_demo(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="not empty"):
        run_demo(tmp_path / "mine.txt")
    with pytest.raises(InputError, match="cannot be made"):
        run_demo(tmp_path / "mine.txt" / "below")
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(InputError, match=f"seed {seed}: needs a whole number"):
        run_demo(tmp_path / "new", seed=seed)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_training")
def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = ("peft", "sklearn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(InputError, match=r"needs scikit-learn, peft; install with: pip install 'dcmerge-ext\[demo\]'"):
        run_demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_overwriting_removes_only_what_a_demo_wrote(tmp_path: Path) -> None:
    for name in ("base/model", "merged/full_ties/model", "results.json", "demo.png", "mine.txt", "notes/mine"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    prepare_folder(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "notes"]
    assert (tmp_path / "notes" / "mine").exists()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failed_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, expected: type[BaseException]
) -> None:
    def fail(model: Any, directory: Path) -> None:
        directory.mkdir()
        raise raised

    monkeypatch.setattr(run, "_QUICK", run._Effort(base_steps=1, steps=1, scales=[1.0]))
    monkeypatch.setattr(training, "save_model", fail)
    with pytest.raises(expected, match="No space left" if expected is RunError else None):
        run_demo(tmp_path / "new", quick=True, console=Console(quiet=True))
    assert not (tmp_path / "new").exists()


# --- the words ----------------------------------------------------------------------------------------------------


def _result(out: Path, full: dict[str, float], lora: dict[str, float]) -> DemoResult:
    """A result in which every method has one given accuracy on all tasks, and the fine-tuned models are perfect."""

    def family(name: str, shares: dict[str, float]) -> FamilyResult:
        rows = [Row("zero-shot", [0.5] * 5, 0.5), Row("fine-tuned", [1.0] * 5, 1.0)]
        rows += [
            Row(m, [x] * 5, x, scale=1.0, seconds=0.5, default_scale=1.0, normalized_at_default=x)
            for m, x in shares.items()
        ]
        return FamilyResult(name, rows)

    return DemoResult(out, 0, False, [1.0], 400, 300, [family("full", full), family("lora", lora)], 60.0)


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    def explain(*shares: float) -> list[str]:
        family = dict(zip(METHODS, shares, strict=True))
        return report.explain(_result(tmp_path, family, family))

    return explain


def test_words_name_whichever_method_wins(words: Callable[..., list[str]]) -> None:
    full, lora, merging, chance = words(0.6, 0.7, 0.95, 0.8)
    assert "TIES 95.0%, DC-Merge 80.0%, task arithmetic 70.0%, averaging 60.0%; TIES is ahead by 15.0 points." in full
    assert lora.startswith("LoRA adapters: the base alone is right in 50.0% of cases")
    assert "Full fine-tunes, TIES (95.0% at scale 1); LoRA adapters, TIES (95.0% at scale 1)" in merging
    assert "0.50 s per merge" in merging
    # 2 sqrt(2 * 0.6 * 0.4 / (5 * 400))
    assert "gaps under about 3.1 points may be chance" in chance


def test_words_call_a_small_gap_chance(words: Callable[..., list[str]]) -> None:
    assert "the first two differ by 2.0 points, which may be chance" in words(0.6, 0.7, 0.8, 0.82)[0]
    assert "DC-Merge is ahead by 4.0 points" in words(0.6, 0.7, 0.8, 0.84)[0]

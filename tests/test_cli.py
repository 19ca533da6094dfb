"""The command line: what it prints, and configuration from files and arguments together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from families import Result, merged, run, same_bits, tasks
from safetensors import safe_open

import dcmerge_ext
from dcmerge_ext import list_methods
from dcmerge_ext.checkpoints import files
from dcmerge_ext.cli import main
from dcmerge_ext.methods.registry import describe_options

METHODS = [name for name in list_methods() if name not in cases.LORA_ONLY]
BASE = families.toy()
TUNED = [families.tuned(BASE, seed) for seed in range(2)]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Path]]:
    """Base, fine-tunes, adapters."""
    folder = tmp_path_factory.mktemp("family")
    return (
        families.write_model(folder / "base", BASE),
        [families.write_model(folder / f"task{i}", model) for i, model in enumerate(TUNED)],
        [families.write_adapter(folder / f"adapter{i}", BASE, rank=2 + i, seed=i) for i in range(2)],
    )


Family = tuple[Path, list[Path], list[Path]]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without line breaks in their cells."""
    monkeypatch.setenv("COLUMNS", "400")


def words(text: str) -> str:
    """Text without table borders and line breaks."""
    return " ".join(re.sub(r"[│┃┏┓┗┛━┳┻┡┩╇┴┬─└┘┌┐├┤┼╞╡╪═]", " ", text).split())


class TestMerge:
    def test_says_what_it_did(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, adapters = family
        out = tmp_path / "out"
        result = run(capsys, "merge", "--base", base, *tasks(*models, *adapters), "--out", out, "--scale", "1.25")
        assert result.status == 0
        lines = result.out.splitlines()
        assert len(lines) == 1
        assert re.fullmatch(
            re.escape(f"{out}: dc_merge of 4 tasks at scale 1.25, saved as full in ")
            + r"\d+\.\d s \(7 tensors merged, 3 averaged, 4 copied\)",
            lines[0],
        )

    @pytest.mark.parametrize("save_as", ["full", "adapter"])
    def test_quiet_is_silent(self, save_as: str, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        """Also where there are notes and warnings."""
        base, _models, adapters = family
        half = families.toy(dtype=torch.bfloat16)
        base = families.write_model(tmp_path / "base", half)
        more = families.write_model(tmp_path / "t", {**families.tuned(half, 0, 0.002), "more": torch.ones(1)})
        chosen = tasks(more) if save_as == "full" else tasks(*adapters)
        arguments = ("--base", base, *chosen, "--extra", "ignore", "--save-as", save_as)
        loud = run(capsys, "merge", "--out", tmp_path / "loud", *arguments)
        assert loud.status == 0
        assert loud.out
        result = run(capsys, "merge", "--out", tmp_path / "out", *arguments, "-q")
        assert result == Result(0, "", "")

    def test_errors_are_not_quiet(self, tmp_path: Path, capsys: Capsys) -> None:
        result = run(capsys, "merge", "-q", "--base", tmp_path / "absent", "--task", "x", "--out", tmp_path / "out")
        assert result.status == 1
        assert result.err.startswith("error: ")

    def test_progress_reaches_the_end(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        for method in METHODS:
            arguments = ("--base", base, *tasks(*models), "--method", method)
            result = run(capsys, "merge", "--out", tmp_path / method, *arguments)
            assert "100%" in result.err

    @pytest.mark.parametrize("flags", [[], ["-q"], ["-v"]])
    def test_dry_run_is_plan(self, flags: list[str], family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        arguments = ("--base", base, *tasks(*models), "--out", tmp_path / "out", *flags)
        dry = run(capsys, "merge", "--dry-run", *arguments)
        planned = run(capsys, "plan", *arguments)
        assert dry.status == planned.status == 0
        assert list(tmp_path.iterdir()) == []
        without_times = [re.sub(r"about [\d.]+ \w+,", "", r.out) for r in (dry, planned)]
        assert without_times[0] == without_times[1]

    def test_handlers_of_logging_are_taken_back(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        import logging

        base, models, _ = family
        package = logging.getLogger("dcmerge_ext")
        before = [*package.handlers], [*logging.getLogger("py.warnings").handlers]
        run(capsys, "merge", "--base", base, *tasks(*models), "--out", tmp_path / "out")
        run(capsys, "merge", "--base", "absent path", *tasks(*models), "--out", tmp_path / "out")
        assert ([*package.handlers], [*logging.getLogger("py.warnings").handlers]) == before

    def test_seed_is_an_option_of_the_method(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        arguments = ("--base", base, *tasks(*models))
        merged(capsys, tmp_path / "out", *arguments, "--seed", "7")
        assert json.loads((tmp_path / "out" / "dcmerge.json").read_text())["options"]["seed"] == 7

    def test_values_of_set(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        """YAML scalars, lists too; the last of a key wins; null is the default."""
        base, models, _ = family
        given = ["rank=2", "rank=3", "smoothing=linear", "rho=2", "keep=null", "block_size=0", "count_base=min_dim"]
        arguments = [argument for text in given for argument in ("--set", text)]
        merged(capsys, tmp_path / "out", "--base", base, *tasks(*models), *arguments)
        options = json.loads((tmp_path / "out" / "dcmerge.json").read_text())["options"]
        expected = {"rank": 3, "smoothing": "linear", "rho": 2, "keep": None, "block_size": 0, "count_base": "min_dim"}
        assert {k: options[k] for k in expected} == expected

    @pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001"])
    def test_numbers_as_people_write_them(self, text: str, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        """YAML 1.1 takes 1e-3, the published value, for a string."""
        base, models, _ = family
        merged(capsys, tmp_path / "1", "--base", base, *tasks(*models), "--set", f"keep={text}")
        assert json.loads((tmp_path / "1" / "dcmerge.json").read_text())["options"]["keep"] == 1e-3
        file = tmp_path / "merge.yaml"
        file.write_text(f"options: {{keep: {text}}}\nscale: {text}\n")
        merged(capsys, tmp_path / "2", "--base", base, *tasks(*models), "--config", file)
        record = json.loads((tmp_path / "2" / "dcmerge.json").read_text())
        assert (record["options"]["keep"], record["scale"]) == (1e-3, 1e-3)

    def test_every_note_appears_once(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, _models, _ = family
        more = families.write_model(tmp_path / "more", {**TUNED[0], "more": torch.ones(2)})
        file = tmp_path / "merge.yaml"
        file.write_text("overrides: [{match: nothing, action: copy}]")
        arguments = ("--base", base, *tasks(more), "--extra", "ignore", "--config", file)
        text = words(run(capsys, "merge", "--out", tmp_path / "out", *arguments).err)
        assert text.count("that the base does not have are left out") == 1
        assert text.count("override 'nothing' matches no tensor") == 1

    def test_a_rank_per_task(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        merged(capsys, tmp_path / "out", "--base", base, *tasks(*models), "--set", "rank=[1, 3]")
        record = json.loads((tmp_path / "out" / "dcmerge.json").read_text())
        assert record["options"]["rank"] == [1, 3]
        assert next(t for t in record["tensors"] if t["name"] == "lm_head.weight")["rank"] == [1, 3]


@pytest.mark.usefixtures("wide")
class TestPlan:
    @pytest.fixture
    def no_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reading a tensor fails."""

        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a plan must not read tensors")

        monkeypatch.setattr(files.SafetensorsFile, "read", forbidden)

    def plan(self, capsys: Capsys, *arguments: str | Path) -> str:
        result = run(capsys, "plan", *arguments)
        assert result.status == 0, result.err
        return words(result.out)

    @pytest.mark.usefixtures("no_data")
    @pytest.mark.parametrize("method", METHODS)
    def test_counts_and_estimates_from_headers(
        self, method: str, family: Family, tmp_path: Path, capsys: Capsys
    ) -> None:
        base, models, adapters = family
        chosen = tasks(*models, *adapters)
        text = self.plan(capsys, "--base", base, *chosen, "--out", tmp_path / "out", "--method", method)
        assert f"{method} of 4 tasks at scale" in text
        assert f"saved as full -> {tmp_path / 'out'}" in text
        merged_count, mean_count = (10, 0) if list_methods()[method].elementwise else (7, 3)
        for action, count in (("merge", merged_count), ("mean", mean_count), ("copy", 4)):
            assert f" {action} {count} " in text
        assert "not floating point" in text
        stages = r"read [\d.]+ \w+ [\d.]+ s compute [\d.]+ s write [\d.]+ \w+ [\d.]+ s"
        assert re.search(stages + r" about [\d.]+ \w+, peak memory about [\d.]+ \w+", text)
        assert list(tmp_path.iterdir()) == []

    def test_bytes_it_gives(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        text = self.plan(capsys, "--base", base, *tasks(*models), "--out", tmp_path / "out", "--method", "averaging")
        written = sum(values.nbytes for values in BASE.values())
        floating = sum(values.nbytes for values in BASE.values() if values.is_floating_point())
        reads, writes = re.search(r"read ([\d.]+) KB .* write ([\d.]+) KB", text).groups()  # type: ignore[union-attr]
        assert float(writes) == pytest.approx(written / 1000, rel=0.01)
        assert float(reads) == pytest.approx((written + 2 * floating) / 1000, rel=0.01)

    @pytest.mark.usefixtures("no_data")
    def test_verbose_lists_every_tensor(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        text = self.plan(capsys, "-v", "--base", base, *tasks(*models), "--out", tmp_path / "out", "--scale", "1.5")
        for name, values in BASE.items():
            shape = "x".join(map(str, values.shape)) or "scalar"
            assert f"{name} {shape} {str(values.dtype).removeprefix('torch.')}" in text
        assert "lm_head.weight 20x8 float32 merge dc_merge 1.5" in text
        assert "layers.0.norm.weight 8 float32 mean averaging 1.5" in text
        assert "mask 2x2 bool copy" in text

    @pytest.mark.parametrize("columns", ["80", "60"])
    def test_names_are_complete_on_a_narrow_terminal(
        self, columns: str, family: Family, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And where the output is piped, which counts as 80 columns."""
        monkeypatch.setenv("COLUMNS", columns)
        base, models, _ = family
        text = self.plan(capsys, "-v", "--base", base, *tasks(*models), "--out", tmp_path / "out")
        assert "…" not in text
        assert all(name in text or name in text.replace(" ", "") for name in BASE)

    @pytest.mark.usefixtures("no_data")
    def test_rank_of_merged_adapters(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        _, _, adapters = family
        text = self.plan(capsys, "-v", *tasks(*adapters), "--out", tmp_path / "out")
        assert "saved as adapter" in text
        assert "layers.0.attn.weight 12x8 float32 merge dc_merge 2 5" in text

    @pytest.mark.usefixtures("no_data")
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--method", "tie"], "did you mean 'ties'?"),
            (["--set", "rank=9"], "exceeds min(m, n)"),
            (["--save-as", "adapter"], "full fine-tune"),
            (["--task", "WIDE"], "9x12"),
            (["--out", "BASE"], "is, or holds, the input"),
        ],
    )
    def test_finds_problems_without_reading_data(
        self, arguments: list[str], says: str, family: Family, tmp_path: Path, capsys: Capsys
    ) -> None:
        base, models, _ = family
        if "WIDE" in arguments:
            wide = families.write_model(tmp_path / "wide", {**TUNED[0], "layers.0.mlp.weight": torch.zeros(9, 12)})
            arguments = ["--task", str(wide)]
        if "BASE" in arguments:
            arguments = ["--out", str(base)]
        families.refused(
            capsys, tmp_path, "--base", base, *tasks(*models), "--out", tmp_path / "out", *arguments,
            command="plan", says=[says],
        )  # fmt: skip

    def test_quiet(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        result = run(capsys, "plan", "-q", "--base", base, *tasks(*models), "--out", tmp_path / "out")
        assert result == Result(0, "", "")

    def test_notes(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, _models, _ = family
        more = families.write_model(tmp_path / "more", {**TUNED[0], "more": torch.ones(2)})
        text = self.plan(capsys, "--base", base, *tasks(more), "--out", tmp_path / "out", "--extra", "ignore")
        assert f"note: {more}: 1 tensors that the base does not have are left out" in text


class TestConfig:
    def write(self, folder: Path, **content: Any) -> Path:
        file = folder / "merge.yaml"
        file.write_text(json.dumps(content))  # JSON is YAML
        return file

    def record(self, out: Path) -> Any:
        return json.loads((out / "dcmerge.json").read_text())

    def test_everything_from_the_file(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        out = tmp_path / "out"
        file = tmp_path / "merge.yaml"
        file.write_text(
            f"""
            base: {base}
            tasks:
              - {models[0]}
              - {models[1]}
            out: {out}
            method: ties
            scale: 0.5
            weights: [1, 0.25]
            options:
              keep: 0.4
              disjoint: sum
            dtype: bfloat16
            shard_size: 1KB
            overrides:
              - match: lm_head\\..*
                action: copy
            """
        )
        result = run(capsys, "merge", "--config", file)
        assert result.status == 0, result.err
        found = families.read_model(out)
        arguments = ("--base", base, *tasks(models[0], f"{models[1]}=0.25"), "--method", "ties", "--scale", "0.5")
        options = ("--set", "keep=0.4", "--set", "disjoint=sum", "--dtype", "bfloat16")
        expected = merged(capsys, tmp_path / "by_arguments", *arguments, *options, "--config", self.write(
            tmp_path, overrides=[{"match": r"lm_head\..*", "action": "copy"}]
        ))  # fmt: skip
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], values) for name, values in expected.items())
        assert len(list(out.glob("model-*.safetensors"))) > 1
        assert same_bits(found["lm_head.weight"], BASE["lm_head.weight"].bfloat16())

    def test_the_command_line_wins(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        file = self.write(
            tmp_path, base="absent", tasks=["absent"], out=str(tmp_path / "wrong"), method="ties", scale=9,
            weights=[3], options={"keep": 0.4, "disjoint": "sum"}, dtype="float16", vocab="base", overwrite=False,
        )  # fmt: skip
        out = tmp_path / "out"
        result = run(
            capsys, "merge", "--config", file, "--base", base, *tasks(f"{models[0]}=0.5", models[1]), "--out", out,
            "--scale", "0.5", "--set", "keep=0.3", "--dtype", "keep", "--vocab", "skip",
        )  # fmt: skip
        assert result.status == 0, result.err
        record = self.record(out)
        assert record["scale"] == 0.5
        assert record["weights"] == [0.5, 1]
        assert record["options"] == {"keep": 0.3, "disjoint": "sum"}
        assert record["config"]["dtype"] == "keep"
        assert record["config"]["vocab"] == "skip"
        assert not (tmp_path / "wrong").exists()

    def test_another_method_than_the_file_s_keeps_its_options_or_says_so(
        self, family: Family, tmp_path: Path, capsys: Capsys
    ) -> None:
        base, models, _ = family
        file = self.write(tmp_path, method="ties", options={"disjoint": "sum"})
        result = run(
            capsys, "merge", "--config", file, "--base", base, *tasks(*models), "--out", tmp_path / "out",
            "--method", "dc_merge",
        )  # fmt: skip
        assert result.status == 1
        assert "sets options of ties, and --method dc_merge is another method" in result.err

    def test_weights_of_the_file_do_not_go_to_other_tasks(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        file = self.write(tmp_path, tasks=[str(models[0])], weights=[5])
        result = run(capsys, "merge", "--config", file, "--base", base, *tasks(*models), "--out", tmp_path / "out")
        assert result.status == 0, result.err
        assert self.record(tmp_path / "out")["weights"] == [1, 1]

    def test_null_is_not_given(self, family: Family, tmp_path: Path, capsys: Capsys) -> None:
        base, models, _ = family
        file = self.write(
            tmp_path, base=str(base), tasks=[str(m) for m in models], out=str(tmp_path / "out"), scale=None, weights=None,
            save_as=None, adapter_rank=None, lora_scale=None,
        )  # fmt: skip
        result = run(capsys, "merge", "--config", file)
        assert result.status == 0, result.err


@pytest.mark.usefixtures("wide")
class TestInfo:
    def test_lists_backends_and_reasons(self, capsys: Capsys) -> None:
        result = run(capsys, "info")
        assert result.status == 0
        text = words(result.out)
        assert f"dcmerge_ext {version('dcmerge-ext')}, torch {torch.__version__}" in text
        for name, state in dcmerge_ext.backends().items():
            assert f"{name} {words(state)}" in text
        assert "cuda unavailable: " in text

    def test_reason_of_a_missing_core(self, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        from dcmerge_ext import _native

        monkeypatch.setattr(_native, "loaded", lambda: False)
        monkeypatch.setattr(_native, "why_not", lambda: "libgomp.so.1 [missing]: cannot open")
        text = words(run(capsys, "info").out)
        assert "cpu unavailable: libgomp.so.1 [missing]: cannot open" in text

    def test_verbose_tells_how_torch_was_built(self, capsys: Capsys) -> None:
        text = run(capsys, "info", "-v").out
        assert "PyTorch built with" in text
        assert "OpenMP" in text

    def test_an_unknown_backend_is_status_1(
        self,
        family: Family,
        tmp_path: Path,
        capsys: Capsys,
        monkeypatch: pytest.MonkeyPatch,
        request: pytest.FixtureRequest,
    ) -> None:
        if request.config.getoption("--backend"):
            pytest.skip("--backend wins over the environment")
        base, models, _ = family
        monkeypatch.setenv("DCMERGE_BACKEND", "cudaa")
        families.refused(
            capsys, tmp_path, "--base", base, *tasks(*models), "--out", tmp_path / "out", "--method", "ties",
            says=["'cudaa' does not exist", "reference"],
        )  # fmt: skip


@pytest.mark.usefixtures("wide")
class TestMethods:
    def test_lists_all(self, capsys: Capsys) -> None:
        result = run(capsys, "methods")
        assert result.status == 0
        text = words(result.out)
        for name, cls in list_methods().items():
            assert f"{name} {cls.kind()} {cls().default_scale(2):g}" in text
            assert cls.paper in text

    @pytest.mark.parametrize("method", list(list_methods()))
    def test_describes_one_with_its_options(self, method: str, capsys: Capsys) -> None:
        """Types and meanings as they are written, brackets too."""
        result = run(capsys, "methods", method)
        assert result.status == 0
        text = words(result.out)
        cls = list_methods()[method]
        assert cls.paper in text
        options = describe_options(cls)
        for option in options:
            assert option.meaning, "every option says what it means"
            assert words(f"{option.name} {option.type} {option.default} {option.meaning}") in text
        assert ("no options" in text) == (not options)
        assert "msgspec" not in text  # types are for people

    def test_addresses_are_complete_on_a_narrow_terminal(self, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        text = run(capsys, "methods").out
        assert all(cls.paper in text for cls in list_methods().values())

    @pytest.mark.parametrize("name", ["tie", "dcmerge", "zzz"])
    def test_unknown(self, name: str, capsys: Capsys) -> None:
        result = run(capsys, "methods", name)
        assert result.status == 1
        assert f"error: unknown method {name!r}" in result.err
        assert ("did you mean" in result.err) == (name != "zzz")
        assert f"known: {', '.join(list(list_methods())[:2])}" in result.err


class TestProcess:
    """The installed command and ``python -m``, away from the repository."""

    @staticmethod
    def start(*command: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DCMERGE_BACKEND")}
        return subprocess.run(
            [str(c) for c in command], cwd=tempfile.gettempdir(), env=environment, capture_output=True, text=True
        )

    def test_version(self) -> None:
        done = self.start(sys.executable, "-m", "dcmerge_ext", "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"dcmerge {version('dcmerge-ext')}\n", "")

    def test_merge_and_status(self, family: Family, tmp_path: Path) -> None:
        base, models, _ = family
        command = Path(sys.executable).with_name("dcmerge")
        arguments = ("--base", base, *tasks(*models), "--method", "averaging")
        done = self.start(command, "merge", *arguments, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) == BASE.keys()
        done = self.start(command, "merge", *arguments, "--out", tmp_path / "out")
        assert done.returncode == 1
        assert (
            done.stderr
            == f"error: {tmp_path / 'out'}: exists already; choose another output directory or pass --overwrite\n"
        )
        assert done.stdout == ""
        assert self.start(command, "merge", "--scale", "x").returncode == 2

    def test_help_names_every_command(self, capsys: Capsys) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(["--help"])
        assert exit_info.value.code == 0
        text = capsys.readouterr().out
        assert all(
            command in text for command in ("merge", "plan", "sweep", "calibrate", "compare", "info", "methods", "demo")
        )

"""What a merge leaves beside the weights: side files, record, model card; and how an earlier output is replaced."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from families import Result, merged, refused, run, same_bits, tasks
from safetensors.torch import save_file

from dcmerge_ext import list_methods, merge_checkpoints
from dcmerge_ext.cli import main

METHODS = [name for name in list_methods() if name not in cases.LORA_ONLY]
BASE = families.toy()
TUNED = [families.tuned(BASE, seed) for seed in range(2)]
Capsys = pytest.CaptureFixture[str]

SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "added_tokens.json", "preprocessor_config.json",
    "chat_template.jinja", "modeling_custom.py", "1_Pooling/config.json", "modules.json", "qwen.tiktoken",
)  # fmt: skip
LEFT_OUT = (
    "README.md", "optimizer.pt", "scheduler.pt", "training_args.bin", "trainer_state.json", "rng_state.pth",
    "pytorch_model.bin.index.json", "model.safetensors.index.json", "tf_model.h5", "flax_model.msgpack", "model.onnx",
    "onnx/model.onnx", "model.gguf", "dcmerge.json", "dcmerge_timings.json", ".gitattributes", ".cache/state.json",
    "global_step/zero.pt", "events.out.tfevents.1",
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "base", BASE)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [families.write_model(tmp_path / f"task{i}", model) for i, model in enumerate(TUNED)]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [families.write_adapter(tmp_path / f"adapter{i}", BASE, rank=2 + i, seed=i) for i in range(2)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestSideFiles:
    def test_all_but_weights_and_leftovers(self, base: Path, models: list[Path], out: Path, capsys: Capsys) -> None:
        for name in (*SIDE_FILES, *LEFT_OUT):
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text(json.dumps({"of": name}))
        for name in ("config.json", "tokenizer.json", "only_of_a_task.json"):
            (models[0] / name).write_text("{}")
        merged(capsys, out, "--base", base, *tasks(*models))
        found = families.tree(out)
        own = {"model.safetensors", "README.md", "dcmerge.json", "dcmerge_timings.json"}
        assert {name for name, content in found.items() if content is not None} == {*SIDE_FILES, *own}
        for name in SIDE_FILES:
            assert found[name] == (base / name).read_bytes()

    def test_links_of_a_download_cache_become_files(
        self, base: Path, models: list[Path], out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        blob = tmp_path / "models--someone--model" / "blobs" / "0123abcd"  # as huggingface_hub lays its cache out
        blob.parent.mkdir(parents=True)
        blob.write_text('{"linked": true}')
        (base / "tokenizer.json").symlink_to(blob)
        merged(capsys, out, "--base", base, *tasks(*models))
        assert not (out / "tokenizer.json").is_symlink()
        assert (out / "tokenizer.json").read_text() == '{"linked": true}'

    def test_other_links_out_are_refused(
        self, base: Path, models: list[Path], out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        (tmp_path / "elsewhere").write_text("{}")
        (base / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
        says = ["tokenizer.json", "is a link to", "put a copy"]
        refused(capsys, tmp_path, "--base", base, *tasks(*models), "--out", out, says=says)

    def test_other_models_below_the_base_are_left_alone(
        self, base: Path, models: list[Path], out: Path, capsys: Capsys
    ) -> None:
        """Checkpoints of a training run, or the tasks, often lie in the directory of the base."""
        families.write_model(base / "checkpoint-500", BASE)
        (base / "checkpoint-500" / "tokenizer.json").write_text("{}")
        families.write_adapter(base / "adapters" / "french", BASE)
        merged(capsys, out, "--base", base, *tasks(*models))
        assert {p.name for p in out.iterdir() if p.is_dir()} == set()

    def test_output_below_the_base(self, base: Path, models: list[Path], capsys: Capsys) -> None:
        """Allowed; two runs do not copy each other."""
        merged(capsys, base / "merged1", "--base", base, *tasks(*models), "--method", "averaging")
        merged(capsys, base / "merged2", "--base", base, *tasks(*models), "--method", "averaging")
        names = {"model.safetensors", "config.json", "README.md", "dcmerge.json", "dcmerge_timings.json"}
        assert set(families.tree(base / "merged2")) == names

    def test_a_single_file_has_none(self, tmp_path: Path, models: list[Path], out: Path, capsys: Capsys) -> None:
        save_file(BASE, tmp_path / "base.safetensors")
        merged(capsys, out, "--base", tmp_path / "base.safetensors", *tasks(*models))
        assert set(families.tree(out)) == {"model.safetensors", "README.md", "dcmerge.json", "dcmerge_timings.json"}

    @pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
    def test_conversion_is_noted_in_the_configuration(
        self, key: str | None, tmp_path: Path, models: list[Path], out: Path, capsys: Capsys
    ) -> None:
        config = {"hidden": 8, **({key: "float32"} if key else {})}
        base = families.write_model(tmp_path / "base", BASE, config=config)
        merged(capsys, out, "--base", base, *tasks(*models), "--dtype", "bfloat16")
        assert json.loads((out / "config.json").read_text()) == {"hidden": 8, key or "dtype": "bfloat16"}


class TestRecord:
    @pytest.mark.parametrize("method", METHODS)
    def test_content(self, method: str, base: Path, models: list[Path], adapters: list[Path], out: Path) -> None:
        chosen = [*models, adapters[0]]
        report = merge_checkpoints(base, chosen, out, method, 0.75, weights=[1, 0.5, 2])
        record = json.loads((out / "dcmerge.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
        assert record == report.record
        assert record["method"] == method
        assert record["paper"].startswith("https://arxiv.org/abs/")
        assert record["scale"] == 0.75
        assert record["weights"] == [1, 0.5, 2]
        assert record["options"].keys() == set(list_methods()[method].__struct_fields__)
        assert record["base"]["path"] == str(base)
        assert [t["path"] for t in record["tasks"]] == [str(p) for p in chosen]
        assert [t["kind"] for t in record["tasks"]] == ["full", "full", "adapter"]
        digests = [record["base"]["content"], *(t["content"] for t in record["tasks"])]
        assert len({*digests}) == 4
        assert all(len(d) == 32 and set(d) <= set("0123456789abcdef") for d in digests)
        assert [t["name"] for t in record["tensors"]] == sorted(BASE)
        for entry in record["tensors"]:
            values = BASE[entry["name"]]
            assert entry["shape"] == list(values.shape)
            assert entry["dtype"] == str(values.dtype).removeprefix("torch.")
            assert entry["action"] in ("copy", "mean", "merge")
            if entry["action"] == "copy":
                assert entry["reason"]
            else:
                assert entry["scale"] == 0.75
                assert len(entry["update_norms"]) == 3
                assert len(entry["merged_norm"]) == 1
        assert set(record["versions"]) == {"dcmerge_ext", "torch", "python"}
        assert record["backends"]["reference"] == "available"
        assert record["warnings"] == report.warnings
        assert [w.split(":")[0] for w in record["warnings"]] == (
            ["esm"] if method == "esm" else []
        )  # has no activations

    def test_norms(self, base: Path, models: list[Path], adapters: list[Path], out: Path) -> None:
        """Of the updates, before weights; of the merged update, before the scale."""
        record = merge_checkpoints(base, [*models, adapters[0]], out, "averaging", 0.5).record
        stored = families.read_model(out)
        for entry in record["tensors"]:
            if entry["action"] == "copy":
                continue
            name = entry["name"]
            expected = [(m[name].double() - BASE[name].double()).norm().item() for m in TUNED]
            assert entry["update_norms"][:2] == pytest.approx(expected, rel=1e-5)
            touched = name in ("layers.0.attn.weight", "layers.1.attn.weight")
            assert (entry["update_norms"][2] > 0) == touched
            change = (stored[name].double() - BASE[name].double()).norm().item()
            assert entry["merged_norm"][0] * 0.5 == pytest.approx(change, rel=1e-4, abs=1e-7)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("save_as", ["full", "adapter"])
    def test_two_runs_leave_the_same_bytes(
        self, method: str, save_as: str, base: Path, adapters: list[Path], models: list[Path], out: Path, tmp_path: Path,
        capsys: Capsys,
    ) -> None:  # fmt: skip
        chosen = tasks(*adapters, *(models if save_as == "full" else []))
        rank = ("--adapter-rank", "3") if save_as == "adapter" else ()
        arguments = ("--base", base, *chosen, "--method", method, "--save-as", save_as, *rank, "--seed", "3")
        if method != "dc_merge":
            arguments = arguments[:-2]
        merged(capsys, out, *arguments)
        first = families.tree(out)
        out.rename(tmp_path / "first")
        merged(capsys, out, *arguments)
        second = families.tree(out)
        assert first.keys() == second.keys()
        timings = json.loads(second["dcmerge_timings.json"] or b"")
        assert timings["seconds"] > 0
        assert timings["tensors"].keys() <= BASE.keys()
        assert {name for name in first if first[name] != second[name]} <= {"dcmerge_timings.json"}

    def test_content_tells_the_inputs_apart(
        self, base: Path, models: list[Path], adapters: list[Path], tmp_path: Path
    ) -> None:
        """The digest depends on the values alone: not on shards, and not on what else is merged."""

        def contents(*chosen: Path, of: Path = base, method: str = "averaging") -> list[str]:
            number = len(list(tmp_path.glob("run*")))
            record = merge_checkpoints(of, chosen, tmp_path / f"run{number}", method).record
            return [record["base"]["content"], *(t["content"] for t in record["tasks"])]

        expected = contents(models[0], adapters[0])
        assert contents(adapters[0], models[0]) == [expected[0], expected[2], expected[1]]
        assert contents(models[0], adapters[0], method="dc_merge") == expected
        sharded = families.write_model(tmp_path / "sharded", TUNED[0], "sharded")
        pickled = families.write_model(tmp_path / "pickled", BASE, "bin")
        assert contents(sharded, adapters[0], of=pickled) == expected
        changed = {n: v.clone() for n, v in TUNED[0].items()}
        changed["lm_head.weight"][0, 0] += 1e-6
        other = families.write_model(tmp_path / "changed", changed)
        assert contents(other, adapters[0])[1] != expected[1]
        assert contents(other, adapters[0])[2] == expected[2]
        one_tensor = {**BASE, "lm_head.weight": changed["lm_head.weight"]}
        other_base = families.write_model(tmp_path / "changed_base", one_tensor)
        assert contents(models[0], adapters[0], of=other_base)[0] != expected[0]
        assert contents(models[0], adapters[0], of=other_base)[1:] == expected[1:]

    def test_facts_of_dc_merge(self, base: Path, models: list[Path], out: Path) -> None:
        record = merge_checkpoints(base, models, out, rank=3).record
        entry = next(t for t in record["tensors"] if t["name"] == "layers.0.attn.weight")
        assert entry["rank"] == [3, 3]
        assert entry["cover_rank"] == 6
        assert 0 < entry["cover_u"]["smallest_kept"] <= 1
        assert entry["cover_v"]["dropped"] == 0

    def test_overrides_are_recorded(self, base: Path, models: list[Path], out: Path) -> None:
        overrides = [
            {"match": "lm_head.*", "method": "averaging", "scale": 3.0},
            {"match": "embed.*", "options": {"rank": 2}},
            {"match": "nothing", "action": "copy"},
        ]
        record = merge_checkpoints(base, models, out, overrides=overrides, rank=1).record
        entries = {t["name"]: t for t in record["tensors"]}
        assert entries["lm_head.weight"]["method"] == "averaging"
        assert entries["lm_head.weight"]["scale"] == 3
        assert entries["embed_tokens.weight"]["rank"] == [2, 2]
        assert entries["layers.0.attn.weight"]["rank"] == [1, 1]
        assert record["warnings"] == ["override 'nothing' matches no tensor"]


class TestModelCard:
    def command(self, out: Path) -> list[str]:
        card = (out / "README.md").read_text()
        lines = [line for line in card.splitlines() if line.startswith("    dcmerge ")]
        assert len(lines) == 1
        return shlex.split(lines[0])[1:]

    @pytest.mark.parametrize(
        "given",
        [
            [],
            ["--scale", "0.123456789"],
            ["--method", "ties", "--set", "keep=0.37", "--set", "disjoint=sum"],
            ["--set", "rank=[2, 1]", "--set", "smoothing=linear", "--set", "rho=2.5", "--seed", "5"],
            ["--set", "official=fft"],
            ["--dtype", "bfloat16"],
            ["--shard-size", "1KB"],
            ["--vocab", "base", "--extra", "ignore"],
        ],
        ids=lambda given: " ".join(given) or "defaults",
    )
    def test_its_command_makes_the_same_merge(
        self, given: list[str], base: Path, models: list[Path], out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        chosen = [f"{models[0]}=0.5", models[1]]
        expected = merged(capsys, out, "--base", base, *tasks(*chosen), *given)
        command = self.command(out)
        out.rename(tmp_path / "first")
        assert main(command) == 0
        found = families.read_model(out)
        assert found.keys() == expected.keys()
        assert [n for n in expected if not same_bits(found[n], expected[n])] == []
        assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "first").iterdir()}

    @pytest.mark.parametrize("given", [[], ["--adapter-rank", "1"], ["--lora-scale", "ignore"]])
    @pytest.mark.parametrize("with_base", [True, False])
    def test_its_command_makes_the_same_adapter(
        self,
        given: list[str],
        with_base: bool,
        base: Path,
        adapters: list[Path],
        out: Path,
        tmp_path: Path,
        capsys: Capsys,
    ) -> None:
        arguments = [*(["--base", base] if with_base else []), *tasks(*adapters), "--save-as", "adapter", *given]
        expected = merged(capsys, out, *arguments)
        command = self.command(out)
        out.rename(tmp_path / "first")
        assert main(command) == 0
        found = families.read_model(out)
        assert found.keys() == expected.keys()
        assert [n for n in expected if not same_bits(found[n], expected[n])] == []

    def test_overrides_are_not_lost(
        self, base: Path, models: list[Path], out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        """They have no place on a command line: the card must show them, or name what holds them."""
        overrides = [{"match": "lm_head.*", "action": "copy"}]
        merge_checkpoints(base, models, out, overrides=overrides)
        card = (out / "README.md").read_text()
        assert "lm_head.*" in card or "--config" in card

    def test_its_command_makes_the_same_merge_with_overrides(
        self, base: Path, models: list[Path], out: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another method keeps its own default scale, in the first run and in the second."""
        overrides = [{"match": "lm_head.*", "method": "task_arithmetic"}, {"match": ".*norm.*", "scale": 0.5}]
        merge_checkpoints(base, models, out, overrides=overrides)
        command, card = self.command(out), (out / "README.md").read_text()
        (tmp_path / "overrides.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
        first = families.read_model(out)
        out.rename(tmp_path / "first")
        monkeypatch.chdir(tmp_path)
        assert main(command) == 0
        again = families.read_model(out)
        assert [name for name in first if not same_bits(first[name], again[name])] == []
        records = [json.loads((folder / "dcmerge.json").read_text()) for folder in (tmp_path / "first", out)]
        for record in records:
            (head,) = [t for t in record["tensors"] if t["name"] == "lm_head.weight"]
            assert (head["method"], head["scale"]) == ("task_arithmetic", 0.3)

    def test_names_with_spaces_and_quotes(self, tmp_path: Path, models: list[Path], capsys: Capsys) -> None:
        base = families.write_model(tmp_path / "my base's $HOME", BASE)
        out = tmp_path / "the out"
        merged(capsys, out, "--base", base, *tasks(*models))
        command = self.command(out)
        out.rename(tmp_path / "first")
        assert main(command) == 0

    def test_says_what_was_merged(
        self, base: Path, models: list[Path], adapters: list[Path], out: Path, capsys: Capsys
    ) -> None:
        merged(capsys, out, "--base", base, *tasks(models[0], f"{adapters[0]}=0.25"), "--set", "keep=0.37")
        card = (out / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\ntags:\n- merge\n")
        assert f"Base: {base}" in card
        assert f"| {models[0]} | full | 1 |" in card
        assert f"| {adapters[0]} | adapter | 0.25 |" in card
        assert "keep=0.37" in card
        assert "https://arxiv.org/abs/2603.06242" in card


class TestOverwrite:
    @pytest.fixture
    def again(self, base: Path, models: list[Path], out: Path, capsys: Capsys) -> Iterator[Any]:
        merged(capsys, out, "--base", base, "--task", models[0], "--method", "averaging", "--shard-size", "1KB")

        def merge(*arguments: str | Path) -> Result:
            return run(capsys, "merge", "--base", base, "--task", models[1], "--method", "averaging", *arguments)

        return merge

    def test_replaces_all_of_the_earlier_output(self, again: Any, out: Path, tmp_path: Path) -> None:
        (out / "notes.txt").write_text("added later")
        assert again("--out", out, "--overwrite").status == 0
        torch.testing.assert_close(families.read_model(out)["lm_head.weight"], TUNED[1]["lm_head.weight"])
        assert {p.name for p in out.iterdir()} == {
            "model.safetensors", "config.json", "README.md", "dcmerge.json", "dcmerge_timings.json",
        }  # fmt: skip
        assert {p.name for p in tmp_path.iterdir()} == {"base", "task0", "task1", "out"}

    def test_an_empty_directory_counts_as_an_earlier_output(self, again: Any, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert again("--out", tmp_path / "empty", "--overwrite").status == 0

    def test_where_nothing_stands(self, again: Any, tmp_path: Path) -> None:
        assert again("--out", tmp_path / "new" / "deeper", "--overwrite").status == 0

    def test_an_output_moved_aside_by_a_killed_run(self, again: Any, out: Path, tmp_path: Path) -> None:
        """Found before the work, not after it."""
        (tmp_path / "out.replaced").mkdir()
        before = families.tree(tmp_path)
        result = again("--out", out, "--overwrite")
        assert result.status == 1
        assert f"{tmp_path / 'out.replaced'}: an earlier output" in result.err
        assert families.tree(tmp_path) == before

    def test_a_link_to_an_earlier_output(self, again: Any, out: Path, tmp_path: Path) -> None:
        """Refused with nothing changed, or replaced completely; never something between."""
        link = tmp_path / "latest"
        link.symlink_to(out)
        before = families.tree(tmp_path)
        result = again("--out", link, "--overwrite")
        if result.status == 1:
            assert families.tree(tmp_path) == before
            return
        assert result.status == 0, result.err
        torch.testing.assert_close(families.read_model(link)["lm_head.weight"], TUNED[1]["lm_head.weight"])
        assert {p.name for p in tmp_path.iterdir()} == {"base", "task0", "task1", "out", "latest"}

    def test_the_output_of_a_merge_may_be_merged_into_itself_only_elsewhere(
        self, again: Any, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        refused(
            capsys,
            tmp_path,
            "--base",
            base,
            "--task",
            out,
            "--out",
            out,
            "--overwrite",
            says=["is, or holds, the input"],
        )

    def test_relative_paths(self, again: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
        monkeypatch.chdir(tmp_path)
        for out in ("relative", "./deep/er/", "deep/../third"):
            result = run(capsys, "merge", "--base", "base", "--task", "./task0", "--out", out, "--method", "averaging")
            assert result.status == 0, result.err
            assert families.read_model(tmp_path / out).keys() == BASE.keys()

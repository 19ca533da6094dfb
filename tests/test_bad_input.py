"""Wrong inputs through the command line: status 1, one message with file and tensor, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import refused, run, tasks
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcmerge_ext import merge_checkpoints
from dcmerge_ext.cli import main
from dcmerge_ext.errors import InputError

BASE = families.toy()
TUNED = families.tuned(BASE, 1)
MODEL = "model.safetensors"
NAME = "layers.0.attn.weight"
Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "base", BASE)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A fine-tune without faults, which comes first in most merges below."""
    return families.write_model(tmp_path / "good", families.tuned(BASE, 0))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return families.write_adapter(tmp_path / "adapter", BASE)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def edit_config(adapter: Path, **changes: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return adapter


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], Any], file: str = MODEL) -> Path:
    weights = load_file(path / file)
    change(weights)
    save_file(weights, path / file)
    return path


class TestFiles:
    """Files that are not there, not complete or not what their name says."""

    @pytest.mark.parametrize("role", ["base", "task"])
    def test_no_such_path(self, role: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        absent = tmp_path / "absent"
        arguments = ["--base", absent if role == "base" else base, *tasks(good, *([absent] if role == "task" else []))]
        refused(capsys, tmp_path, *arguments, "--out", out, says=[f"{absent}: no such file or directory"])

    def test_no_such_path_that_looks_like_a_hub_id(
        self, base: Path, out: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = pytest.importorskip("huggingface_hub")
        asked = []

        def no_network(name: str, **settings: Any) -> str:
            asked.append(name)
            raise ConnectionError("cannot reach the hub\nlong explanation")

        monkeypatch.setattr(hub, "snapshot_download", no_network)
        refused(
            capsys, tmp_path, "--base", base, "--task", "someone/model", "--out", out,
            says=["someone/model", "neither a file or directory here nor a Hub model", "cannot reach the hub"],
        )  # fmt: skip
        assert asked == ["someone/model"]

    def test_a_hub_id_is_downloaded(
        self, base: Path, good: Path, out: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub, "snapshot_download", lambda name, **settings: str(good))
        result = run(capsys, "merge", "--base", base, "--task", "someone/model", "--out", out, "--method", "averaging")
        assert result.status == 0, result.err

    def test_an_empty_directory(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        (tmp_path / "empty").mkdir()
        refused(
            capsys, tmp_path, "--base", base, "--task", tmp_path / "empty", "--out", out,
            says=[tmp_path / "empty", "no weights", MODEL],
        )  # fmt: skip

    def test_several_files_without_an_index(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        task = families.write_model(tmp_path / "task", TUNED, "sharded")
        (task / "model.safetensors.index.json").unlink()
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out,
            says=[task, "several weight files without an index", "model-00001-of-00003.safetensors"],
        )  # fmt: skip

    @pytest.mark.parametrize("suffix", [".gguf", ".txt", ""])
    def test_unknown_kind_of_file(self, suffix: str, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        file = tmp_path / f"weights{suffix}"
        file.write_bytes(b"1234")
        refused(
            capsys, tmp_path, "--base", base, "--task", file, "--out", out,
            says=[file, "unknown kind of weight file", ".safetensors"],
        )  # fmt: skip

    @pytest.mark.parametrize("keep", [0, 1, 7, 8, 50, 300, -1, -100])
    def test_truncated_safetensors(
        self, keep: int, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        task = families.write_model(tmp_path / "task", TUNED)
        (task / MODEL).write_bytes((task / MODEL).read_bytes()[:keep])
        refused(
            capsys, tmp_path, "--base", base, *tasks(good, task), "--out", out,
            says=[task / MODEL, "not a complete safetensors file"],
        )  # fmt: skip

    @pytest.mark.parametrize(
        "content",
        {
            "not JSON": struct.pack("<Q", 16) + b"no JSON at all!!",
            "not UTF-8": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
            "a list": struct.pack("<Q", 2) + b"[]",
            "a huge header": struct.pack("<Q", 1 << 62) + b"{}",
            "random bytes": bytes(range(256)) * 4,
            "a web page": b"<!DOCTYPE html><html>404</html>" * 20,
            "a pointer file": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n",
        }.items(),
        ids=lambda item: item[0],
    )
    def test_garbage(
        self, content: tuple[str, bytes], base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        task = families.write_model(tmp_path / "task", TUNED)
        (task / MODEL).write_bytes(content[1])
        refused(
            capsys, tmp_path, "--base", base, *tasks(good, task), "--out", out,
            says=[task / MODEL, "not a complete safetensors file"],
        )  # fmt: skip

    @pytest.mark.parametrize(
        "header",
        {
            "overlap": {"a": ["F32", [2], [0, 8]], "b": ["F32", [2], [4, 12]]},
            "a gap": {"a": ["F32", [1], [0, 4]], "b": ["F32", [1], [8, 12]]},
            "beyond the end": {"a": ["F32", [3], [0, 12]], "b": ["F32", [3], [12, 24]]},
            "a size that is not the shape's": {"a": ["F32", [2], [0, 12]]},
            "backwards": {"a": ["F32", [2], [8, 0]]},
            "negative": {"a": ["F32", [3], [-12, 0]]},
            "a negative size": {"a": ["F32", [-3], [0, 12]]},
            "an overflowing shape": {"a": ["F32", [1 << 40, 1 << 40], [0, 12]]},
            "an unknown dtype": {"a": ["Q4", [3], [0, 12]]},
        }.items(),
        ids=lambda item: item[0],
    )
    def test_headers_that_lie(
        self, header: tuple[str, dict[str, Any]], base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        entries = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in header[1].items()}
        file = families.raw_safetensors(tmp_path / "lies.safetensors", entries, bytes(12))
        refused(
            capsys, tmp_path, "--base", base, "--task", file, "--out", out,
            says=[file, "not a complete safetensors file"],
        )  # fmt: skip

    @pytest.mark.parametrize("keep", [0, 10, 500, -50])
    def test_truncated_pickles(self, keep: int, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        task = families.write_model(tmp_path / "task", TUNED, "bin")
        file = task / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:keep])
        refused(capsys, tmp_path, "--base", base, "--task", task, "--out", out, says=[f"{file}: "])

    @pytest.mark.parametrize(
        ("content", "says"),
        [([torch.ones(2)], "holds a list"), ({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, "entry 'state_dict'")],
    )
    def test_pickles_that_are_no_state_dict(
        self, content: Any, says: str, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        torch.save(content, tmp_path / "x.pt")
        refused(
            capsys, tmp_path, "--base", base, "--task", tmp_path / "x.pt", "--out", out,
            says=[tmp_path / "x.pt", says, "model.state_dict()"],
        )  # fmt: skip

    @pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
    @pytest.mark.parametrize("place", ["model", "adapter"])
    def test_code_in_a_pickle_never_runs(
        self, form: str, place: str, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        victim = tmp_path / "code_ran"
        content = {"w": torch.ones(2), "payload": _Payload(victim)}
        if place == "model":
            file = tmp_path / "evil" / "pytorch_model.bin"
            file.parent.mkdir()
        else:
            (adapter / "adapter_model.safetensors").unlink()
            file = adapter / "adapter_model.bin"
        if form == "bare":
            file.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
        refused(
            capsys, tmp_path, "--base", base, "--task", file.parent, "--out", out,
            says=[file, "refused", "more than tensors", "safetensors"],
        )  # fmt: skip
        assert not victim.exists()
        torch.load(file, weights_only=False) if form != "bare" else pickle.loads(file.read_bytes())
        assert victim.exists()  # it would have run


class _Payload:
    """Unpickled without care, creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


class TestIndexes:
    """Indexes of sharded checkpoints."""

    @pytest.fixture
    def task(self, tmp_path: Path) -> Path:
        return families.write_model(tmp_path / "task", TUNED, "sharded")

    @staticmethod
    def index(task: Path) -> Path:
        return task / "model.safetensors.index.json"

    def edit(self, task: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads(self.index(task).read_text())
        change(content)
        self.index(task).write_text(json.dumps(content))

    def test_missing_shard(self, task: Path, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        (task / "model-00002-of-00003.safetensors").unlink()
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out,
            says=[self.index(task), "model-00002-of-00003.safetensors", "missing"],
        )  # fmt: skip

    def test_tensor_missing_in_its_shard(
        self, task: Path, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_weights(task, lambda w: w.pop("embed_tokens.weight"), "model-00001-of-00003.safetensors")
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out,
            says=[self.index(task), "'embed_tokens.weight'", "model-00001-of-00003.safetensors", "does not hold it"],
        )  # fmt: skip

    def test_missing_entry(self, task: Path, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        self.edit(task, lambda content: content["weight_map"].pop("embed_tokens.weight"))
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out,
            says=[self.index(task), "'embed_tokens.weight'", "model-00001-of-00003.safetensors", "no entry"],
        )  # fmt: skip

    def test_one_tensor_in_two_shards(self, task: Path, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        edit_weights(
            task, lambda w: w.update({"embed_tokens.weight": torch.zeros(20, 8)}), "model-00002-of-00003.safetensors"
        )
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out,
            says=[self.index(task), "'embed_tokens.weight'", "model-00002-of-00003.safetensors"],
        )  # fmt: skip

    @pytest.mark.parametrize(
        "shard",
        ["../outside.safetensors", "a/../../outside.safetensors", "ABSOLUTE", "..\\outside.safetensors", "", 7, None],
    )
    def test_outside_its_directory(
        self, shard: Any, task: Path, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        save_file({"embed_tokens.weight": torch.zeros(20, 8)}, tmp_path / "outside.safetensors")
        shard = str(tmp_path / "outside.safetensors") if shard == "ABSOLUTE" else shard
        self.edit(task, lambda content: content["weight_map"].update({"embed_tokens.weight": shard}))
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out,
            says=[self.index(task), repr(shard), "outside its own directory"],
        )  # fmt: skip

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
    def test_not_an_index(
        self, content: str, task: Path, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        self.index(task).write_bytes(content.encode("latin-1"))
        refused(capsys, tmp_path, "--base", base, "--task", task, "--out", out, says=[self.index(task)])


class TestTensors:
    """Names, shapes, dtypes and values that do not fit together."""

    @pytest.mark.parametrize("form", ["single", "sharded", "bin"])
    def test_another_shape(self, form: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        task = families.write_model(tmp_path / "task", {**TUNED, NAME: torch.zeros(8, 12)}, form)
        message = refused(
            capsys, tmp_path, "--base", base, *tasks(good, task), "--out", out,
            says=[task, base / MODEL, repr(NAME), "8x12", "12x8", "fine-tuned from this base"],
        )  # fmt: skip
        file = {"single": MODEL, "sharded": "model-0000", "bin": "pytorch_model.bin"}[form]
        assert f"{task}/{file}" in message

    @pytest.mark.parametrize("shape", [(), (1,), (12,), (12, 8, 1), (96,), (0,)])
    def test_another_number_of_dimensions(
        self, shape: tuple[int, ...], base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        task = families.write_model(tmp_path / "task", {**TUNED, NAME: torch.zeros(shape)})
        refused(capsys, tmp_path, "--base", base, "--task", task, "--out", out, says=[task / MODEL, repr(NAME), "12x8"])

    @pytest.mark.parametrize("vocab", ["error", "base", "skip"])
    @pytest.mark.parametrize("name", ["embeddings.LayerNorm.bias", "embeddings.LayerNorm.weight", "embed_norm.weight"])
    def test_a_model_of_another_width_is_no_vocabulary(
        self, name: str, vocab: str, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        """A norm beside the embeddings, first in the order of names, must not be taken for one."""
        base = families.write_model(tmp_path / "base", {name: torch.ones(8), "z.weight": torch.ones(8, 8)})
        task = families.write_model(tmp_path / "task", {name: torch.ones(12), "z.weight": torch.ones(12, 12)})
        message = refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out, "--vocab", vocab,
            says=[repr(name), "fine-tuned from this base"],
        )  # fmt: skip
        assert "vocab" not in message

    def test_missing_tensors(self, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        fewer = {n: v for n, v in TUNED.items() if n not in (NAME, "lm_head.weight", "mask")}
        task = families.write_model(tmp_path / "task", fewer)
        refused(
            capsys, tmp_path, "--base", base, *tasks(good, task), "--out", out,
            says=[task, repr(NAME), "(and 1 more)", "lacks"],
        )  # fmt: skip

    def test_missing_buffers_are_taken_from_the_base(
        self, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        fewer = {n: v for n, v in TUNED.items() if v.is_floating_point()}
        task = families.write_model(tmp_path / "task", fewer)
        found = families.merged(capsys, out, "--base", base, "--task", task)
        assert families.same_bits(found["mask"], BASE["mask"])

    def test_extra_tensors(self, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        more = {**TUNED, "score.weight": torch.ones(2, 8), "score.bias": torch.ones(2)}
        task = families.write_model(tmp_path / "task", more)
        arguments = ("--base", base, *tasks(good, task), "--out", out)
        refused(capsys, tmp_path, *arguments, says=[task, "'score.", "(and 1 more)", "--extra ignore"])
        result = run(capsys, "merge", *arguments, "--extra", "ignore")
        assert result.status == 0, result.err
        assert f"note: {task}: 2 tensors that the base does not have are left out" in " ".join(result.err.split())
        assert families.read_model(out).keys() == BASE.keys()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("method", ["dc_merge", "ties"])
    @pytest.mark.parametrize("name", [NAME, "layers.0.norm.weight", "layers.0.moe.experts.weight"])
    def test_not_finite_in_a_task(
        self, value: float, method: str, name: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        broken = {**TUNED, name: TUNED[name].clone()}
        broken[name].view(-1)[[2, 5, 6]] = value
        task = families.write_model(tmp_path / "task", broken)
        refused(
            capsys, tmp_path, "--base", base, *tasks(good, task), "--out", out, "--method", method,
            says=[task / MODEL, repr(name), "3 NaN or Inf values"],
        )  # fmt: skip

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", ["full", "adapter", "both"])
    @pytest.mark.parametrize("method", ["dc_merge", "averaging"])
    def test_not_finite_in_the_base(
        self, value: float, kind: str, method: str, good: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        """Also where a LoRA update alone would be finite."""
        broken = {**BASE, NAME: BASE[NAME].clone()}
        broken[NAME].view(-1)[[1, 7]] = value
        bad_base = families.write_model(tmp_path / "bad_base", broken)
        chosen = {"full": [good], "adapter": [adapter], "both": [adapter, good]}[kind]
        refused(
            capsys, tmp_path, "--base", bad_base, *tasks(*chosen), "--out", out, "--method", method,
            says=[bad_base / MODEL, repr(NAME), "base", "2 NaN or Inf values"],
        )  # fmt: skip

    def test_not_finite_in_base_and_task_alike(self, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        """The base is named: it is broken first."""
        broken = {**BASE, NAME: BASE[NAME].clone()}
        broken[NAME][0, 0] = float("inf")
        bad_base = families.write_model(tmp_path / "bad_base", broken)
        task = families.write_model(tmp_path / "task", {**TUNED, NAME: broken[NAME].clone()})
        refused(
            capsys, tmp_path, "--base", bad_base, "--task", task, "--out", out,
            says=[bad_base / MODEL, repr(NAME), "1 NaN or Inf values"],
        )  # fmt: skip

    @pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
    @pytest.mark.parametrize("save_as", ["full", "adapter"])
    @pytest.mark.parametrize("method", ["dc_merge", "averaging"])
    def test_not_finite_in_an_adapter(
        self,
        factor: str,
        save_as: str,
        method: str,
        base: Path,
        adapter: Path,
        out: Path,
        tmp_path: Path,
        capsys: Capsys,
    ) -> None:
        broken = families.write_adapter(tmp_path / "broken", BASE, seed=5)
        key = f"base_model.model.layers.0.attn.{factor}.weight"
        edit_weights(broken, lambda w: w[key].view(-1)[:2].fill_(float("nan")), "adapter_model.safetensors")
        refused(
            capsys, tmp_path, "--base", base, *tasks(adapter, broken), "--out", out, "--method", method,
            "--save-as", save_as, says=[broken / "adapter_model.safetensors", repr(NAME), "2 NaN or Inf values"],
        )  # fmt: skip

    def test_an_update_that_overflows(self, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        base = families.write_model(tmp_path / "base", {"w": torch.full((3, 3), -3e38)})
        task = families.write_model(tmp_path / "task", {"w": torch.full((3, 3), 3e38)})
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out,
            says=[task / MODEL, "'w'", "overflows"],
        )  # fmt: skip

    @pytest.mark.parametrize("action", ["copy", "merge"])
    def test_an_unchanged_tensor_that_float16_cannot_hold(
        self, action: str, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        large = {"large": torch.full((3, 3), 70_000.0), "w": torch.ones(3, 3)}
        base = families.write_model(tmp_path / "base", large)
        task = families.write_model(tmp_path / "task", {**large, "w": torch.eye(3)})
        (tmp_path / "m.yaml").write_text(json.dumps({"overrides": [{"match": "large", "action": action}]}))
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out, "--dtype", "float16",
            "--config", tmp_path / "m.yaml", "--method", "averaging", says=["'large'", "float16"],
        )  # fmt: skip

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U16", "U32", "U64", "C64"])
    @pytest.mark.parametrize("role", ["base", "task"])
    def test_dtypes_that_cannot_be_merged(
        self, dtype: str, role: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        width = {"F8": 1, "U1": 2, "U3": 4, "U6": 8, "C6": 8}[dtype[:2]]
        entry = {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * width]}
        file = families.raw_safetensors(tmp_path / "odd.safetensors", {"w": entry}, bytes(6 * width))
        refused(
            capsys, tmp_path, "--base", file if role == "base" else base,
            *tasks(good, *([file] if role == "task" else [])), "--out", out,
            says=[f"{file}: tensor 'w' has dtype {dtype}", "convert"],
        )  # fmt: skip

    @pytest.mark.parametrize("role", ["base", "task"])
    def test_pickled_dtypes_that_cannot_be_merged(
        self, role: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        for i, dtype in enumerate((torch.float8_e4m3fn, torch.complex64)):
            file = tmp_path / f"odd{i}.bin"
            torch.save({**TUNED, NAME: TUNED[NAME].to(dtype)}, file)
            refused(
                capsys, tmp_path, "--base", file if role == "base" else base,
                *tasks(good, *([file] if role == "task" else [])), "--out", out,
                says=[file, repr(NAME), str(dtype).removeprefix("torch.")],
            )  # fmt: skip

    @pytest.mark.parametrize("role", ["base", "task"])
    def test_quantised_models(
        self, role: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        config = {"model_type": "toy", "quantization_config": {"quant_method": "gptq", "bits": 4}}
        quantised = families.write_model(tmp_path / "quantised", TUNED, config=config)
        refused(
            capsys, tmp_path, "--base", quantised if role == "base" else base,
            *tasks(good, *([quantised] if role == "task" else [])), "--out", out,
            says=[quantised, "quantised", "gptq", "dequantise"],
        )  # fmt: skip

    def test_a_null_quantization_config_means_none(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        config = {"model_type": "toy", "quantization_config": None}
        task = families.write_model(tmp_path / "task", TUNED, config=config)
        result = run(capsys, "merge", "--base", base, "--task", task, "--out", out)
        assert result.status == 0, result.err

    @pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
    def test_config_json_that_is_none(
        self, content: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        (base / "config.json").write_bytes(content.encode("latin-1"))
        refused(capsys, tmp_path, "--base", base, "--task", good, "--out", out, says=[base / "config.json"])

    def test_a_model_without_tensors(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        save_file({}, tmp_path / "none.safetensors")
        refused(
            capsys, tmp_path, "--base", base, "--task", tmp_path / "none.safetensors", "--out", out,
            says=[tmp_path / "none.safetensors"],
        )  # fmt: skip
        refused(
            capsys, tmp_path, "--base", tmp_path / "none.safetensors", "--task", base, "--out", out, "--extra", "ignore",
            says=[tmp_path / "none.safetensors", "no tensors"],
        )  # fmt: skip


class TestOptions:
    """Methods, their options, and numbers outside their range."""

    @pytest.fixture
    def arguments(self, base: Path, good: Path, adapter: Path, out: Path) -> list[str | Path]:
        return ["--base", base, *tasks(good, adapter), "--out", out]

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (["--method", "dc_merg"], ["unknown method 'dc_merg'", "did you mean 'dc_merge'?"]),
            (["--method", "slerp"], ["unknown method 'slerp'", "known: averaging, consensus"]),
            (["--set", "smoothin=none"], ["no option 'smoothin'", "did you mean 'smoothing'?"]),
            (["--set", "keep=0"], ["keep"]),
            (["--set", "keep=1.01"], ["keep"]),
            (["--set", "keep=-0.5"], ["keep"]),
            (["--set", "keep=.nan"], ["keep"]),
            (["--set", "keep=abc"], ["keep"]),
            (["--method", "ties", "--set", "keep=0"], ["ties", "keep"]),
            (["--method", "ties", "--set", "keep=1.5"], ["ties", "keep"]),
            (["--method", "ties", "--set", "keep=20"], ["ties", "keep"]),
            (["--set", "rank=0"], ["rank"]),
            (["--set", "rank=-3"], ["rank"]),
            (["--set", "rank=1.5"], ["rank"]),
            (["--set", "rank=9"], ["'embed_tokens.weight'", "rank 9 exceeds min(m, n) = 8"]),
            (["--set", "rank=[2, 2, 2]"], ["3 entries for 2 tasks"]),
            (["--set", "rank"], ["--set rank", "KEY=VALUE"]),
            (["--set", "=3"], ["--set =3", "KEY=VALUE"]),
            (["--set", "rank=["], ["--set rank=[", "YAML"]),
            (["--set", "rho=3"], ["rho belongs to smoothing='linear'"]),
            (["--set", "official=fft", "--set", "keep=0.5"], ["keep=0.5 conflicts with official='fft'"]),
            (["--method", "averaging", "--set", "keep=0.2"], ["averaging", "'keep'", "no options"]),
            (["--seed", "-1"], ["seed"]),
            (["--shard-size", "abc"], ["shard_size: 'abc' is not a size"]),
            (["--shard-size", "0"], ["shard_size: '0'"]),
            (["--shard-size", "-5GB"], ["shard_size"]),
            (["--shard-size", "5XB"], ["shard_size: '5XB'"]),
            (["--adapter-rank", "0", "--save-as", "adapter"], ["adapter_rank"]),
            (["--scale", "nan"], ["scale"]),
            (["--scale", "inf"], ["scale"]),
        ],
    )
    def test_refused(
        self, given: list[str], says: list[str], arguments: list[str | Path], tmp_path: Path, capsys: Capsys
    ) -> None:
        if given[0].startswith("--shard-size") and given[1].startswith("-"):
            given = [f"{given[0]}={given[1]}"]
        refused(capsys, tmp_path, *arguments, *given, says=says)

    @pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999"])
    def test_weights_that_are_not_finite(
        self, weight: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        refused(capsys, tmp_path, "--base", base, "--task", f"{good}={weight}", "--out", out, says=[good, "finite"])

    def test_one_path_where_python_needs_several(self, base: Path, good: Path, out: Path) -> None:
        """A string is a sequence of strings, too."""
        with pytest.raises((InputError, TypeError), match="tasks"):
            merge_checkpoints(base, str(good), out)

    def test_no_tasks(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        refused(capsys, tmp_path, "--base", base, "--out", out, says=["tasks is missing"])

    def test_no_output(self, base: Path, good: Path, tmp_path: Path, capsys: Capsys) -> None:
        refused(capsys, tmp_path, "--base", base, "--task", good, says=["out is missing"])

    def test_no_base_with_full_models(
        self, good: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        refused(
            capsys, tmp_path, *tasks(adapter, good), "--out", out, says=["--base is missing", f"{good} is a full model"]
        )

    def test_no_base_with_save_as_full(self, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        refused(
            capsys, tmp_path, "--task", adapter, "--out", out, "--save-as", "full",
            says=["--base is missing", "--save-as full"],
        )  # fmt: skip

    def test_an_adapter_as_base(self, good: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        refused(capsys, tmp_path, "--base", adapter, "--task", good, "--out", out, says=[adapter, "is an adapter"])

    def test_save_as_adapter_with_a_full_model(
        self, arguments: list[str | Path], good: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        refused(capsys, tmp_path, *arguments, "--save-as", "adapter", says=[good, "full fine-tune", "--save-as full"])

    def test_save_as_adapter_with_ties(
        self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out, "--method", "ties", "--save-as", "adapter",
            says=[repr(NAME), "full rank", "--adapter-rank R"],
        )  # fmt: skip

    def test_cuda_without_a_device(
        self, arguments: list[str | Path], tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        refused(capsys, tmp_path, *arguments, "--device", "cuda", says=["no CUDA device", "--device cpu"])

    @pytest.mark.parametrize(
        "given",
        [
            [],
            ["merg"],
            ["merge", "--scale", "abc"],
            ["merge", "--device", "tpu"],
            ["merge", "--dtype", "int8"],
            ["merge", "--task"],
            ["merge", "--vocab", "drop"],
            ["merge", "--no-such-option"],
            ["merge", "-q", "-v"],
            ["merge", "--adapter-rank", "many"],
        ],
    )
    def test_command_lines_that_cannot_be_parsed(self, given: list[str], capsys: Capsys) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(given)
        assert exit_info.value.code == 2
        assert "usage: dcmerge" in capsys.readouterr().err


class TestConfigFiles:
    """YAML configurations."""

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("methd: ties", ["unknown key 'methd'", "did you mean 'method'?"]),
            ("task: [a]", ["unknown key 'task'", "did you mean 'tasks'?"]),
            ("tasks: a", ["tasks", "array"]),
            ("tasks: []", ["tasks"]),
            ("tasks: [1, 2]", ["tasks"]),
            ("scale: two", ["scale"]),
            ("scale: .nan", ["scale"]),
            ("tasks: [good, adapter]\nweights: [1, 2, 3]", ["weights", "2 tasks"]),
            ("tasks: [good, adapter]\nweights: [1, .inf]", ["weights", "finite"]),
            ("tasks: [good, adapter]\nweights: [1, two]", ["weights"]),
            ("out: 5", ["out"]),
            ("overwrite: maybe", ["overwrite"]),
            ("vocab: drop", ["vocab"]),
            ("shard_size: []", ["shard_size"]),
            pytest.param(f"shard_size: 1{'0' * 400}", ["shard_size"], id="a shard size of 401 digits"),
            ("options: [keep]", ["options"]),
            ("options: {kep: 0.1}", ["'kep'", "did you mean 'keep'?"]),
            ("overrides: {match: a}", ["overrides"]),
            ("overrides: [{match: a, metod: ties}]", ["metod", "overrides[0]"]),
            ("overrides: [{action: copy}]", ["match", "overrides[0]"]),
            ("overrides: [{match: a, action: drop}]", ["action", "drop"]),
            ("overrides: [{match: '(', action: copy}]", ["'('", "not a regular expression"]),
            ("overrides: [{match: a, method: tie}]", ["'a'", "unknown method 'tie'", "did you mean 'ties'?"]),
            ("overrides: [{match: a, options: {kep: 1}}]", ["'a'", "'kep'", "did you mean 'keep'?"]),
            ("overrides: [{match: lm_head.weight, scale: .inf}]", ["scale"]),
            ("overrides: [{match: lm_head.weight, options: {rank: 9}}]", ["'lm_head.weight'", "rank 9"]),
            ("overrides: [{match: layers.0.norm.weight, method: dc_merge}]", ["'layers.0.norm.weight'", "matrices"]),
            ("- a list", ["needs a mapping", "list"]),
            ("a string", ["needs a mapping"]),
            ("", ["needs a mapping"]),
            ("a: [", ["not valid YAML"]),
            ("a: b: c", ["not valid YAML"]),
            ("a: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
            ("\x00", ["not valid YAML"]),
        ],
    )
    def test_refused(
        self,
        text: str,
        says: list[str],
        base: Path,
        good: Path,
        adapter: Path,
        out: Path,
        tmp_path: Path,
        capsys: Capsys,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = tmp_path / "merge.yaml"
        file.write_text(text)
        given: list[str | Path] = ["--base", base]
        if not text.startswith("tasks"):
            given += tasks(good, adapter)
        if not text.startswith("out"):
            given += ["--out", out]
        message = refused(capsys, tmp_path, *given, "--config", file, says=says)
        assert len(message) < 600

    def test_names_the_file(self, tmp_path: Path, capsys: Capsys) -> None:
        file = tmp_path / "merge.yaml"
        for text in ("methd: ties", "tasks: a", "a: [", "- a"):
            file.write_text(text)
            refused(capsys, tmp_path, "--config", file, "--out", tmp_path / "out", says=[file])

    def test_bytes_that_are_no_text(self, tmp_path: Path, capsys: Capsys) -> None:
        file = tmp_path / "merge.yaml"
        file.write_bytes(b"\xff\xfe\x00base")
        refused(capsys, tmp_path, "--config", file, says=[file, "not valid YAML"])

    def test_no_such_file(self, tmp_path: Path, capsys: Capsys) -> None:
        refused(
            capsys, tmp_path, "--config", tmp_path / "absent.yaml", says=[tmp_path / "absent.yaml", "cannot be read"]
        )

    def test_a_directory(self, tmp_path: Path, capsys: Capsys) -> None:
        refused(capsys, tmp_path, "--config", tmp_path, says=[tmp_path, "cannot be read"])


class TestAdapters:
    """Adapters of other kinds, of other bases, and damaged ones."""

    @pytest.mark.parametrize(
        "kind",
        [
            "LOHA",
            "LOKR",
            "IA3",
            "VERA",
            "ADALORA",
            "OFT",
            "BOFT",
            "PREFIX_TUNING",
            "PROMPT_TUNING",
            "FOURIERFT",
            "loha",
        ],
    )
    def test_kinds_that_are_not_lora(
        self, kind: str, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, peft_type=kind)
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_config.json", kind.upper(), "only LORA"],
        )  # fmt: skip

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
    def test_initialisations_that_change_the_base(
        self, start: str, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, init_lora_weights=start)
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_config.json", start, "changes the base weights", "convert"],
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("entry", "value"),
        [
            ("lora_bias", True),
            ("use_qalora", True),
            ("use_bdlora", {"nblocks": 2}),
            ("alora_invocation_tokens", [1, 2]),
            ("layer_replication", [[0, 2], [1, 2]]),
            ("target_parameters", ["experts.gate_up_proj"]),
            ("trainable_token_indices", [3]),
            ("arrow_config", {"top_k": 2}),
            ("kasa_config", {"beta": 1e-4}),
            ("monteclora_config", {"num_samples": 4}),
        ],
    )
    def test_settings_that_change_the_update(
        self, entry: str, value: Any, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, **{entry: value})
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_config.json", entry, "cannot be merged"],
        )  # fmt: skip

    def test_the_same_settings_switched_off(self, base: Path, adapter: Path, out: Path, capsys: Capsys) -> None:
        edit_config(
            adapter, lora_bias=False, use_qalora=False, arrow_config=None, layer_replication=None, use_dora=False
        )
        families.merged(capsys, out, "--base", base, "--task", adapter)

    def test_no_peft_type(self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        (adapter / "adapter_config.json").write_text("{}")
        refused(capsys, tmp_path, "--base", base, "--task", adapter, "--out", out, says=["peft_type is missing"])

    @pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "null"])
    def test_config_that_is_not_json(
        self, content: str, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        (adapter / "adapter_config.json").write_bytes(content.encode("latin-1"))
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out, says=[adapter / "adapter_config.json"]
        )

    def test_no_weights(self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter, "adapter_model.safetensors", "adapter_model.bin"],
        )  # fmt: skip

    def test_empty_weights(self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        save_file({}, adapter / "adapter_model.safetensors")
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_model.safetensors", "no LoRA factors"],
        )  # fmt: skip

    def test_truncated_weights(self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[file, "not a complete safetensors file"],
        )  # fmt: skip

    def test_a_rank_that_is_not_the_configuration_s(
        self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, r=4)
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_config.json", "rank 4", "'layers.0.attn'", "rank 2", "scale"],
        )  # fmt: skip

    @pytest.mark.parametrize("alpha", [None, "16", [1], True])
    def test_lora_alpha_that_is_no_number(
        self, alpha: Any, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, lora_alpha=alpha)
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_config.json", "lora_alpha"],
        )  # fmt: skip

    @pytest.mark.parametrize("entry", ["rank_pattern", "alpha_pattern"])
    def test_patterns_that_are_no_regular_expressions(
        self, entry: str, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, **{entry: {"(": 2}})
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_config.json", "'('", "regular expression"],
        )  # fmt: skip

    @pytest.mark.parametrize("r", ["4", [4], {"a": 1}])
    def test_r_that_is_no_number(
        self, r: Any, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, r=r)
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out, says=[adapter / "adapter_config.json"]
        )

    @pytest.mark.parametrize(("entry", "value"), [("bias", ["all"]), ("bias", {}), ("modules_to_save", 3)])
    def test_settings_of_a_wrong_type(
        self, entry: str, value: Any, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, **{entry: value})
        refused(capsys, tmp_path, "--task", adapter, "--out", out, says=[adapter / "adapter_config.json", entry])

    @pytest.mark.parametrize("part", ["lora_A", "lora_B"])
    def test_a_factor_without_its_partner(
        self, part: str, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        key = f"base_model.model.layers.0.attn.{part}.weight"
        edit_weights(adapter, lambda w: w.pop(key), "adapter_model.safetensors")
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_model.safetensors", "'layers.0.attn'", "partner"],
        )  # fmt: skip

    @pytest.mark.parametrize("shape", [(12, 3), (12,), (), (12, 2, 2)])
    def test_factors_that_do_not_fit(
        self, shape: tuple[int, ...], base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        key = "base_model.model.layers.0.attn.lora_B.weight"
        edit_weights(adapter, lambda w: w.update({key: torch.zeros(shape)}), "adapter_model.safetensors")
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_model.safetensors", key, "do not fit"],
        )  # fmt: skip

    def test_factors_of_rank_zero(self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        empty = {"A": torch.zeros(0, 8), "B": torch.zeros(12, 0)}
        edit_weights(
            adapter,
            lambda w: w.update({f"base_model.model.layers.0.attn.lora_{p}.weight": v for p, v in empty.items()}),
            "adapter_model.safetensors",
        )
        refused(capsys, tmp_path, "--base", base, "--task", adapter, "--out", out, says=[adapter, "'layers.0.attn'"])

    @pytest.mark.parametrize("key", ["layers.0.attn.lora_C.weight", "layers.0.attn.lora_A.sql.weight"])
    def test_factors_of_unknown_name(
        self, key: str, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_weights(adapter, lambda w: w.update({key: torch.zeros(2, 8)}), "adapter_model.safetensors")
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_model.safetensors", repr(key)],
        )  # fmt: skip

    def test_a_trained_bias_in_the_factors(
        self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        key = "base_model.model.layers.0.attn.lora_B.bias"
        edit_weights(adapter, lambda w: w.update({key: torch.zeros(12)}), "adapter_model.safetensors")
        refused(capsys, tmp_path, "--base", base, "--task", adapter, "--out", out, says=[adapter, repr(key), "bias"])

    def test_modules_that_the_base_lacks(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        other = {**BASE, "layers.7.attn.weight": torch.zeros(12, 8), "layers.8.attn.weight": torch.zeros(12, 8)}
        adapter = families.write_adapter(tmp_path / "a", other, ("layers.0.attn", "layers.7.attn", "layers.8.attn"))
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter, "'layers.7.attn.weight'", "and 1 more", base, "another base"],
        )  # fmt: skip

    def test_modules_that_fit_two_places_of_the_base(self, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        """Adapters may lack the base's prefix, but not where two prefixes fit: which one is meant cannot be known."""
        weight = torch.ones(6, 4)
        base = families.write_model(tmp_path / "base", {"encoder.q.weight": weight, "decoder.q.weight": weight + 1})
        adapter = families.write_adapter(tmp_path / "a", {"q.weight": weight}, ["q"])
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter, "'q.weight'", "encoder.q.weight", "decoder.q.weight"],
        )  # fmt: skip

    def test_a_base_of_another_size(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        adapter = families.write_adapter(tmp_path / "a", {**BASE, NAME: torch.zeros(12, 10)}, ["layers.0.attn"])
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_model.safetensors", repr(NAME), "12x10", "12x8", base],
        )  # fmt: skip

    def test_adapters_that_name_different_bases(
        self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        edit_config(adapter, base_model_name_or_path="someone/small")
        other = families.write_adapter(tmp_path / "other", BASE, base_model_name_or_path="someone/large")
        refused(
            capsys, tmp_path, "--base", base, *tasks(adapter, other), "--out", out,
            says=[adapter, other, "'someone/small'", "'someone/large'", "base_model_name_or_path"],
        )  # fmt: skip

    @pytest.mark.parametrize("names", [("someone/small", "/home/me/small/"), ("someone/small", None), ("", "x/y")])
    def test_bases_that_may_be_the_same(
        self, names: tuple[str | None, str | None], base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        paths = [
            families.write_adapter(tmp_path / str(i), BASE, seed=i, base_model_name_or_path=name)
            for i, name in enumerate(names)
        ]
        families.merged(capsys, out, "--base", base, *tasks(*paths))

    def test_the_weight_file_of_an_adapter(
        self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        """Given instead of its directory, it is not taken for a full model."""
        file = adapter / "adapter_model.safetensors"
        refused(capsys, tmp_path, "--base", base, "--task", file, "--out", out, says=[file, "adapter"])


class TestOutput:
    """Where the result may go."""

    @pytest.mark.parametrize("content", ["nothing", "a file", "a model"])
    def test_exists_already(
        self, content: str, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        out.mkdir()
        if content != "nothing":
            (out / ("notes.txt" if content == "a file" else MODEL)).write_text("mine")
        refused(
            capsys, tmp_path, "--base", base, "--task", good, "--out", out, says=[out, "exists already", "--overwrite"]
        )

    def test_a_file_stands_there(self, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        out.write_text("mine")
        refused(capsys, tmp_path, "--base", base, "--task", good, "--out", out, says=[out, "exists already"])
        refused(capsys, tmp_path, "--base", base, "--task", good, "--out", out, "--overwrite", says=[out])

    def test_below_a_file(self, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        out.write_text("mine")
        refused(capsys, tmp_path, "--base", base, "--task", good, "--out", out / "deeper", says=[out])

    def test_overwrite_refuses_what_is_not_an_earlier_output(
        self, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        refused(
            capsys, tmp_path, "--base", base, "--task", good, "--out", out, "--overwrite",
            says=[out, "not the output of an earlier merge", "dcmerge.json"],
        )  # fmt: skip

    @pytest.mark.parametrize("role", ["base", "task", "adapter"])
    @pytest.mark.parametrize("place", ["is", "holds", "link"])
    def test_is_or_holds_an_input(
        self, role: str, place: str, base: Path, good: Path, adapter: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        """Not even with --overwrite and a record in it."""
        target = {"base": base, "task": good, "adapter": adapter}[role]
        (target / "dcmerge.json").write_text("{}")
        (tmp_path / "dcmerge.json").write_text("{}")
        out = {"is": target, "holds": tmp_path, "link": tmp_path / "link"}[place]
        if place == "link":
            out.symlink_to(target)
        for overwrite in ([], ["--overwrite"]):
            refused(
                capsys, tmp_path, "--base", base, *tasks(good, adapter), "--out", out, *overwrite,
                says=[out, "is, or holds, the input"],
            )  # fmt: skip

    @pytest.mark.parametrize("out", ["/", ".", "..", "", "x/.."])
    def test_odd_places(
        self, out: str, base: Path, good: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(base)
        refused(capsys, tmp_path, "--base", base, "--task", good, "--out", out, "--overwrite", says=[])

    def test_left_by_a_killed_run(self, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        partial = tmp_path / "out.partial"
        partial.mkdir()
        (partial / MODEL).write_bytes(b"half")
        arguments = ("--base", base, "--task", good, "--out", out)
        refused(capsys, tmp_path, *arguments, says=[partial, "--overwrite", "--resume"])
        result = run(capsys, "merge", *arguments, "--overwrite")
        assert result.status == 0, result.err
        assert not partial.exists()
        assert families.read_model(out).keys() == BASE.keys()

    def test_no_room(
        self, base: Path, good: Path, out: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        refused(capsys, tmp_path, "--base", base, "--task", good, "--out", out, says=[out, "free"])

    def test_nothing_is_left_of_directories_made_on_the_way(self, base: Path, tmp_path: Path, capsys: Capsys) -> None:
        broken = families.write_model(tmp_path / "task", {**TUNED, NAME: torch.full((12, 8), float("nan"))})
        refused(
            capsys, tmp_path, "--base", base, "--task", broken, "--out", tmp_path / "a" / "b" / "out",
            says=[broken, repr(NAME)],
        )  # fmt: skip


class TestFailures:
    """Right inputs, and a run that fails before it has finished a tensor: status 3 (130 for an interrupt), nothing left."""

    @pytest.fixture
    def arguments(self, base: Path, good: Path, out: Path) -> list[str | Path]:
        return ["--base", base, "--task", good, "--out", out, "--method", "averaging"]

    @pytest.mark.parametrize(("calls", "sharded"), [(0, False), (1, False), (0, True), (1, True), (5, True)])
    def test_disk_full(
        self,
        calls: int,
        sharded: bool,
        arguments: list[str | Path],
        out: Path,
        tmp_path: Path,
        capsys: Capsys,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write, left = os.pwrite, [calls]

        def full(*given: Any) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*given)

        monkeypatch.setattr(os, "pwrite", full)
        files = Path("/proc/self/fd")
        open_files = len(list(files.glob("*")))
        if sharded:
            arguments += ["--shard-size", "1KB"]
        refused(
            capsys, tmp_path, *arguments, status=3, says=[out, os.strerror(errno.ENOSPC), "nothing was left behind"]
        )
        assert len(list(files.glob("*"))) <= open_files

    @pytest.mark.parametrize("save_as", ["full", "adapter"])
    def test_file_size_limit(self, save_as: str, base: Path, adapter: Path, out: Path, tmp_path: Path) -> None:
        """A real failure of the kernel's, in a process of its own."""
        before = families.tree(tmp_path)
        code = (
            "import resource, runpy, sys\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
            "sys.argv = ['dcmerge', *sys.argv[1:]]\n"
            "runpy.run_module('dcmerge_ext', run_name='__main__')\n"
        )
        arguments = ["merge", "--base", base, "--task", adapter, "--out", out, "--save-as", save_as]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=tempfile.gettempdir(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 3, done.stderr
        assert f"failed: {out}: writing failed" in done.stderr
        assert "Traceback" not in done.stderr
        assert families.tree(tmp_path) == before

    def test_interrupt(
        self, arguments: list[str | Path], tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*given: Any) -> int:
            raise KeyboardInterrupt

        before = families.tree(tmp_path)
        monkeypatch.setattr(os, "pwrite", interrupted)
        result = run(capsys, "merge", *arguments)
        assert result.status == 130
        assert "interrupted" in result.err
        assert "Traceback" not in result.err
        assert families.tree(tmp_path) == before

    def test_a_mistake_in_the_package_shows_where(
        self, arguments: list[str | Path], tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def mistake(*given: Any) -> int:
            raise ZeroDivisionError("mistake")

        before = families.tree(tmp_path)
        monkeypatch.setattr(os, "pwrite", mistake)
        result = run(capsys, "merge", *arguments)
        assert result.status == 3
        assert "Traceback" in result.err
        assert "internal error" in result.err
        assert families.tree(tmp_path) == before

    def test_the_earlier_output_survives_a_failure(
        self,
        arguments: list[str | Path],
        out: Path,
        tmp_path: Path,
        capsys: Capsys,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert run(capsys, "merge", *arguments).status == 0

        def full(*given: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        refused(capsys, tmp_path, *arguments, "--overwrite", status=3, says=[out])

    @pytest.mark.parametrize("step", [0, 1])
    def test_the_earlier_output_survives_a_failed_exchange(
        self,
        step: int,
        arguments: list[str | Path],
        out: Path,
        tmp_path: Path,
        capsys: Capsys,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Renaming the old or the new directory fails."""
        assert run(capsys, "merge", *arguments).status == 0
        rename, calls = Path.rename, [0]

        def failing(path: Path, target: Path) -> Path:
            calls[0] += 1
            if calls[0] == step + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", failing)
        refused(capsys, tmp_path, *arguments, "--overwrite", status=3, says=[out, os.strerror(errno.EIO)])


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root reads everything; drop to nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def share(folder: Path) -> None:
    """Anyone may read: safetensors writes files for their owner alone."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that an unprivileged process can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o700)


class TestPermissions:
    @pytest.mark.parametrize("role", ["base", "task", "adapter", "config", "index", "directory", "folder"])
    def test_unreadable(self, role: str, open_folder: Path, capsys: Capsys) -> None:
        base = families.write_model(open_folder / "base", BASE)
        task = families.write_model(open_folder / "task", TUNED, "sharded" if role == "index" else "single")
        adapter = families.write_adapter(open_folder / "adapter", BASE)
        locked = {
            "base": base / MODEL,
            "task": task / MODEL,
            "adapter": adapter / "adapter_model.safetensors",
            "config": adapter / "adapter_config.json",
            "index": task / "model.safetensors.index.json",
            "directory": task,
            "folder": open_folder / "private" / "model",
        }[role]
        if role == "folder":
            task = families.write_model(locked, TUNED)
        share(open_folder)
        arguments = [
            "merge",
            "--base",
            base,
            *tasks(task, adapter),
            "--out",
            open_folder / "out",
            "--method",
            "averaging",
        ]
        assert run(capsys, *arguments).status == 0  # nothing else is wrong, and everything is imported
        shutil.rmtree(open_folder / "out")
        closed = locked.parent if role == "folder" else locked
        closed.chmod(0)
        with without_privileges():
            result = run(capsys, *arguments)
            left = {p.name for p in open_folder.iterdir()}
        closed.chmod(0o700)
        assert result.status == 1, result.err
        assert str(locked) in result.err
        assert "Permission denied" in result.err
        assert "Traceback" not in result.err
        assert left == {"base", "task", "adapter"} | ({"private"} if role == "folder" else set())

    def test_a_place_that_cannot_be_written(self, open_folder: Path, capsys: Capsys) -> None:
        base = families.write_model(open_folder / "base", BASE)
        (open_folder / "closed").mkdir()
        share(open_folder)
        (open_folder / "closed").chmod(0o555)
        out = open_folder / "closed" / "out"
        arguments = ["merge", "--base", base, "--task", base, "--out", out, "--method", "averaging"]
        with without_privileges():
            result = run(capsys, *arguments)
        assert result.status == 1
        assert f"error: {out}" in result.err
        assert f"no permission to write in {open_folder / 'closed'}" in result.err
        assert list((open_folder / "closed").iterdir()) == []


class TestMessages:
    """Paths are printed as they are."""

    @pytest.mark.parametrize(
        "name", ["[bold]x[/bold]", "a[red]", "[/]", "x[0]", "back\\[slash]", ":smile:", "a b", "ünïcode", "-x"]
    )
    def test_literal(self, name: str, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        absent = tmp_path / name
        refused(
            capsys, tmp_path, "--base", base, f"--task={absent}", "--out", out,
            says=[f"error: {absent}: no such file or directory"],
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["layers[0].weight", "[red]weight", ":smile:.weight", "x\\[y].weight"])
    def test_literal_names_of_tensors(self, name: str, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        base = families.write_model(tmp_path / "base", {name: torch.ones(2, 3)})
        task = families.write_model(tmp_path / "task", {name: torch.ones(3, 2)})
        refused(capsys, tmp_path, "--base", base, "--task", task, "--out", out, says=[f"tensor {name!r}"])
        shutil.rmtree(task)
        task = families.write_model(tmp_path / "task", {name: torch.zeros(2, 3)})
        result = run(capsys, "plan", "--base", base, "--task", task, "--out", out, "-v")
        assert result.status == 0
        assert name in result.out

    def test_a_path_longer_than_a_line_stays_in_one_piece(
        self, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        absent = tmp_path / ("x" * 200) / ("y" * 200)
        refused(capsys, tmp_path, "--base", base, "--task", absent, "--out", out, says=[absent])

    def test_notes_and_warnings_name_paths_in_one_piece(self, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        half = families.toy(dtype=torch.bfloat16)
        folder = tmp_path / ("long" * 30) / "[bold]x[/bold]"
        base = families.write_model(tmp_path / "base", half)
        task = families.write_model(folder / "t", {**families.tuned(half, 1, 0.002), "more": torch.ones(2)})
        result = run(capsys, "merge", "--base", base, "--task", task, "--out", out, "--extra", "ignore")
        assert result.status == 0
        lines = result.err.splitlines()
        assert any(f"note: {task}: 1 tensors that the base does not have" in line for line in lines)
        assert any(f"{task}: its update is only" in line for line in lines)

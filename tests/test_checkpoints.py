"""Merging model files: what is merged, averaged and copied, bit by bit, in every layout of inputs and outputs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import cases
import families
import numpy as np
import pytest
import torch
from families import merged, run, same_bits, tasks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcmerge_ext import _native, merge_checkpoints, merge_state_dicts, use_backend
from dcmerge_ext.checkpoints import plan as plan_module
from dcmerge_ext.methods import list_methods

METHODS = [name for name in list_methods() if name not in cases.LORA_ONLY]
ELEMENTWISE = [name for name, cls in list_methods().items() if cls.elementwise]
MATRIX = [name for name in METHODS if name not in ELEMENTWISE]

BASE = families.toy()
TUNED = [families.tuned(BASE, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Base and three fine-tunes, each a directory with one file."""
    folder = tmp_path_factory.mktemp("family")
    return families.write_model(folder / "base", BASE), [
        families.write_model(folder / f"task{i}", model) for i, model in enumerate(TUNED)
    ]


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def mean_update(name: str) -> Tensor:
    """(1/T) sum of the updates, float64."""
    return sum(model[name].double() - BASE[name].double() for model in TUNED) / len(TUNED)


class TestForms:
    """However the same tensors lie in files, the merged bytes are the same."""

    @pytest.mark.parametrize("method", ["dc_merge", "ties"])
    @pytest.mark.parametrize("form", families.FORMS)
    def test_of_directories(
        self,
        form: str,
        method: str,
        family: tuple[Path, list[Path]],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        base, models = family
        expected = merged(capsys, tmp_path / "expected", "--base", base, *tasks(*models), "--method", method)
        other_base = families.write_model(tmp_path / "base", BASE, form)
        others = [families.write_model(tmp_path / f"task{i}", m, form) for i, m in enumerate(TUNED)]
        found = merged(capsys, tmp_path / "found", "--base", other_base, *tasks(*others), "--method", method)
        equal(found, expected)

    @pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
    def test_of_single_files(
        self, suffix: str, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        expected = merged(capsys, tmp_path / "expected", "--base", base, *tasks(*models))
        for name, model in [("base", BASE), *((f"task{i}", m) for i, m in enumerate(TUNED))]:
            file = tmp_path / f"{name}{suffix}"
            save_file(model, file) if suffix == ".safetensors" else torch.save(model, file)
        files = [tmp_path / f"task{i}{suffix}" for i in range(3)]
        found = merged(capsys, tmp_path / "found", "--base", tmp_path / f"base{suffix}", *tasks(*files))
        equal(found, expected)

    def test_pickles_of_old_torch(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        expected = merged(capsys, tmp_path / "expected", "--base", base, *tasks(*models))
        torch.save(TUNED[0], tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        found = merged(capsys, tmp_path / "found", "--base", base, *tasks(tmp_path / "old.bin", *models[1:]))
        equal(found, expected)

    def test_shards_linked_from_a_download_cache(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        expected = merged(capsys, tmp_path / "expected", "--base", base, *tasks(*models))
        sharded = families.write_model(tmp_path / "snapshots" / "base", BASE, "sharded")
        (tmp_path / "blobs").mkdir()
        for file in list(sharded.glob("*.safetensors")):
            file.rename(tmp_path / "blobs" / file.name)
            file.symlink_to(tmp_path / "blobs" / file.name)
        equal(merged(capsys, tmp_path / "found", "--base", sharded, *tasks(*models)), expected)

    @pytest.mark.parametrize("shard_size", ["1KB", "700", "1B", "2KiB", "0.001MB"])
    def test_shards_of_the_output(
        self, shard_size: str, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        expected = merged(capsys, tmp_path / "expected", "--base", base, *tasks(*models))
        found = merged(capsys, tmp_path / "found", "--base", base, *tasks(*models), "--shard-size", shard_size)
        equal(found, expected)
        limit = {"1KB": 1000, "700": 700, "1B": 1, "2KiB": 2048, "0.001MB": 1000}[shard_size]
        index = json.loads((tmp_path / "found" / "model.safetensors.index.json").read_text())
        files = sorted((tmp_path / "found").glob("*.safetensors"))
        assert [f.name for f in files] == [
            f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
        ]
        stored = {file.name: load_file(file) for file in files}
        assert index["weight_map"] == {name: file for file, content in stored.items() for name in content}
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
        for content in stored.values():
            assert (
                sum(v.nbytes for v in content.values()) <= limit or len([v for v in content.values() if v.numel()]) == 1
            )

    def test_safetensors_come_before_pickles(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Both lie in many directories; the pickle is not opened."""
        base, models = family
        expected = merged(capsys, tmp_path / "expected", "--base", base, *tasks(*models))
        both = families.write_model(tmp_path / "both", BASE, "sharded")
        (both / "pytorch_model.bin").write_bytes(b"not a pickle")
        (both / "consolidated.safetensors").write_bytes(b"another layout of the same model")
        equal(merged(capsys, tmp_path / "found", "--base", both, *tasks(*models)), expected)

    def test_a_stale_index_of_the_base_is_not_copied(
        self, tmp_path: Path, family: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        sharded = families.write_model(tmp_path / "base", BASE, "sharded")
        merged(capsys, tmp_path / "out", "--base", sharded, *tasks(*family[1]))
        assert not list((tmp_path / "out").glob("*.index.json"))

    def test_a_merged_checkpoint_can_be_merged_again(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        once = merged(capsys, tmp_path / "1", "--base", base, *tasks(*models), "--shard-size", "1KB")
        again = merged(capsys, tmp_path / "2", "--base", base, "--task", tmp_path / "1", "--method", "averaging")
        equal(again, once)


class TestContent:
    """Which tensors are merged, averaged and copied."""

    @pytest.mark.parametrize("method", METHODS)
    def test_buffers_and_unchanged_tensors_keep_every_bit(
        self, method: str, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        # at its default it keeps so little that a vector of a layer's norm may have nothing of it
        options = ("--set", "ratio=0.5") if method == "pcb" else ()
        found = merged(capsys, tmp_path / "out", "--base", base, *tasks(*models), "--method", method, *options)
        assert found.keys() == BASE.keys()
        kept = {name for name in BASE if same_bits(found[name], BASE[name])}
        assert kept == {"frozen.weight", "empty.weight", "position_ids", "mask", "steps"}
        assert math.copysign(1, found["frozen.weight"][0, 0]) == -1

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_fine_tunes_that_change_nothing(
        self, method: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = families.toy(dtype=dtype)
        path = families.write_model(tmp_path / "base", base)
        equal(merged(capsys, tmp_path / "out", "--base", path, *tasks(path, path), "--method", method), base)

    @pytest.mark.parametrize("method", ELEMENTWISE)
    def test_elementwise_methods_take_every_floating_tensor(
        self, method: str, family: tuple[Path, list[Path]], tmp_path: Path
    ) -> None:
        base, models = family
        record = merge_checkpoints(base, models, tmp_path / "out", method).record
        actions = {t["name"]: t["action"] for t in record["tensors"]}
        assert {n for n, a in actions.items() if a == "merge"} == {
            n for n, v in BASE.items() if v.is_floating_point() and v.numel()
        }
        assert "mean" not in actions.values()

    @pytest.mark.parametrize("method", MATRIX)
    def test_matrix_methods_take_matrices_and_stacks_of_experts(
        self, method: str, family: tuple[Path, list[Path]], tmp_path: Path
    ) -> None:
        base, models = family
        record = merge_checkpoints(base, models, tmp_path / "out", method).record
        actions = {t["name"]: t["action"] for t in record["tensors"]}
        matrices = {n for n, v in BASE.items() if v.is_floating_point() and v.ndim == 2 and v.numel()}
        assert {n for n, a in actions.items() if a == "merge"} == {*matrices, "layers.0.moe.experts.weight"}
        assert {n for n, a in actions.items() if a == "mean"} == {
            "layers.0.norm.weight", "layers.0.gain", "layers.0.conv.weight",
        }  # fmt: skip

    def test_other_tensors_take_the_mean_times_the_scale(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        found = merged(capsys, tmp_path / "out", "--base", base, *tasks(*models), "--scale", "1.5")
        for name in ("layers.0.norm.weight", "layers.0.gain", "layers.0.conv.weight"):
            expected = BASE[name].double() + 1.5 * mean_update(name)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("method", [name for name in MATRIX if list_methods()[name].scope == "matrix"])
    def test_stacks_of_experts_are_batches_of_matrices(
        self, method: str, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        found = merged(capsys, tmp_path / "out", "--base", base, *tasks(*models), "--method", method)
        name = "layers.0.moe.experts.weight"
        for e in range(3):
            alone = merge_state_dicts({"w": BASE[name][e]}, [{"w": m[name][e]} for m in TUNED], method=method)
            torch.testing.assert_close(found[name][e], alone["w"], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_statistics_of_batch_norm_stay_valid(
        self, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A running variance is no weight: extrapolated by a scale of 2 it turns negative, and the model returns NaN."""
        base = {"bn.weight": torch.ones(6), "bn.running_var": torch.ones(6), "fc.weight": torch.eye(6)}
        models = [{**families.tuned(base, i), "bn.running_var": torch.full((6,), 0.1 + 0.1 * i)} for i in range(4)]
        paths = [families.write_model(tmp_path / str(i), m) for i, m in enumerate([base, *models])]
        found = merged(capsys, tmp_path / "out", "--base", paths[0], *tasks(*paths[1:]), "--method", method)
        assert found["bn.running_var"].min() > 0

    def test_averaging_does_not_depend_on_the_order_of_tasks(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        found = [
            merged(capsys, tmp_path / str(i), "--base", base, *tasks(*order), "--method", "averaging")
            for i, order in enumerate(itertools.permutations(models))
        ]
        for name in BASE:
            for other in found[1:]:
                torch.testing.assert_close(other[name], found[0][name], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            found[0]["lm_head.weight"].double(), sum(m["lm_head.weight"].double() for m in TUNED) / 3, rtol=0, atol=1e-6
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_weights_of_tasks(
        self, method: str, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A weight multiplies the task's update."""
        base, models = family
        weights = (0.5, 1, -0.25)
        chosen = [models[0].as_posix() + "=0.5", models[1], f"{models[2]}=-0.25"]
        found = merged(capsys, tmp_path / "out", "--base", base, *tasks(*chosen), "--method", method, "--scale", "1")
        scaled = [
            {n: BASE[n] + w * (m[n] - BASE[n]) if m[n].is_floating_point() else m[n] for n in BASE}
            for m, w in zip(TUNED, weights, strict=True)
        ]
        expected = merge_state_dicts(BASE, TUNED, method=method, scale=1.0, weights=weights)
        equal(found, expected)
        if method in ("averaging", "task_arithmetic"):
            by_hand = merge_state_dicts(BASE, scaled, method=method, scale=1.0)
            for name, values in by_hand.items():
                torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)

    def test_directories_whose_names_hold_an_equals_sign(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        named = families.write_model(tmp_path / "lr=0.5", TUNED[0])
        found = merged(capsys, tmp_path / "1", "--base", base, *tasks(named), "--method", "averaging")
        equal(found, merged(capsys, tmp_path / "2", "--base", base, *tasks(models[0]), "--method", "averaging"))
        found = merged(capsys, tmp_path / "3", "--base", base, *tasks(f"{named}=0.25"), "--method", "averaging")
        quarter = merged(capsys, tmp_path / "4", "--base", base, *tasks(f"{models[0]}=0.25"), "--method", "averaging")
        equal(found, quarter)


class TestPanels:
    """Elementwise methods work in row panels; the split must not show."""

    @pytest.mark.parametrize("method", ELEMENTWISE)
    @pytest.mark.parametrize("elements", [1, 7, 24, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_same_bytes(
        self,
        method: str,
        elements: int,
        dtype: torch.dtype,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        start = families.toy(dtype=dtype)
        base = families.write_model(tmp_path / "base", start)
        models = [families.write_model(tmp_path / f"t{i}", families.tuned(start, i)) for i in range(3)]
        arguments = ("--base", base, *tasks(*models), "--method", method)
        expected = merged(capsys, tmp_path / "whole", *arguments)
        monkeypatch.setattr(plan_module, "PANEL_ELEMENTS", elements)
        equal(merged(capsys, tmp_path / "panels", *arguments), expected)

    @pytest.mark.parametrize("method", ELEMENTWISE)
    def test_adapters_and_full_models_in_panels(
        self, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = families.write_model(tmp_path / "base", BASE)
        adapters = [families.write_adapter(tmp_path / f"a{i}", BASE, rank=2 + i, seed=i) for i in range(2)]
        full = families.write_model(tmp_path / "full", TUNED[0])
        for name, chosen in (("adapters", adapters), ("mixed", [*adapters, full])):
            arguments = ("--base", base, *tasks(*chosen), "--method", method)
            monkeypatch.setattr(plan_module, "PANEL_ELEMENTS", 1 << 20)
            expected = merged(capsys, tmp_path / f"{name} whole", *arguments)
            monkeypatch.setattr(plan_module, "PANEL_ELEMENTS", 17)
            found = merged(capsys, tmp_path / f"{name} panels", *arguments)
            for key, values in expected.items():  # a product of factors is rounded by its shape
                torch.testing.assert_close(found[key], values, rtol=1e-6, atol=1e-6)

    def test_digests_of_inputs_do_not_depend_on_panels(
        self, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, models = family
        whole = merge_checkpoints(base, models, tmp_path / "1", "averaging").record
        monkeypatch.setattr(plan_module, "PANEL_ELEMENTS", 5)
        panels = merge_checkpoints(base, models, tmp_path / "2", "averaging").record
        assert [t["content"] for t in panels["tasks"]] == [t["content"] for t in whole["tasks"]]
        assert panels["base"]["content"] == whole["base"]["content"]


class TestSameAsInMemory:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_merge_checkpoints_and_merge_state_dicts(self, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
        base = families.toy(dtype=dtype)
        models = [families.tuned(base, seed) for seed in range(3)]
        paths = [families.write_model(tmp_path / str(i), m) for i, m in enumerate([base, *models])]
        for options in ({}, {"scale": 0.7, "weights": [1.0, 0.5, 2.0]}):
            out = tmp_path / f"out{len(options)}"
            report = merge_checkpoints(paths[0], paths[1:], out, method, **options)
            assert report.out == out
            equal(families.read_model(out), merge_state_dicts(base, models, method=method, **options))

    def test_the_backend_that_was_chosen_runs_everywhere(
        self, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also in the threads of the executor."""
        base, models = family
        merge_checkpoints(base, models, tmp_path / "native", "ties")

        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("the native core ran although reference was chosen")

        for name in ("elect", "magnitude_histogram", "kth_magnitude"):
            monkeypatch.setattr(_native, name, forbidden)
        with use_backend("reference"):
            merge_checkpoints(base, models, tmp_path / "reference", "ties")
        equal(families.read_model(tmp_path / "reference"), families.read_model(tmp_path / "native"))


class TestThreads:
    @pytest.mark.parametrize("method", ELEMENTWISE)
    @pytest.mark.usefixtures("restore_threads")
    def test_elementwise_methods_give_the_same_bytes_on_any_number(
        self, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        base = {f"layer{i}.weight": torch.randn(300, 250, generator=generator) for i in range(5)}
        models = [families.tuned(base, seed) for seed in range(3)]
        paths = [families.write_model(tmp_path / str(i), m) for i, m in enumerate([base, *models])]
        monkeypatch.setattr(plan_module, "PANEL_ELEMENTS", 10_000)
        outs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            merge_checkpoints(paths[0], paths[1:], tmp_path / f"out{threads}", method)
            assert torch.get_num_threads() == threads
            outs.append(tmp_path / f"out{threads}" / "model.safetensors")
        assert len({out.read_bytes() for out in outs}) == 1


class TestTies:
    """Trimming is over the whole model: one vector per task."""

    @staticmethod
    def brute_force(keep: float) -> dict[str, np.ndarray]:
        """arXiv 2306.01708 on concatenated float32 vectors, with the counts of its published code."""
        names = sorted(n for n, v in BASE.items() if v.is_floating_point())
        x = np.stack([np.concatenate([(m[n] - BASE[n]).numpy().ravel() for n in names]) for m in TUNED])
        total = x.shape[1]
        if keep < 1:
            limits = np.sort(np.abs(x), axis=1)[:, total - int(total * keep) - 1]
            x = np.where(np.abs(x) >= limits[:, None], x, np.float32(0))
            assert ((x != 0).sum(1) == int(total * keep) + 1).all()  # the published count
        sign = np.sign(x.sum(0, dtype=np.float32))
        sign[sign == 0] = np.sign(sign.sum())
        chosen = np.where(sign > 0, x > 0, x < 0)
        mean = (x * chosen).sum(0, dtype=np.float32) / np.maximum(chosen.sum(0), 1).astype(np.float32)
        parts = np.split(mean, np.cumsum([BASE[n].numel() for n in names])[:-1])
        return {n: p.reshape(BASE[n].shape) for n, p in zip(names, parts, strict=True)}

    @pytest.mark.parametrize("keep", [0.01, 0.2, 0.77])
    @pytest.mark.parametrize("elements", [11, 1 << 20])
    def test_equals_brute_force(
        self,
        keep: float,
        elements: int,
        family: tuple[Path, list[Path]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        base, models = family
        monkeypatch.setattr(plan_module, "PANEL_ELEMENTS", elements)
        found = merged(
            capsys, tmp_path / "out", "--base", base, *tasks(*models), "--method", "ties", "--set", f"keep={keep}",
            "--scale", "1",
        )  # fmt: skip
        for name, update in self.brute_force(keep).items():
            expected = BASE[name] + torch.from_numpy(update)
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(found[name] != BASE[name], expected != BASE[name])


class TestDtypes:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_once(
        self, method: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Half-precision inputs give the float32 result of the same values, cast once."""
        half = families.toy(dtype=dtype)
        models = [families.tuned(half, seed) for seed in range(3)]
        paths = [families.write_model(tmp_path / f"h{i}", m) for i, m in enumerate([half, *models])]
        wide = [{n: v.float() if v.is_floating_point() else v for n, v in m.items()} for m in (half, *models)]
        wide_paths = [families.write_model(tmp_path / f"w{i}", m) for i, m in enumerate(wide)]
        arguments = ("--method", method)
        found = merged(capsys, tmp_path / "half", "--base", paths[0], *tasks(*paths[1:]), *arguments)
        exact = merged(capsys, tmp_path / "wide", "--base", wide_paths[0], *tasks(*wide_paths[1:]), *arguments)
        equal(found, {n: v.to(dtype) if v.is_floating_point() else v for n, v in exact.items()})

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("stored", ["float32", "bfloat16"])
    def test_conversion(self, stored: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = families.toy(dtype=getattr(torch, stored))
        config = {"model_type": "toy", "torch_dtype": stored, "hidden": 8}
        paths = [
            families.write_model(tmp_path / str(i), m, config=config)
            for i, m in enumerate([base, *(families.tuned(base, seed) for seed in range(2))])
        ]
        arguments = ("--base", paths[0], *tasks(*paths[1:]))
        wide = merged(capsys, tmp_path / "wide", *arguments, "--dtype", "float32")
        found = merged(capsys, tmp_path / "out", *arguments, "--dtype", dtype)
        target = getattr(torch, dtype)
        equal(found, {n: v.to(target) if v.is_floating_point() else v for n, v in wide.items()})
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, "torch_dtype": dtype}

    def test_keep_leaves_the_configuration_alone(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        merged(capsys, tmp_path / "out", "--base", base, *tasks(*models))
        assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()

    def test_float64_is_merged_in_float64(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = families.toy(dtype=torch.float64)
        models = [families.tuned(base, seed, 1e-9) for seed in range(2)]
        paths = [families.write_model(tmp_path / str(i), m) for i, m in enumerate([base, *models])]
        found = merged(capsys, tmp_path / "out", "--base", paths[0], *tasks(*paths[1:]), "--method", "averaging")
        for name, values in base.items():
            if values.is_floating_point():
                mean = (models[0][name] + models[1][name]) / 2
                torch.testing.assert_close(found[name], mean, rtol=1e-15, atol=1e-15)

    def test_a_float32_fine_tune_of_a_half_precision_base(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = families.toy(dtype=torch.bfloat16)
        wide = {n: v.float() if v.is_floating_point() else v for n, v in base.items()}
        model = families.tuned(wide, 1)
        paths = [families.write_model(tmp_path / str(i), m) for i, m in enumerate([base, model])]
        arguments = ("--base", paths[0], "--task", paths[1], "--method", "averaging")
        found = merged(capsys, tmp_path / "keep", *arguments)
        equal(found, {n: model[n].to(v.dtype) if v.is_floating_point() else v for n, v in base.items()})
        found = merged(capsys, tmp_path / "wide", *arguments, "--dtype", "float32")
        for name, values in wide.items():
            if values.is_floating_point():
                torch.testing.assert_close(found[name], model[name], rtol=1e-6, atol=1e-6)

    def test_a_change_near_the_rounding_floor_is_reported(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = families.toy(dtype=torch.bfloat16)
        paths = [families.write_model(tmp_path / "base", base)]
        paths += [families.write_model(tmp_path / f"t{i}", families.tuned(base, i, 0.002)) for i in range(2)]
        result = run(capsys, "merge", "--out", tmp_path / "out", "--base", paths[0], *tasks(*paths[1:]))
        assert result.status == 0
        text = " ".join(result.err.split())
        assert "of the merged change is lost to rounding in half precision; pass --dtype float32 to keep it" in text
        assert f"{paths[1]}: its update is only" in text
        record = json.loads((tmp_path / "out" / "dcmerge.json").read_text())
        assert len(record["warnings"]) == 3
        assert 0.1 < record["rounding"]["fraction_of_change_lost"] < 1
        assert all(0 < ratio < 2 for ratio in record["rounding"]["update_over_rounding_floor"])

    def test_overflow_of_float16_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """65504 is the largest; a merge must not write Inf."""
        base = {"w": torch.full((4, 4), 60_000.0).fill_diagonal_(1)}
        model = {"w": torch.full((4, 4), 70_000.0).fill_diagonal_(1)}
        paths = [families.write_model(tmp_path / str(i), m) for i, m in enumerate([base, model])]
        families.refused(
            capsys, tmp_path, "--base", paths[0], "--task", paths[1], "--out", tmp_path / "out",
            "--method", "averaging", "--dtype", "float16", says=["'w'", "float16"],
        )  # fmt: skip


class TestVocabulary:
    """Another number of rows in an embedding."""

    NAMES = ("embed_tokens.weight", "lm_head.weight")

    @pytest.fixture
    def paths(self, tmp_path: Path) -> tuple[Path, list[Path]]:
        larger = dict(TUNED[0])
        for name in self.NAMES:
            larger[name] = torch.cat([larger[name], torch.ones(2, 8)])
        models = [larger, TUNED[1], TUNED[2]]
        return families.write_model(tmp_path / "base", BASE), [
            families.write_model(tmp_path / f"t{i}", m) for i, m in enumerate(models)
        ]

    def test_is_an_error_by_default(
        self, paths: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = paths
        families.refused(
            capsys, tmp_path, "--base", base, *tasks(*models), "--out", tmp_path / "out",
            says=[models[0] / "model.safetensors", "embed_tokens.weight", "22x8", "20x8", "--vocab base", "--vocab skip"],
        )  # fmt: skip

    @pytest.mark.parametrize("method", METHODS)
    def test_base_keeps_the_tensor_bit_for_bit(
        self, method: str, paths: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = paths
        arguments = ("--base", base, *tasks(*models), "--method", method, "--vocab", "base")
        found = merged(capsys, tmp_path / "out", *arguments)
        for name in self.NAMES:
            assert same_bits(found[name], BASE[name])
        assert not torch.equal(found["layers.0.attn.weight"], BASE["layers.0.attn.weight"])

    @pytest.mark.parametrize("method", ["averaging", "task_arithmetic"])
    def test_skip_leaves_the_task_out_of_the_tensor(
        self, method: str, paths: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It counts as a task that does not change the tensor."""
        base, models = paths
        unchanged = {**TUNED[0], **{name: BASE[name] for name in self.NAMES}}
        expected = merge_state_dicts(BASE, [unchanged, *TUNED[1:]], method=method)
        arguments = ("--base", base, *tasks(*models), "--method", method, "--vocab", "skip")
        equal(merged(capsys, tmp_path / "out", *arguments), expected)

    @pytest.mark.parametrize("method", METHODS)
    def test_skip_works_with_every_method(
        self, method: str, paths: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = paths
        arguments = ("--base", base, *tasks(*models), "--method", method, "--vocab", "skip")
        found = merged(capsys, tmp_path / "out", *arguments)
        for name in self.NAMES:
            assert found[name].shape == (20, 8)
            assert not torch.equal(found[name], BASE[name])

    def test_other_shapes_are_no_vocabulary(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = families.write_model(tmp_path / "base", BASE)
        other = {**TUNED[0], "layers.0.attn.weight": torch.zeros(13, 8)}
        model = families.write_model(tmp_path / "t", other)
        families.refused(
            capsys, tmp_path, "--base", base, "--task", model, "--out", tmp_path / "out", "--vocab", "base",
            says=[model, base, "layers.0.attn.weight", "13x8", "12x8"],
        )  # fmt: skip


class TestOverrides:
    """Per-tensor exceptions of a configuration file."""

    def test_every_kind(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        (tmp_path / "merge.yaml").write_text(
            json.dumps(
                {
                    "base": str(base), "tasks": [str(m) for m in models], "out": str(tmp_path / "out"), "scale": 0.5,
                    "overrides": [
                        {"match": "attn", "action": "copy"},
                        {"match": r"lm_head\.weight", "action": "copy"},
                        {"match": r"layers\.0\.attn\.weight", "method": "task_arithmetic", "scale": 2},
                        {"match": r"layers\.0\..*weight", "action": "mean"},
                        {"match": r"layers\.1\.attn\.weight", "options": {"aggregate": "sum", "block_size": 0}},
                        {"match": r"layers\..*", "action": "copy"},
                    ],
                }
            )
        )  # fmt: skip
        result = run(capsys, "merge", "--config", tmp_path / "merge.yaml")
        assert result.status == 0, result.err
        assert "note: override 'attn' matches no tensor" in " ".join(result.err.split())
        found = families.read_model(tmp_path / "out")

        def update(name: str) -> Tensor:
            return found[name].double() - BASE[name].double()

        close = {"rtol": 1e-5, "atol": 1e-6}
        assert same_bits(found["lm_head.weight"], BASE["lm_head.weight"])
        name = "layers.0.attn.weight"
        torch.testing.assert_close(update(name), 2 * 3 * mean_update(name), **close)
        for name in ("layers.0.mlp.weight", "layers.0.moe.experts.weight", "layers.0.conv.weight"):
            torch.testing.assert_close(update(name), 0.5 * mean_update(name), **close)
        assert same_bits(found["layers.0.gain"], BASE["layers.0.gain"])  # no "weight" in its name: the last applies
        name = "layers.1.attn.weight"
        own = {"w": BASE[name]}, [{"w": m[name]} for m in TUNED]
        expected = merge_state_dicts(*own, scale=0.5, aggregate="sum", block_size=0)["w"]
        assert same_bits(found[name], expected)
        assert not torch.equal(found[name], merge_state_dicts(*own, scale=0.5)["w"])

    def test_a_matrix_method_for_a_convolution(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Flattened to (out, in * kernel)."""
        base, models = family
        report = merge_checkpoints(
            base, models, tmp_path / "out", overrides=[{"match": ".*conv.*", "action": "merge"}], scale=1.0
        )
        found = families.read_model(report.out)["layers.0.conv.weight"]
        flat = [m["layers.0.conv.weight"].flatten(1) for m in (BASE, *TUNED)]
        expected = merge_state_dicts({"w": flat[0]}, [{"w": f} for f in flat[1:]], scale=1.0)["w"]
        assert same_bits(found, expected.reshape(found.shape))

    def test_options_of_the_run_apply_where_the_method_is_the_same(
        self, family: tuple[Path, list[Path]], tmp_path: Path
    ) -> None:
        base, models = family
        overrides = [{"match": "layers.0.attn.weight", "options": {"keep": 0.3}}, {"match": "lm_head.*", "scale": 3.0}]
        merge_checkpoints(base, models, tmp_path / "out", rank=2, scale=1.0, overrides=overrides)
        found = families.read_model(tmp_path / "out")
        for name, options in (
            ("layers.0.attn.weight", {"keep": 0.3, "scale": 1.0}), ("lm_head.weight", {"scale": 3.0}),
        ):  # fmt: skip
            own = {"w": BASE[name]}, [{"w": m[name]} for m in TUNED]
            assert same_bits(found[name], merge_state_dicts(*own, rank=2, **options)["w"])


class TestTied:
    """Tensors stored under two names, or under one and used twice."""

    @pytest.mark.parametrize("kind", ["gpt2-lm", "llama-lm", "t5"])
    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_stay_tied(self, kind: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        settings = {"tie_word_embeddings": True}
        model = families.tiny(kind, **settings)
        base = families.save_pretrained(model, tmp_path / "base")
        models = [families.perturbed(base, tmp_path / f"t{i}", seed=i) for i in range(2)]
        expected = merged(capsys, tmp_path / "expected", "--base", base, *tasks(*models))
        if form == "bin":  # as torch.save of a tied model's state dict: both names, one storage
            for path in (base, *models):
                tied = families.load_pretrained(model, path)
                torch.save(tied.state_dict(), path / "pytorch_model.bin")
                (path / "model.safetensors").unlink()
        found = merged(capsys, tmp_path / "out", "--base", base, *tasks(*models))
        for name, values in found.items():
            assert same_bits(values, expected[name])
        loaded = families.load_pretrained(model, tmp_path / "out")
        embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
        assert embedding.data_ptr() == head.data_ptr()
        start = families.load_pretrained(model, base)
        assert not torch.equal(embedding, start.get_input_embeddings().weight)
        reference = families.load_pretrained(model, tmp_path / "expected")
        torch.testing.assert_close(families.outputs(loaded), families.outputs(reference), rtol=0, atol=0)
        assert families.outputs(loaded).isfinite().all()

    def test_a_fine_tune_that_kept_the_other_name(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The base names the tied matrix twice, the fine-tune once, by its second name."""
        shared = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
        base = families.write_model(tmp_path / "base", {"embed.weight": shared, "head.weight": shared}, "bin")
        model = families.write_model(tmp_path / "t", {"head.weight": shared + 1})
        found = merged(capsys, tmp_path / "out", "--base", base, "--task", model, "--method", "averaging")
        for values in found.values():
            torch.testing.assert_close(values, shared + 1)

    def test_a_fine_tune_that_untied_them(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Two different matrices cannot go into one tied one unnoticed."""
        shared = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
        base = families.write_model(tmp_path / "base", {"embed.weight": shared, "head.weight": shared}, "bin")
        model = families.write_model(tmp_path / "t", {"embed.weight": shared + 1, "head.weight": shared + 2})
        families.refused(
            capsys, tmp_path, "--base", base, "--task", model, "--out", tmp_path / "out", "--method", "averaging",
            says=[model, "head.weight", "embed.weight"],
        )  # fmt: skip

    def test_a_tied_fine_tune_of_an_untied_base(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        values = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0))
        base = families.write_model(tmp_path / "base", {"embed.weight": values[0], "head.weight": values[1]})
        shared = values[0] + 1
        model = families.write_model(tmp_path / "t", {"embed.weight": shared, "head.weight": shared}, "bin")
        found = merged(capsys, tmp_path / "out", "--base", base, "--task", model, "--method", "averaging")
        torch.testing.assert_close(found["embed.weight"], shared)
        torch.testing.assert_close(found["head.weight"], shared)


class TestTransformers:
    """Real model classes, sharded in and out."""

    @pytest.mark.parametrize("kind", ["bert", "gpt2-lm", "t5", "resnet"])
    def test_loads_and_runs(self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        transformers = pytest.importorskip("transformers")
        model = families.tiny(kind)
        base = families.save_pretrained(model, tmp_path / "base", max_shard_size="10KB")
        assert len(list(base.glob("*.safetensors"))) > 1
        models = [families.perturbed(base, tmp_path / f"t{i}", seed=i) for i in range(2)]
        merged(capsys, tmp_path / "out", "--base", base, *tasks(*models), "--shard-size", "8KB")
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        loaded = families.load_pretrained(model, tmp_path / "out")
        found = families.outputs(loaded)
        assert found.isfinite().all()
        assert not torch.allclose(found, families.outputs(model), atol=1e-4)
        families.load_pretrained(transformers.AutoModel, tmp_path / "out")


class TestSafetensorsWriter:
    """Files as the library writes them."""

    def test_header_and_alignment(
        self, family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, models = family
        merged(capsys, tmp_path / "out", "--base", base, *tasks(*models))
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        data = (tmp_path / "out" / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert (8 + length) % 8 == 0
        widths = {"F32": 4, "I64": 8, "I32": 4, "BOOL": 1}
        spans = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            assert start % widths[entry["dtype"]] == 0
            assert end - start == math.prod(entry["shape"]) * widths[entry["dtype"]]
            spans.append((start, end))
        spans.sort()
        assert spans[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        assert 8 + length + spans[-1][1] == len(data)

"""PEFT adapters: read as PEFT reads them, merged, and written so that PEFT loads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from families import merged, refused, tasks
from safetensors.torch import load_file, save_file
from torch import Tensor

import dcmerge_ext
from dcmerge_ext.errors import InputError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

BertModel = transformers.BertModel
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ATTENTION = ["query", "key", "value"]

# Adapters of the BERT encoder. Every kind of setting that changes what an adapter means.
BERT_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "another rank": {"r": 7, "lora_alpha": 3, "target_modules": ["query", "value"]},
    "other targets": {"r": 3, "lora_alpha": 5, "target_modules": ["key", "intermediate.dense"]},
    "regular expression": {"r": 3, "lora_alpha": 5, "target_modules": r".*layer\.1\.attention.*(query|dense)"},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": [*ATTENTION, "dense"]},
    "rank pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "rank_pattern": {"query": 2, r"layer\.1\..*key": 6},
    },
    "alpha pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": ATTENTION,
        "alpha_pattern": {"layer.0.attention.self.query": 32, "value": 1}, "rank_pattern": {"value": 2},
    },
    "rslora with patterns": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION, "rank_pattern": {"key": 6},
        "alpha_pattern": {"key": 3},
    },
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "layers_to_transform": [1]},
    "half precision": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "dtype": torch.bfloat16},
    "saved modules": {"r": 4, "lora_alpha": 8, "target_modules": ["query"], "modules_to_save": ["pooler"]},
    "all biases": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "dense"], "bias": "all"},
    "biases of adapted modules": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "dense"], "bias": "lora_only"},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "dense"], "use_dora": True},
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["word_embeddings", "query"]},
    "two embeddings": {"r": 3, "lora_alpha": 9, "target_modules": ["word_embeddings", "position_embeddings"]},
    "orthogonal start": {"r": 4, "lora_alpha": 8, "target_modules": ["query"], "init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_pretrained(families.tiny("bert"), tmp_path_factory.mktemp("bert") / "base")


@pytest.fixture(scope="session")
def bert_adapters(bert: Path) -> dict[str, Path]:
    """One adapter of each kind, on disk."""
    return {
        name: families.save_lora(bert, BertModel, bert.parent / name.replace(" ", "_"), seed=seed, **settings)
        for seed, (name, settings) in enumerate(BERT_ADAPTERS.items())
    }


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_pretrained(families.tiny("gpt2-lm"), tmp_path_factory.mktemp("gpt2") / "base")


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_pretrained(families.tiny("resnet"), tmp_path_factory.mktemp("resnet") / "base")


@pytest.fixture(scope="session")
def gpt2_adapters(gpt2: Path) -> list[Path]:
    """Adapters of Conv1D modules, square ones among them."""
    settings: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 8, "target_modules": ["c_attn"], "use_rslora": True, "fan_in_fan_out": True},
    ]
    model = transformers.GPT2LMHeadModel
    return [families.save_lora(gpt2, model, gpt2.parent / f"a{i}", seed=i, **s) for i, s in enumerate(settings)]


@pytest.fixture(scope="session")
def resnet_adapters(resnet: Path) -> list[Path]:
    """Adapters of convolutions with kernels of 7, 3 and 1."""
    settings: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["convolution"]},
        {"r": 2, "lora_alpha": 8, "target_modules": r".*stages.*convolution", "use_rslora": True},
    ]
    model = transformers.ResNetModel
    return [families.save_lora(resnet, model, resnet.parent / f"a{i}", seed=i, **s) for i, s in enumerate(settings)]


def expect_sum(
    base: Path,
    found: dict[str, Tensor],
    model: type,
    adapters: list[Path],
    scale: float = 1.0,
    weights: tuple[float, ...] = (),
) -> None:
    """``found`` is base + scale * the weighted sum of what PEFT merges."""
    factors = weights or (1.0,) * len(adapters)
    updates = [families.peft_update(base, model, adapter) for adapter in adapters]
    start = families.read_model(base)
    assert found.keys() == start.keys()
    for name, values in start.items():
        change = sum(f * u[name] for f, u in zip(factors, updates, strict=True))
        torch.testing.assert_close(found[name].double(), values.double() + scale * change, **CLOSE)
    assert any(u[name].abs().max() > 0.01 for u in updates for name in start)


class TestEqualsPeft:
    """The result of task arithmetic at scale 1 is the base plus what PEFT's merge_and_unload adds for each adapter."""

    @pytest.mark.parametrize("kind", list(BERT_ADAPTERS))
    def test_alone(
        self, kind: str, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        adapter = bert_adapters[kind]
        found = merged(
            capsys, tmp_path / "out", "--base", bert, "--task", adapter, "--method", "task_arithmetic", "--scale", "1"
        )
        expect_sum(bert, found, BertModel, [adapter])

    def test_all_kinds_together(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kinds = [k for k in BERT_ADAPTERS if k not in ("all biases", "biases of adapted modules")]
        chosen = [bert_adapters[kind] for kind in kinds]
        weights = tuple(0.5 + 0.125 * i for i in range(len(chosen)))
        arguments = [f"{path}={weight}" for path, weight in zip(chosen, weights, strict=True)]
        found = merged(
            capsys,
            tmp_path / "out",
            "--base",
            bert,
            *tasks(*arguments),
            "--method",
            "task_arithmetic",
            "--scale",
            "0.4",
        )
        expect_sum(bert, found, BertModel, chosen, 0.4, weights)

    def test_conv1d_of_gpt2(
        self, gpt2: Path, gpt2_adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = merged(
            capsys,
            tmp_path / "out",
            "--base",
            gpt2,
            *tasks(*gpt2_adapters),
            "--method",
            "task_arithmetic",
            "--scale",
            "1",
        )
        expect_sum(gpt2, found, transformers.GPT2LMHeadModel, gpt2_adapters)

    def test_square_conv1d_next_to_a_linear_layer(
        self, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """PEFT saves one fan_in_fan_out for the model, that of the module it met last: here lm_head's, a Linear."""
        model = transformers.GPT2LMHeadModel
        untied = families.save_pretrained(families.tiny("gpt2-lm", tie_word_embeddings=False), tmp_path / "base")
        targets = ["c_attn", "c_proj", "lm_head"]
        adapter = families.save_lora(untied, model, tmp_path / "a", seed=1, r=4, lora_alpha=8, target_modules=targets)
        weights = load_file(adapter / "adapter_model.safetensors")  # PEFT adds a copy of the embedding layers here
        save_file({k: v for k, v in weights.items() if "lora_" in k}, adapter / "adapter_model.safetensors")
        arguments = ("--base", untied, "--task", adapter, "--method", "task_arithmetic", "--scale", "1")
        found = merged(capsys, tmp_path / "out", *arguments)
        expect_sum(untied, found, model, [adapter])

    def test_conv1d_with_dora(self, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = transformers.GPT2LMHeadModel
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "use_dora": True}
        adapter = families.save_lora(gpt2, model, tmp_path / "a", seed=3, fan_in_fan_out=True, **settings)
        found = merged(
            capsys, tmp_path / "out", "--base", gpt2, "--task", adapter, "--method", "task_arithmetic", "--scale", "1"
        )
        expect_sum(gpt2, found, model, [adapter])

    def test_convolutions(
        self, resnet: Path, resnet_adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = merged(
            capsys,
            tmp_path / "out",
            "--base",
            resnet,
            *tasks(*resnet_adapters),
            "--method",
            "task_arithmetic",
            "--scale",
            "1",
        )
        expect_sum(resnet, found, transformers.ResNetModel, resnet_adapters)

    def test_embedding_layers_that_peft_saves_with_the_adapter(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With embed_tokens among the targets PEFT stores the embedding's own weight as well."""
        model = transformers.LlamaForCausalLM
        base = families.save_pretrained(families.tiny("llama-lm", tie_word_embeddings=False), tmp_path / "base")
        adapter = families.save_lora(
            base, model, tmp_path / "a", seed=1, r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]
        )
        assert any(key.endswith("base_layer.weight") for key in load_file(adapter / "adapter_model.safetensors"))
        found = merged(
            capsys, tmp_path / "out", "--base", base, "--task", adapter, "--method", "task_arithmetic", "--scale", "1"
        )
        expect_sum(base, found, model, [adapter])

    def test_modules_that_transformers_renames_on_disk(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """transformers 5 saves ViT under other names than its modules have, which adapters use: no base, no clash."""
        base = families.save_pretrained(families.tiny("vit"), tmp_path / "base")
        settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "projection"]}
        adapter = families.save_lora(base, transformers.ViTModel, tmp_path / "a", seed=1, **settings)
        arguments = ("--task", adapter, "--method", "averaging")
        refused(
            capsys, tmp_path, "--out", tmp_path / "out", "--base", base, *arguments,
            says=[adapter, "'layers.0.attention.q_proj.weight'", base],
        )  # fmt: skip
        merged(capsys, tmp_path / "out", *arguments)
        expected = families.adapted_outputs(base, transformers.ViTModel, adapter)
        found = families.adapted_outputs(base, transformers.ViTModel, tmp_path / "out")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_one_adapts_what_another_replaces(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The pooler: factors in one adapter, a whole new weight in the other."""
        settings = {"r": 3, "lora_alpha": 6, "target_modules": ["pooler.dense"]}
        chosen = [
            families.save_lora(bert, BertModel, tmp_path / "a", seed=1, **settings),
            bert_adapters["saved modules"],
        ]
        for order in (chosen, chosen[::-1]):
            out = tmp_path / f"out {order[0].name}"
            arguments = ("--base", bert, *tasks(*order), "--method", "task_arithmetic", "--scale", "1")
            expect_sum(bert, merged(capsys, out, *arguments), BertModel, order)

    def test_dora_with_full_models_and_adapters(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        full = families.perturbed(bert, tmp_path / "full", seed=1)
        adapters = [bert_adapters["plain"], bert_adapters["dora"]]
        found = merged(capsys, tmp_path / "out", "--base", bert, *tasks(full, *adapters), "--method", "averaging", "-q")
        start, own = families.read_model(bert), families.read_model(full)
        updates = [families.peft_update(bert, BertModel, adapter) for adapter in adapters]
        for name, values in start.items():
            change = (own[name].double() - values.double() + sum(u[name] for u in updates)) / 3
            torch.testing.assert_close(found[name].double(), values.double() + change, **CLOSE)


class TestReading:
    """Layouts of adapter files."""

    @pytest.fixture(scope="class")
    def base(self) -> dict[str, Tensor]:
        return families.toy()

    def test_bin_is_read_as_safetensors_is(
        self, base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = families.write_model(tmp_path / "base", base)
        plain = families.write_adapter(tmp_path / "a", base)
        pickled = families.write_adapter(tmp_path / "b", base)
        torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
        (pickled / "adapter_model.safetensors").unlink()
        expected = merged(capsys, tmp_path / "1", "--base", model, "--task", plain)
        found = merged(capsys, tmp_path / "2", "--base", model, "--task", pickled)
        assert all(families.same_bits(found[name], values) for name, values in expected.items())

    def test_adapter_names_inside_the_keys(
        self, base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A state dict of the wrapped model, saved by hand, names the adapter in every key."""
        model = families.write_model(tmp_path / "base", base)
        plain = families.write_adapter(tmp_path / "a", base)
        named = families.write_adapter(tmp_path / "b", base)
        weights = load_file(named / "adapter_model.safetensors")
        save_file(
            {k.replace(".weight", ".default.weight"): v for k, v in weights.items()},
            named / "adapter_model.safetensors",
        )
        expected = merged(capsys, tmp_path / "1", "--base", model, "--task", plain)
        found = merged(capsys, tmp_path / "2", "--base", model, "--task", named)
        assert all(families.same_bits(found[name], values) for name, values in expected.items())

    def test_without_the_prefix_of_peft(
        self, base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = families.write_model(tmp_path / "base", base)
        plain = families.write_adapter(tmp_path / "a", base)
        bare = families.write_adapter(tmp_path / "b", base, prefix="")
        expected = merged(capsys, tmp_path / "1", "--base", model, "--task", plain)
        found = merged(capsys, tmp_path / "2", "--base", model, "--task", bare)
        assert all(families.same_bits(found[name], values) for name, values in expected.items())

    def test_lora_scale_ignore(
        self, base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Some published code merges B A and forgets lora_alpha / r, which is 2 here."""
        model = families.write_model(tmp_path / "base", base)
        adapter = families.write_adapter(tmp_path / "a", base, rank=3)
        arguments = ("--base", model, "--task", adapter, "--method", "task_arithmetic")
        applied = merged(capsys, tmp_path / "1", *arguments, "--scale", "1")
        ignored = merged(capsys, tmp_path / "2", *arguments, "--scale", "2", "--lora-scale", "ignore")
        explicit = merged(capsys, tmp_path / "3", *arguments, "--scale", "1", "--lora-scale", "apply")
        for name, values in applied.items():
            torch.testing.assert_close(ignored[name], values, **CLOSE)
            assert families.same_bits(explicit[name], values)

    def test_the_preset_decides_lora_scale(
        self, base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = families.write_model(tmp_path / "base", base)
        adapters = [families.write_adapter(tmp_path / f"a{i}", base, seed=i) for i in range(2)]
        arguments = ("--base", model, *tasks(*adapters), "--set", "official=lora")
        preset = merged(capsys, tmp_path / "1", *arguments)
        ignored = merged(capsys, tmp_path / "2", *arguments, "--lora-scale", "ignore")
        assert all(families.same_bits(preset[name], values) for name, values in ignored.items())
        refused(
            capsys, tmp_path, "--out", tmp_path / "3", *arguments, "--lora-scale", "apply",
            says=["lora_scale='apply'", "official='lora'", "lora_scale='ignore'"],
        )  # fmt: skip

    def test_a_classifier_adapter_on_the_bare_encoder(
        self, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its modules are named bert.encoder..., the base's tensors encoder...; its head is not in the base."""
        classifier = transformers.BertForSequenceClassification
        whole = families.save_pretrained(families.tiny("bert-classifier"), tmp_path / "whole")
        adapter = families.save_lora(
            whole, classifier, tmp_path / "a", seed=1, task_type="SEQ_CLS", **BERT_ADAPTERS["plain"]
        )
        start = families.read_model(whole)
        encoder = {n.removeprefix("bert."): v for n, v in start.items() if n.startswith("bert.")}
        base = families.write_model(tmp_path / "base", encoder)
        arguments = ("--base", base, "--task", adapter, "--method", "task_arithmetic", "--scale", "1")
        refused(
            capsys, tmp_path, "--out", tmp_path / "out", *arguments, says=[adapter, "classifier.", "--extra ignore"]
        )
        found = merged(capsys, tmp_path / "out", *arguments, "--extra", "ignore")
        update = families.peft_update(whole, classifier, adapter)
        assert found.keys() == encoder.keys()
        for name, values in encoder.items():
            torch.testing.assert_close(found[name].double(), values.double() + update[f"bert.{name}"], **CLOSE)

    def test_an_encoder_adapter_on_a_classifier(
        self, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One prefix more: the adapter of the bare encoder lands under bert."""
        whole = families.save_pretrained(families.tiny("bert-classifier"), tmp_path / "whole")
        adapter = bert_adapters["plain"]
        found = merged(
            capsys, tmp_path / "out", "--base", whole, "--task", adapter, "--method", "task_arithmetic", "--scale", "1"
        )
        start = families.read_model(whole)
        changed = {name for name, values in start.items() if not torch.equal(found[name], values)}
        adapted = {
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            for key in load_file(adapter / "adapter_model.safetensors")
            if key.endswith("lora_A.weight")
        }
        assert changed == {f"bert.{module}.weight" for module in adapted}

    def test_the_same_adapter_twice_counts_twice(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        adapter = bert_adapters["plain"]
        found = merged(
            capsys,
            tmp_path / "out",
            "--base",
            bert,
            *tasks(adapter, adapter),
            "--method",
            "task_arithmetic",
            "--scale",
            "1",
        )
        expect_sum(bert, found, BertModel, [adapter, adapter])


class TestSavedAsAdapter:
    """A merged adapter loads in PEFT and computes what the merged model computes."""

    @pytest.mark.parametrize("method", ["dc_merge", "averaging", "task_arithmetic"])
    @pytest.mark.parametrize("with_base", [True, False])
    def test_equals_the_full_model(
        self,
        method: str,
        with_base: bool,
        bert: Path,
        bert_adapters: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        kinds = (
            "plain",
            "another rank",
            "other targets",
            "rslora",
            "rslora with patterns",
            "half precision",
            "embedding",
        )
        chosen = tasks(*(bert_adapters[kind] for kind in kinds))
        merged(capsys, tmp_path / "full", "--base", bert, *chosen, "--method", method)
        base = ("--base", bert) if with_base else ()
        merged(capsys, tmp_path / "adapter", *base, *chosen, "--method", method, "--save-as", "adapter")
        expected = families.outputs(families.load_pretrained(BertModel, tmp_path / "full"))
        found = families.adapted_outputs(bert, BertModel, tmp_path / "adapter")
        assert (expected - families.outputs(families.load_pretrained(BertModel, bert))).abs().max() > 0.05
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_is_the_default_without_a_base(
        self, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        merged(capsys, tmp_path / "out", *tasks(bert_adapters["plain"], bert_adapters["another rank"]))
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            "adapter_model.safetensors", "adapter_config.json", "README.md", "dcmerge.json", "dcmerge_timings.json",
        }  # fmt: skip
        assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()

    def test_scales_are_folded_into_float32_factors(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kinds = ("half precision", "rslora with patterns", "alpha pattern")
        weights = merged(capsys, tmp_path / "out", *tasks(*(bert_adapters[kind] for kind in kinds)))
        assert {values.dtype for values in weights.values()} == {torch.float32}
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"]
        assert not config["use_rslora"]
        ranks = {k.split(".lora_A")[0]: v.shape[0] for k, v in weights.items() if "lora_A" in k}
        expected = {
            module: config["rank_pattern"].get(module.removeprefix("base_model.model."), config["r"])
            for module in ranks
        }
        assert ranks == expected
        assert len(set(ranks.values())) > 1

    @pytest.mark.parametrize("kind", ["saved modules", "all biases", "biases of adapted modules"])
    @pytest.mark.parametrize("method", ["dc_merge", "task_arithmetic"])
    def test_with_tensors_that_adapters_replace(
        self,
        kind: str,
        method: str,
        bert: Path,
        bert_adapters: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        second = families.save_lora(bert, BertModel, tmp_path / "second", seed=77, **BERT_ADAPTERS[kind])
        chosen = tasks(bert_adapters[kind], second)
        # a LoRA of full rank: dc_merge of the replaced pooler is not truncated
        arguments = ("--base", bert, *chosen, "--method", method, "--scale", "0.7")
        merged(capsys, tmp_path / "full", *arguments)
        merged(capsys, tmp_path / "adapter", *arguments, "--save-as", "adapter")
        expected = families.load_pretrained(BertModel, tmp_path / "full")
        found = families.adapted_outputs(bert, BertModel, tmp_path / "adapter")
        torch.testing.assert_close(found, families.outputs(expected), rtol=1e-5, atol=1e-5)
        stored = families.read_model(tmp_path / "adapter")
        replaced = "pooler.dense.weight" if kind == "saved modules" else "bias"
        assert any(key.endswith(replaced) for key in stored)

    @pytest.mark.parametrize("method", ["dc_merge", "averaging", "task_arithmetic"])
    def test_conv1d(
        self, method: str, gpt2: Path, gpt2_adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = transformers.GPT2LMHeadModel
        arguments = ("--base", gpt2, *tasks(*gpt2_adapters), "--method", method)
        merged(capsys, tmp_path / "full", *arguments)
        merged(capsys, tmp_path / "adapter", *arguments, "--save-as", "adapter")
        merged(capsys, tmp_path / "alone", *tasks(*gpt2_adapters), "--method", method)
        expected = families.outputs(families.load_pretrained(model, tmp_path / "full"))
        for name in ("adapter", "alone"):
            found = families.adapted_outputs(gpt2, model, tmp_path / name)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("method", ["dc_merge", "averaging", "task_arithmetic"])
    def test_convolutions(
        self, method: str, resnet: Path, resnet_adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = transformers.ResNetModel
        arguments = ("--base", resnet, *tasks(*resnet_adapters), "--method", method)
        merged(capsys, tmp_path / "full", *arguments)
        merged(capsys, tmp_path / "adapter", *arguments, "--save-as", "adapter")
        merged(capsys, tmp_path / "alone", *tasks(*resnet_adapters), "--method", method)
        expected = families.outputs(families.load_pretrained(model, tmp_path / "full"))
        for name in ("adapter", "alone"):
            found = families.adapted_outputs(resnet, model, tmp_path / name)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_merging_a_merged_adapter_again(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What is written can be read: one task at scale 1 is itself."""
        chosen = tasks(bert_adapters["rslora"], bert_adapters["embedding"])
        merged(capsys, tmp_path / "first", *chosen, "--method", "averaging")
        expected = merged(capsys, tmp_path / "full", "--base", bert, *chosen, "--method", "averaging")
        found = merged(
            capsys, tmp_path / "again", "--base", bert, "--task", tmp_path / "first", "--method", "averaging"
        )
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, **CLOSE)

    def test_module_names_that_end_alike(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Targets and patterns of PEFT match the ends of names: proj must not pull in block.proj."""
        model = torch.nn.ModuleDict(
            {"proj": torch.nn.Linear(6, 6), "block": torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6)})}
        )
        base = {name: values.detach() for name, values in model.state_dict().items()}
        first = families.write_adapter(tmp_path / "a0", base, ["proj"], rank=2)
        second = families.write_adapter(tmp_path / "a1", base, ["proj", "block.proj"], rank=1)
        for name, chosen in (("different ranks", [first, second]), ("not all adapted", [first, first])):
            merged(capsys, tmp_path / name, *tasks(*chosen), "--method", "averaging")
            config = peft.LoraConfig.from_pretrained(str(tmp_path / name))
            wrapped = peft.get_peft_model(copy.deepcopy(model), config)
            expected = {k: tuple(v.shape) for k, v in families.read_model(tmp_path / name).items()}
            found = {k.replace(".default", ""): tuple(v.shape) for k, v in wrapped.state_dict().items() if "lora_" in k}
            assert found == expected, name

    def test_output_names_its_base_and_targets(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights = merged(capsys, tmp_path / "out", *tasks(bert_adapters["plain"], bert_adapters["other targets"]))
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        modules = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in weights}
        assert set(config["target_modules"]) == modules
        assert Path(config["base_model_name_or_path"]).name == bert.name


class TestTruncation:
    """--adapter-rank R keeps the best approximation of rank R of each merged update."""

    BASE = families.toy()
    MODULES = ("layers.0.attn", "layers.1.attn", "layers.0.conv")

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return families.write_model(tmp_path / "base", self.BASE)

    @pytest.fixture
    def adapters(self, tmp_path: Path) -> list[Path]:
        return [
            families.write_adapter(tmp_path / f"a{i}", self.BASE, self.MODULES, rank=3 + i, seed=i) for i in range(3)
        ]

    def products(self, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
        """B A of every module in float64, convolutions flattened; what PEFT adds, as lora_alpha = r."""
        modules = [key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")]
        return {
            f"{module.removeprefix('base_model.model.')}.weight": adapter[f"{module}.lora_B.weight"].flatten(1).double()
            @ adapter[f"{module}.lora_A.weight"].flatten(1).double()
            for module in modules
        }

    @pytest.mark.parametrize("method", ["dc_merge", "averaging", "task_arithmetic", "ties"])
    @pytest.mark.parametrize("rank", [1, 3, 5])
    def test_best_approximation(
        self,
        method: str,
        rank: int,
        base: Path,
        adapters: list[Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        arguments = ("--base", base, *tasks(*adapters), "--method", method)
        full = merged(capsys, tmp_path / "full", *arguments, "--dtype", "float32")
        found = self.products(
            merged(capsys, tmp_path / "adapter", *arguments, "--save-as", "adapter", "--adapter-rank", str(rank))
        )
        assert found.keys() == {f"{module}.weight" for module in self.MODULES}
        for name, product in found.items():
            update = (full[name].double() - self.BASE[name].double()).flatten(1)
            expected = cases.truncated(update, rank) if rank < min(update.shape) else update
            torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
            assert torch.linalg.matrix_rank(product, rtol=1e-6) == min(rank, *product.shape)

    @pytest.mark.parametrize("rank", [9, 12, 100])
    @pytest.mark.parametrize("method", ["averaging", "ties"])
    def test_a_rank_beyond_the_matrix_loses_nothing(
        self,
        method: str,
        rank: int,
        base: Path,
        adapters: list[Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Attention is 12 x 8, the ranks add up to 12."""
        arguments = ("--base", base, *tasks(*adapters), "--method", method)
        full = merged(capsys, tmp_path / "full", *arguments)
        found = self.products(
            merged(capsys, tmp_path / "adapter", *arguments, "--save-as", "adapter", "--adapter-rank", str(rank))
        )
        for name, product in found.items():
            update = (full[name].double() - self.BASE[name].double()).flatten(1)
            torch.testing.assert_close(product, update, rtol=1e-5, atol=1e-5)

    def test_dora_has_full_rank(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ("--base", bert, "--task", bert_adapters["dora"], "--method", "averaging")
        refused(
            capsys, tmp_path, "--out", tmp_path / "out", *arguments, "--save-as", "adapter",
            says=["dense.weight", "full rank", "--adapter-rank"],
        )  # fmt: skip
        merged(capsys, tmp_path / "out", *arguments, "--save-as", "adapter", "--adapter-rank", "24")
        merged(capsys, tmp_path / "full", *arguments)
        expected = families.outputs(families.load_pretrained(BertModel, tmp_path / "full"))
        found = families.adapted_outputs(bert, BertModel, tmp_path / "out")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_adapter_rank_belongs_to_adapters(
        self, base: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        refused(
            capsys, tmp_path, "--base", base, *tasks(*adapters), "--out", tmp_path / "out", "--adapter-rank", "2",
            says=["adapter_rank", "--save-as adapter"],
        )  # fmt: skip


class TestWithoutBase:
    """What can be merged among adapters alone, and what needs the base's values."""

    BASE = families.toy()

    def adapters(self, folder: Path, *, replaced: tuple[bool, ...] = (True, True)) -> list[Path]:
        """Adapters that replace a bias-like tensor and a matrix outright (modules_to_save)."""
        paths = []
        for i, replaces in enumerate(replaced):
            values = families.tuned(self.BASE, seed=10 + i)
            saved = {f"base_model.model.{n}": values[n] for n in ("layers.0.norm.weight", "lm_head.weight")}
            paths.append(families.write_adapter(folder / f"a{i}", self.BASE, seed=i, extra=saved if replaces else None))
        return paths

    @pytest.mark.parametrize("method", ["dc_merge", "averaging", "task_arithmetic"])
    def test_replaced_tensors_take_their_mean_or_are_refused(
        self, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """They are values, not updates: neither scaled nor merged as matrices."""
        adapters = self.adapters(tmp_path)
        result = families.run(capsys, "merge", *tasks(*adapters), "--out", tmp_path / "out", "--method", method)
        if result.status == 1:
            assert "--base" in result.err
            return
        assert result.status == 0, result.err
        stored = families.read_model(tmp_path / "out")
        for name in ("layers.0.norm.weight", "lm_head.weight"):
            values = [load_file(a / "adapter_model.safetensors")[f"base_model.model.{name}"] for a in adapters]
            torch.testing.assert_close(stored[f"base_model.model.{name}"], sum(values) / 2, **CLOSE)

    def test_weights_of_replaced_tensors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Half the value is not a value: weights that do not average need the base."""
        adapters = self.adapters(tmp_path)
        arguments = tasks(f"{adapters[0]}=0.5", f"{adapters[1]}=0.5")
        result = families.run(capsys, "merge", *arguments, "--out", tmp_path / "out", "--method", "averaging")
        if result.status == 1:
            assert "--base" in result.err
            return
        stored = families.read_model(tmp_path / "out")["base_model.model.layers.0.norm.weight"]
        values = [load_file(a / "adapter_model.safetensors")["base_model.model.layers.0.norm.weight"] for a in adapters]
        torch.testing.assert_close(stored, sum(values) / 2, **CLOSE)

    def test_replaced_by_some_only(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        adapters = self.adapters(tmp_path, replaced=(True, False))
        refused(
            capsys, tmp_path, *tasks(*adapters), "--out", tmp_path / "out", "--method", "dc_merge",
            says=["layers.0.norm.weight", "--base"],
        )  # fmt: skip

    def test_dora(self, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        refused(
            capsys, tmp_path, "--task", bert_adapters["dora"], "--out", tmp_path / "out",
            says=[bert_adapters["dora"], "DoRA", "--base"],
        )  # fmt: skip

    def test_adapters_of_models_of_two_sizes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        wide = {**self.BASE, "layers.1.attn.weight": torch.zeros(12, 10)}
        first = families.write_adapter(tmp_path / "a0", self.BASE)
        second = families.write_adapter(tmp_path / "a1", wide)
        refused(
            capsys, tmp_path, *tasks(first, second), "--out", tmp_path / "out",
            says=[first, second, "layers.1.attn.weight", "12x8", "12x10"],
        )  # fmt: skip

    def test_the_same_weights_under_two_names(
        self, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without the base nothing tells that bert.encoder is encoder: merged apart, half of it would never be used."""
        whole = families.save_pretrained(families.tiny("bert-classifier"), tmp_path / "base")
        second = families.save_lora(
            whole, transformers.BertForSequenceClassification, tmp_path / "a", seed=1, **BERT_ADAPTERS["plain"]
        )
        refused(
            capsys, tmp_path, *tasks(bert_adapters["plain"], second), "--out", tmp_path / "out",
            says=[second, "bert.encoder", "--base"],
        )  # fmt: skip

    def test_adapters_of_the_encoder_and_of_the_classifier(
        self, bert: Path, bert_adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The same weights under two names: with the base they are one tensor, and so they are in the output."""
        whole = families.save_pretrained(families.tiny("bert-classifier"), tmp_path / "base")
        settings = BERT_ADAPTERS["other targets"]
        second = families.save_lora(
            whole, transformers.BertForSequenceClassification, tmp_path / "a", seed=1, **settings
        )
        arguments = ("--base", bert, *tasks(bert_adapters["plain"], second), "--method", "averaging")
        merged(capsys, tmp_path / "full", *arguments)
        expected = families.outputs(families.load_pretrained(BertModel, tmp_path / "full"))
        result = families.run(capsys, "merge", "--out", tmp_path / "out", *arguments, "--save-as", "adapter")
        assert result.status == 0, result.err
        found = families.adapted_outputs(bert, BertModel, tmp_path / "out")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_its_configuration_is_named(tmp_path: Path) -> None:
    base = {"layers.0.q_proj.weight": torch.zeros(16, 12)}
    families.write_model(tmp_path / "base", base)
    families.write_adapter(tmp_path / "task", base, ["layers.0.q_proj"], rank=2)
    (tmp_path / "task" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: adapter_config\.json is missing beside it"):
        dcmerge_ext.merge_checkpoints(tmp_path / "base", [tmp_path / "task"], tmp_path / "out")

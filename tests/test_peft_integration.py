"""integrations.peft against the installed PEFT: the same adapters, what PEFT gets wrong, and what is left to it."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft.tuners.lora import LoraLayer, LoraModel  # noqa: E402

from dcmerge_ext import LowRank, merge_updates  # noqa: E402
from dcmerge_ext.errors import InputError, OptionError  # noqa: E402
from dcmerge_ext.integrations import peft as integration  # noqa: E402
from dcmerge_ext.integrations.peft import (  # noqa: E402
    PEFT_TYPES,
    accelerated_peft,
    add_weighted_adapter,
    merge_adapters,
    patch,
    unpatch,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

CLOSE = 2e-5
"""Relative Frobenius distance of two float32 results: the tolerance that docs/integrations.md states."""
WEIGHTS = [1.0, 0.5, -0.7]
SVD_TYPES = [kind for kind in PEFT_TYPES if kind.endswith("svd")]
FACTOR_TYPES = [kind for kind in PEFT_TYPES if not kind.endswith("svd")]
METHODS = ["dc_merge", "tsv_m", "iso_c", "iso_cts", "knots_ties"]

PEFTS_OWN = LoraModel.add_weighted_adapter
Settings = dict[str, Any]


class Attention(nn.Module):
    """torch's attention and convolutions of other dimensions, which no tiny transformer has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(6, 24, 3, padding=1)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.grouped = nn.Conv1d(24, 24, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).mT
        return self.grouped(self.attention(h, h, h)[0].mT)


FAMILIES: dict[str, tuple[Settings, str, tuple[int, ...]]] = {
    "bert": ({"target_modules": ["query", "intermediate.dense", "word_embeddings"]}, "input_ids", (2, 7)),
    "llama-lm": ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "input_ids", (2, 7)),
    "gpt2-lm": ({"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, "input_ids", (2, 7)),
    "vit": ({"target_modules": r".*(q_proj|query|fc1|projection|intermediate\.dense)"}, "pixel_values", (2, 3, 8, 8)),
    "resnet": ({"target_modules": ["convolution"]}, "pixel_values", (1, 3, 32, 32)),
    "attention": ({"target_modules": ["attention"]}, "x", (2, 6, 5)),
}


@cache
def base_model(family: str) -> nn.Module:
    if family != "attention":
        return families.tiny(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention().eval()


def make(family: str, settings: Sequence[Settings], dtype: torch.dtype = torch.float32) -> Any:
    """A model with random adapters a0, a1 .."""
    common = {"r": 4, "lora_alpha": 8, **FAMILIES[family][0]}
    with families.quiet(), torch.random.fork_rng():
        torch.manual_seed(3)
        for i, own in enumerate(settings):
            config = peft.LoraConfig(**{**common, **own})
            if i == 0:
                model = peft.get_peft_model(copy.deepcopy(base_model(family)), config, adapter_name="a0")
            else:
                model.add_adapter(f"a{i}", config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.3)
    return model.to(dtype).eval()


def names(model: Any) -> list[str]:
    return [name for name in model.peft_config if name.startswith("a")]


def add(method: Callable[..., None], model: Any, kind: str, weights: Sequence[float] = WEIGHTS, **options: Any) -> Any:
    """The model, with the adapter ``m`` added by PEFT's method or ours from the same random state."""
    if kind != "svd" and kind not in ("linear", "cat", *METHODS):
        options.setdefault("density", 0.4)
    torch.manual_seed(11)
    with families.quiet():
        method(model.base_model, names(model), list(weights), "m", kind, **options)
    return model


def layers(model: Any) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def update(layer: Any, adapter: str) -> Tensor | None:
    """What an adapter adds to the weight of a layer, by its forward pass alone: scaling * B A, in float64."""
    for A, B in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
        if adapter in A:
            a, b = (getattr(x[adapter], "weight", x[adapter]).detach().double().flatten(1) for x in (A, B))
            return layer.scaling[adapter] * (b @ a)
    return None


def updates(model: Any, adapter: str = "m") -> dict[str, Tensor]:
    found = {name: update(layer, adapter) for name, layer in layers(model).items()}
    return {name: x for name, x in found.items() if x is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative Frobenius distance of a layer."""
    assert found.keys() == wanted.keys()
    assert found
    return max(float((found[name] - x).norm() / x.norm().clamp(min=1e-30)) for name, x in wanted.items())


def weighted(model: Any, weights: Sequence[float] = WEIGHTS) -> dict[str, Tensor]:
    """The weighted sum of the adapters, in float64."""
    total: dict[str, Tensor] = {}
    for adapter, weight in zip(names(model), weights, strict=True):
        for name, x in updates(model, adapter).items():
            total[name] = total[name] + weight * x if name in total else weight * x
    return total


def outputs(model: Any, family: str) -> Tensor:
    _, key, shape = FAMILIES[family]
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    values = (
        torch.randint(40, shape, generator=generator)
        if key == "input_ids"
        else torch.randn(shape, generator=generator).to(dtype)
    )
    with torch.no_grad():
        found = model(values) if family == "attention" else model(**{key: values})
    return found if isinstance(found, Tensor) else found[0]


def reloaded(model: Any, family: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Outputs with ``m`` active: here, and where PEFT loads what it saves."""
    with families.quiet():
        model.set_adapter("m")
        model.save_pretrained(folder, selected_adapters=["m"])
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base_model(family)), folder / "m").eval()
    return outputs(model, family), outputs(again, family)


def same_after_reloading(model: Any, family: str, folder: Path) -> bool:
    here, there = reloaded(model, family, folder)
    return torch.allclose(here, there, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _pefts_own_method() -> Iterator[None]:
    yield
    assert LoraModel.add_weighted_adapter is PEFTS_OWN


class TestEqualsPeft:
    @pytest.mark.parametrize("family", list(FAMILIES))
    @pytest.mark.parametrize("kind", PEFT_TYPES)
    def test_random_adapters(self, kind: str, family: str, tmp_path: Path) -> None:
        settings: list[Settings] = [{}, {"lora_alpha": 3}, {}]
        theirs = add(PEFTS_OWN, make(family, settings), kind)
        state = torch.get_rng_state()
        ours = add(add_weighted_adapter, make(family, settings), kind)
        assert torch.equal(torch.get_rng_state(), state), "the same random numbers drawn"
        assert ours.peft_config["m"] == theirs.peft_config["m"]
        assert distance(updates(ours), updates(theirs)) < (CLOSE if kind in SVD_TYPES else 1e-12)
        for mine, other in zip(layers(ours).values(), layers(theirs).values(), strict=True):
            pairs = zip(mine.named_parameters(), other.named_parameters(), strict=True)
            for (name, a), (again, b) in pairs:
                assert (name, a.shape, a.dtype, a.requires_grad) == (again, b.shape, b.dtype, b.requires_grad)
        assert same_after_reloading(ours, family, tmp_path)
        theirs.set_adapter("m")
        mine, other = outputs(ours, family), outputs(theirs, family)
        assert float((mine - other).norm() / other.norm()) < CLOSE

    @pytest.mark.parametrize("rank", [1, 3, 4, 10])
    def test_svd_against_float64(self, rank: int) -> None:
        settings: list[Settings] = [{"r": 2}, {"r": 5}, {"r": 3}]
        model = add(add_weighted_adapter, make("bert", settings), "svd", svd_rank=rank)
        for name, total in weighted(model).items():
            U, S, Vh = torch.linalg.svd(total)
            wanted = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            assert float((updates(model)[name] - wanted).norm() / wanted.norm()) < 1e-6

    def test_the_rank_is_that_of_the_widest_source(self) -> None:
        settings: list[Settings] = [{"r": 2}, {"r": 3, "rank_pattern": {"query": 6}}]
        ours, theirs = (add(f, make("bert", settings), "svd", [1, 1]) for f in (add_weighted_adapter, PEFTS_OWN))
        assert ours.peft_config["m"] == theirs.peft_config["m"]
        assert ours.peft_config["m"].r == 6
        assert distance(updates(ours), updates(theirs)) < CLOSE

    @pytest.mark.parametrize("kind", SVD_TYPES)
    @pytest.mark.parametrize("rank", [3, 12])
    def test_rank_deficient_adapters(self, kind: str, rank: int, tmp_path: Path) -> None:
        """Two equal adapters, the third zero in one layer and of rank 1 elsewhere."""

        def deficient() -> Any:
            model = make("bert", [{}, {}, {}])
            for i, layer in enumerate(layers(model).values()):
                for B, A in ((layer.lora_B, layer.lora_A), (layer.lora_embedding_B, layer.lora_embedding_A)):
                    for factors in (A, B) if "a0" in A else ():
                        weights = [getattr(factors[name], "weight", factors[name]).data for name in names(model)]
                        weights[1].copy_(weights[0])
                        weights[2][1:, :] = 0 if factors is A else weights[2][1:, :]
                        weights[2].mul_(0.0 if i == 0 else 1.0)
            return model

        ours, theirs = (add(f, deficient(), kind, svd_rank=rank) for f in (add_weighted_adapter, PEFTS_OWN))
        assert distance(updates(ours), updates(theirs)) < CLOSE
        assert same_after_reloading(ours, "bert", tmp_path)

    def test_adapters_that_cancel(self) -> None:
        model = make("llama-lm", [{}, {}])
        for layer in layers(model).values():
            layer.lora_A["a1"].load_state_dict(layer.lora_A["a0"].state_dict())
            layer.lora_B["a1"].load_state_dict(layer.lora_B["a0"].state_dict())
        add(add_weighted_adapter, model, "svd", [1, -1])
        size = max(float(x.norm()) for x in updates(model, "a0").values())
        assert all(float(x.norm()) < 1e-6 * size for x in updates(model).values())

    @pytest.mark.parametrize("kind", ["ties_svd", "dare_ties_svd"])
    def test_majority_by_frequency(self, kind: str) -> None:
        total, ours, theirs = (
            add(f, make("bert", [{}] * 3), kind, majority_sign_method=how)
            for f, how in (
                (add_weighted_adapter, "total"), (add_weighted_adapter, "frequency"), (PEFTS_OWN, "frequency"),
            )
        )  # fmt: skip
        assert distance(updates(ours), updates(theirs)) < CLOSE
        assert distance(updates(ours), updates(total)) > 0.01

    @pytest.mark.parametrize("density", [0.001, 0.2, 0.9, 1.0, 0.0])
    @pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd"])
    def test_densities(self, kind: str, density: float) -> None:
        ours, theirs = (
            add(f, make("llama-lm", [{}] * 3), kind, density=density) for f in (add_weighted_adapter, PEFTS_OWN)
        )
        assert distance(updates(ours), updates(theirs)) < CLOSE

    @pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd"])
    def test_magnitudes_that_tie(self, kind: str) -> None:
        """Factors of a few values each: hundreds of entries tie at the threshold, and torch.topk chooses among them."""

        def coarse() -> Any:
            model = make("llama-lm", [{"target_modules": ["q_proj"]}] * 3)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.mul(4).round().clamp(-1, 1)
            return model

        ours, theirs = (add(f, coarse(), kind, svd_rank=24) for f in (add_weighted_adapter, PEFTS_OWN))
        assert distance(updates(ours), updates(theirs)) < CLOSE

    def test_full_matrices_change_nothing(self) -> None:
        one, other = (
            add(add_weighted_adapter, make("bert", [{}] * 3), "svd", svd_full_matrices=full) for full in (True, False)
        )
        assert distance(updates(one), updates(other)) == 0

    @pytest.mark.parametrize("kind", PEFT_TYPES)
    def test_one_adapter(self, kind: str) -> None:
        ours, theirs = (add(f, make("bert", [{}]), kind, [-0.5]) for f in (add_weighted_adapter, PEFTS_OWN))
        assert distance(updates(ours), updates(theirs)) == 0

    def test_the_peft_model_will_do_and_an_existing_name_changes_nothing(self) -> None:
        model = make("bert", [{}, {}])
        add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "m")
        before = updates(model)
        add_weighted_adapter(model, ["a0", "a1"], [3.0, 1.0], "m")
        assert distance(updates(model), before) == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("kind", SVD_TYPES)
    def test_half_precision(self, kind: str, dtype: torch.dtype) -> None:
        ours, theirs = (add(f, make("llama-lm", [{}] * 3, dtype), kind) for f in (add_weighted_adapter, PEFTS_OWN))
        kinds = {p.dtype for model in (ours, theirs) for n, p in model.named_parameters() if ".m." in n}
        assert kinds == {torch.float32}
        if kind != "svd":  # from PEFT's dense updates, rounded to half precision
            assert distance(updates(ours), updates(theirs)) < CLOSE
            return
        wanted = {}
        for name, total in weighted(ours).items():
            U, S, Vh = torch.linalg.svd(total)
            wanted[name] = (U[:, :4] * S[:4]) @ Vh[:4]
        assert distance(updates(ours), wanted) < 1e-6
        assert distance(updates(theirs), wanted) > 1e-5

    def test_float64(self) -> None:
        model = add(add_weighted_adapter, make("llama-lm", [{}] * 3, torch.float64), "svd", svd_rank=12)
        assert distance(updates(model), weighted(model)) < 1e-13

    def test_under_autocast(self) -> None:
        model = make("llama-lm", [{}] * 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            add(add_weighted_adapter, model, "svd", svd_rank=12)
        assert distance(updates(model), weighted(model)) < 1e-6


class TestWhatPeftGetsWrong:
    @pytest.mark.parametrize("kind", PEFT_TYPES)
    def test_rslora(self, kind: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
        """Oracle: plain adapters of the same scaling. PEFT's result is sqrt(r) times too large."""
        plain: list[Settings] = [{"lora_alpha": 16}, {"lora_alpha": 6}]  # alpha / 4
        rslora: list[Settings] = [{"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 3, "use_rslora": True}]
        weights = [1.0, 0.5]
        wanted = updates(add(PEFTS_OWN, make("bert", plain), kind, weights))
        theirs = add(PEFTS_OWN, make("bert", rslora), kind, weights)
        ours = add(add_weighted_adapter, make("bert", rslora), kind, weights)
        root = theirs.peft_config["m"].r ** 0.5
        assert distance(updates(theirs), {name: root * x for name, x in wanted.items()}) < CLOSE
        assert distance(updates(ours), wanted) < CLOSE
        assert not ours.peft_config["m"].use_rslora
        assert ours.peft_config["a0"].use_rslora
        assert same_after_reloading(ours, "bert", tmp_path)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "rsLoRA" in caplog.text

    @pytest.mark.parametrize("kind", [*PEFT_TYPES, "dc_merge"])
    def test_dora_is_refused(self, kind: str) -> None:
        """PEFT gives the new adapter the row norms of the base weights as magnitudes."""
        model = make("llama-lm", [{}, {"use_dora": True}])
        if kind == "svd":
            theirs = add(PEFTS_OWN, make("llama-lm", [{"use_dora": True}] * 2), "svd", [1, 1])
            for layer in layers(theirs).values():
                norms = layer.get_base_layer().weight.norm(dim=1)
                magnitudes = layer.lora_magnitude_vector
                torch.testing.assert_close(magnitudes["m"].weight.data, norms)
                assert float((magnitudes["a0"].weight - norms).abs().max()) > 0.1
        with pytest.raises(InputError, match="'a1' uses DoRA"):
            add(add_weighted_adapter, model, kind, [1, 1])
        assert "m" not in model.peft_config

    @pytest.mark.parametrize("kind", PEFT_TYPES)
    def test_rank_and_alpha_patterns_reload(self, kind: str, tmp_path: Path) -> None:
        pattern: Settings = {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.1.intermediate.dense": 5}}
        theirs, ours = (add(f, make("bert", [pattern] * 3), kind) for f in (PEFTS_OWN, add_weighted_adapter))
        assert distance(updates(ours), updates(theirs)) < CLOSE
        assert same_after_reloading(ours, "bert", tmp_path / "ours")
        if kind in FACTOR_TYPES and kind != "cat":
            with pytest.raises(RuntimeError, match="size mismatch"):
                reloaded(theirs, "bert", tmp_path / "theirs")

    def test_one_adapter_with_patterns_reloads(self, tmp_path: Path) -> None:
        pattern: Settings = {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 5}}
        theirs, ours = (add(f, make("bert", [pattern]), "svd", [1]) for f in (PEFTS_OWN, add_weighted_adapter))
        assert distance(updates(ours), updates(ours, "a0")) < 1e-6
        assert same_after_reloading(ours, "bert", tmp_path / "ours")
        with pytest.raises(RuntimeError, match="size mismatch"):
            reloaded(theirs, "bert", tmp_path / "theirs")

    @pytest.mark.parametrize("full", [True, False])
    def test_a_rank_beyond_the_matrix(self, full: bool, tmp_path: Path) -> None:
        """Of 12 x 24 matrices. PEFT's factors do not fit each other, or do not load again."""
        target: Settings = {"target_modules": ["v_proj"], "r": 10}
        theirs, ours = (
            add(f, make("llama-lm", [target] * 2), "svd", [1, 1], svd_rank=20, svd_full_matrices=full)
            for f in (PEFTS_OWN, add_weighted_adapter)
        )
        assert distance(updates(ours), weighted(ours, [1, 1])) < 1e-6
        assert same_after_reloading(ours, "llama-lm", tmp_path / "ours")
        theirs.set_adapter("m")
        if full:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                outputs(theirs, "llama-lm")
        with pytest.raises(RuntimeError, match="size mismatch"):
            reloaded(theirs, "llama-lm", tmp_path / "theirs")

    @pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd"])
    @pytest.mark.parametrize(
        "first", [{"layers_to_transform": [0]}, {"exclude_modules": ["layer.1.intermediate.dense"]}]
    )
    def test_every_module_of_every_adapter(self, kind: str, first: Settings, tmp_path: Path) -> None:
        """PEFT copies the first adapter's restriction, and drops what the others do elsewhere."""
        theirs, ours = (add(f, make("bert", [first, {}]), kind, [1, 1]) for f in (PEFTS_OWN, add_weighted_adapter))
        touched = updates(ours, "a0").keys() | updates(ours, "a1").keys()
        assert updates(ours).keys() == touched
        assert updates(theirs).keys() == updates(ours, "a0").keys() != touched
        if kind == "cat":
            assert distance(updates(ours), weighted(ours, [1, 1])) < 1e-6
        assert same_after_reloading(ours, "bert", tmp_path)
        assert ours.peft_config["a0"].layers_to_transform == first.get("layers_to_transform")

    @pytest.mark.parametrize("owner", [0, 1])
    @pytest.mark.parametrize("kind", ["svd", "linear", "dc_merge"])
    def test_a_trained_head_is_kept(self, kind: str, owner: int, tmp_path: Path) -> None:
        settings: list[Settings] = [{}, {}]
        settings[owner] = {"modules_to_save": ["pooler"]}

        def build() -> Any:
            model = make("bert", settings)
            model.base_model.model.pooler.modules_to_save[f"a{owner}"].dense.weight.data.add_(1.0)
            return model

        ours = add(add_weighted_adapter, build(), kind, [1, 1])
        pooler = ours.base_model.model.pooler
        head = pooler.modules_to_save[f"a{owner}"].dense.weight
        assert torch.equal(pooler.modules_to_save["m"].dense.weight, head)
        assert ours.peft_config["m"].modules_to_save == ["pooler"]
        ours.set_adapter("m")
        with families.quiet():
            ours.save_pretrained(tmp_path, selected_adapters=["m"])
            again = peft.PeftModel.from_pretrained(copy.deepcopy(base_model("bert")), tmp_path / "m").eval()
        assert torch.equal(again.base_model.model.pooler.modules_to_save["default"].dense.weight, head)
        if kind != "dc_merge":
            saved = add(PEFTS_OWN, build(), kind, [1, 1]).base_model.model.pooler.modules_to_save
            base = base_model("bert").pooler.dense.weight
            assert "m" not in saved if owner else torch.equal(saved["m"].dense.weight, base)

    def test_one_head_for_two_adapters_is_refused_as_in_peft(self) -> None:
        for method in (PEFTS_OWN, add_weighted_adapter):
            model = make("bert", [{"modules_to_save": ["pooler"]}] * 2)
            with pytest.raises(ValueError, match="modules_to_save"):
                add(method, model, "svd", [1, 1])

    def test_integer_weights_in_half_precision(self) -> None:
        with pytest.raises(NotImplementedError, match="Half"):
            add(PEFTS_OWN, make("llama-lm", [{}, {}], torch.float16), "svd", [1, 1])
        model = add(add_weighted_adapter, make("llama-lm", [{}, {}], torch.float16), "svd", [1, 1], svd_rank=8)
        assert distance(updates(model), weighted(model, [1, 1])) < 1e-6

    def test_conv1d(self) -> None:
        """PEFT decomposes the (out, in, kernel) update as a batch of matrices, and fails."""
        target: Settings = {"target_modules": ["embed"]}
        with pytest.raises(RuntimeError):
            add(PEFTS_OWN, make("attention", [target] * 3), "svd")
        model = add(add_weighted_adapter, make("attention", [target] * 3), "svd", svd_rank=12)
        assert distance(updates(model), weighted(model)) < 1e-6

    @pytest.mark.parametrize("kind", ["svd", "ties", "ties_svd"])
    def test_an_error_leaves_nothing(self, kind: str) -> None:
        """Factors that PEFT cannot stack, or a majority that it does not know."""
        bad: Settings = {"majority_sign_method": "none"} if kind != "svd" else {"svd_rank": -1}
        theirs, ours = make("bert", [{}] * 2), make("bert", [{}] * 2)
        before, active = list(ours.state_dict()), ours.active_adapters
        for method, model in ((PEFTS_OWN, theirs), (add_weighted_adapter, ours)):
            with pytest.raises((RuntimeError, ValueError)):
                add(method, model, kind, [1, 1], **bad)
        assert "m" in theirs.peft_config
        assert names(ours) == list(ours.peft_config) == ["a0", "a1"]
        assert list(ours.state_dict()) == before
        assert ours.active_adapters == active == ["a0"]
        assert all("m" not in layer.scaling for layer in layers(ours).values())
        add(add_weighted_adapter, ours, "svd", [1, 1])
        assert not [step for step in integration._STEPS if step in vars(ours.base_model)]

    def test_weights_that_peft_would_drop(self) -> None:
        theirs = add(PEFTS_OWN, make("bert", [{}] * 3), "svd", [1.0])
        assert distance(updates(theirs), updates(theirs, "a0")) < 1e-5
        with pytest.raises(InputError, match="weights: needs one finite number for each of 3 tasks"):
            add(add_weighted_adapter, make("bert", [{}] * 3), "svd", [1.0])


class TestMethods:
    @pytest.mark.parametrize("family", ["bert", "gpt2-lm", "vit"])
    @pytest.mark.parametrize("kind", METHODS)
    def test_as_in_memory_and_as_from_files(self, kind: str, family: str, tmp_path: Path) -> None:
        settings: list[Settings] = [{"use_rslora": True}, {"r": 3}, {"lora_alpha": 2}]
        model = make(family, settings)
        sources = {adapter: updates(model, adapter) for adapter in names(model)}
        add(add_weighted_adapter, model, kind, scale=1.5)
        assert same_after_reloading(model, family, tmp_path / "online")
        with families.quiet():
            model.save_pretrained(tmp_path, selected_adapters=names(model))
        merge_adapters([tmp_path / f"a{i}" for i in range(3)], tmp_path / "out", WEIGHTS, kind, scale=1.5)
        with families.quiet():
            offline = peft.PeftModel.from_pretrained(copy.deepcopy(base_model(family)), tmp_path / "out").eval()
        torch.testing.assert_close(outputs(model, family), outputs(offline, family), rtol=2e-4, atol=2e-4)

        name, options = ("knots", {"aggregate": "ties"}) if kind == "knots_ties" else (kind, {})
        read = {path: [factored(layer, adapter) for adapter in names(model)] for path, layer in layers(model).items()}
        wanted = merge_updates(read, name, WEIGHTS, **options)
        assert sources["a0"].keys() == wanted.keys()
        for path, layer in layers(model).items():
            x = wanted[path].dense()
            assert_near(updates(model)[path], 1.5 * (x.mT if layer.lora_embedding_A else x))

    @pytest.mark.parametrize("kind", METHODS)
    def test_truncated(self, kind: str, tmp_path: Path) -> None:
        whole = add(add_weighted_adapter, make("bert", [{}] * 3), kind)
        cut = add(add_weighted_adapter, make("bert", [{}] * 3), kind, svd_rank=3)
        assert (whole.peft_config["m"].r, cut.peft_config["m"].r) == (12, 3)
        assert same_after_reloading(cut, "bert", tmp_path)
        for name, x in updates(whole).items():
            U, S, Vh = torch.linalg.svd(x)
            if float(S[2] - S[3]) > 1e-3 * float(S[0]):
                assert_near(updates(cut)[name], (U[:, :3] * S[:3]) @ Vh[:3])
            assert torch.linalg.matrix_rank(updates(cut)[name], rtol=1e-5) == 3

    @pytest.mark.parametrize("kind", METHODS)
    def test_one_adapter(self, kind: str, tmp_path: Path) -> None:
        pattern: Settings = {"rank_pattern": {"query": 2}}
        model = add(add_weighted_adapter, make("bert", [pattern]), kind, [1], svd_rank=3)
        assert model.peft_config["m"].r == 3
        assert same_after_reloading(model, "bert", tmp_path)

    def test_other_modules_per_adapter(self, tmp_path: Path) -> None:
        settings: list[Settings] = [{"target_modules": ["query"]}, {"target_modules": ["key", "value"]}]
        model = add(add_weighted_adapter, make("bert", settings), "tsv_m", [2, -1])
        assert distance(updates(model), weighted(model, [2, -1])) < 1e-6  # no module has two tasks
        assert same_after_reloading(model, "bert", tmp_path)

    def test_options(self) -> None:
        plain, other = (
            add(add_weighted_adapter, make("bert", [{}] * 3), "dc_merge", options=o) for o in ({}, {"keep": 0.5})
        )
        assert distance(updates(plain), updates(other)) > 0.01
        ignored = add(add_weighted_adapter, make("bert", [{"r": 16}] * 3), "tsv_m", options={"official": "lora"})
        for name, layer in layers(ignored).items():
            read = [factored(layer, adapter, scaled=False) for adapter in ("a0", "a1", "a2")]
            x = merge_updates(read, "tsv_m", WEIGHTS, rank=16).dense()
            assert_near(updates(ignored)[name], x.mT if layer.lora_embedding_A else x)

    def test_offline_svd_and_cat_as_in_peft(self, tmp_path: Path) -> None:
        model = make("bert", [{}, {"r": 6, "use_rslora": True}, {"target_modules": ["value"]}])
        with families.quiet():
            model.save_pretrained(tmp_path, selected_adapters=names(model))
        dirs = [tmp_path / name for name in names(model)]
        for kind, rank in (("svd", None), ("svd", 2), ("cat", None)):
            out = tmp_path / f"{kind}{rank}"
            merge_adapters(dirs, out, WEIGHTS, kind, svd_rank=rank)
            with families.quiet():
                model.load_adapter(out, f"off{kind}{rank}")
                add_weighted_adapter(model, names(model), WEIGHTS, f"on{kind}{rank}", kind, svd_rank=rank)
            assert distance(updates(model, f"off{kind}{rank}"), updates(model, f"on{kind}{rank}")) < CLOSE


def factored(layer: Any, adapter: str, scaled: bool = True) -> LowRank:
    """An update as files hold it: an embedding's is (num_embeddings, dim)."""
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        b, a = layer.lora_embedding_A[adapter].mT, layer.lora_embedding_B[adapter].mT
    return LowRank(b.detach().flatten(1), a.detach().flatten(1)) * (layer.scaling[adapter] if scaled else 1.0)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < CLOSE


class TestLeftToPeft:
    @pytest.mark.parametrize(
        ("settings", "options", "says"),
        [
            ({}, {"svd_clamp": 0.9}, "svd_clamp"),
            ({"lora_bias": True}, {}, "lora_bias of adapter 'a0'"),
            ({"init_lora_weights": "pissa"}, {}, "changes the base weights"),
            (
                {"trainable_token_indices": {"embeddings.word_embeddings": [1, 2]}, "target_modules": ["query"]},
                {},
                "tokens",
            ),
        ],
    )
    def test_with_one_warning(
        self, settings: Settings, options: Settings, says: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        common = {"target_modules": ["query", "intermediate.dense"], **settings}
        theirs = add(PEFTS_OWN, make("bert", [common] * 2), "svd", [1, 0.5], **options)
        ours = add(add_weighted_adapter, make("bert", [common] * 2), "svd", [1, 0.5], **options)
        assert distance(updates(ours), updates(theirs)) == 0
        assert [(r.name, r.levelname) for r in caplog.records] == [("dcmerge_ext.integrations.peft", "WARNING")]
        assert says in caplog.text
        if not options:
            with pytest.raises(InputError, match=r"cannot merge .*"):
                add_weighted_adapter(ours, ["a0", "a1"], [1, 1], "n", "dc_merge")
            assert "n" not in ours.peft_config

    def test_grouped_convolutions(self, caplog: pytest.LogCaptureFixture) -> None:
        with families.quiet(), pytest.raises((RuntimeError, ValueError, IndexError)):
            add(add_weighted_adapter, make("attention", [{"target_modules": ["grouped"]}] * 2), "svd", [1, 1])
        assert "grouped convolutions (module 'grouped')" in caplog.text

    def test_another_peft(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(integration, "_STEPS", ("_renamed",))
        theirs, ours = (add(f, make("bert", [{}] * 2), "svd", [1, 1]) for f in (PEFTS_OWN, add_weighted_adapter))
        assert distance(updates(ours), updates(theirs)) == 0
        assert "this version of PEFT has no LoraModel._renamed" in caplog.text

    def test_no_warning_otherwise(self, caplog: pytest.LogCaptureFixture) -> None:
        for kind in PEFT_TYPES:
            add(add_weighted_adapter, make("bert", [{}] * 2), kind, [1, 1])
        assert not caplog.records

    def test_target_parameters_are_refused_as_in_peft(self) -> None:
        settings: Settings = {"target_modules": [], "target_parameters": ["query.weight"]}
        for method in (PEFTS_OWN, add_weighted_adapter):
            model = make("bert", [settings] * 2)
            with pytest.raises(ValueError, match=r"nn\.Parameter"):
                add(method, model, "svd", [1, 1])
            assert "m" not in model.peft_config


class TestRefused:
    @pytest.mark.parametrize("kind", [*SVD_TYPES, "dc_merge", "knots_ties"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, kind: str, value: float) -> None:
        model = make("bert", [{}] * 3)
        layer = model.base_model.model.encoder.layer[1].attention.self.query
        layer.lora_B["a1"].weight.data[2, 1] = value
        message = r"adapter 'a1', module 'encoder.layer.1.attention.self.query': its factors hold 1 NaN or Inf"
        with pytest.raises(InputError, match=message):
            add(add_weighted_adapter, model, kind)
        assert list(model.peft_config) == ["a0", "a1", "a2"]

    def test_shapes(self) -> None:
        model = make("bert", [{}] * 3)
        layer = model.base_model.model.encoder.layer[1].attention.self.query
        layer.lora_A["a2"].weight.data = torch.randn(4, 5)
        with pytest.raises(
            InputError, match=r"'encoder.layer.1.attention.self.query': the adapters update .* \(24, 5\)"
        ):
            add(add_weighted_adapter, model, "svd")
        layer.lora_A["a2"].weight.data = torch.randn(3, 24)
        with pytest.raises(
            InputError, match=r"adapter 'a2', module .*: lora_A \(3, 24\) and lora_B \(24, 4\) do not fit"
        ):
            add(add_weighted_adapter, model, "dc_merge")
        assert "m" not in model.peft_config

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ((["a0", "b"], [1, 1], "m"), "Adapter b does not exist"),
            (([], [], "m"), "at least one adapter"),
            ((["a0", "a1"], [1, float("nan")], "m"), "weights"),
            ((["a0", "a1"], [1, 1], "m", "dc_merg"), "Invalid combination_type: dc_merg; did you mean 'dc_merge'"),
            ((["a0", "a1"], [1, 1], "m", "knots"), "did you mean 'knots_ties'"),
            ((["a0", "a1"], [1, 1], "m", "ties_svd"), "density"),
            ((["a0", "a1"], [1, 1], "m", "dc_merge", None, 0.9), "density and svd_clamp"),
        ],
    )
    def test_arguments(self, arguments: tuple[Any, ...], says: str) -> None:
        model = make("bert", [{}] * 2)
        with pytest.raises(InputError, match=says):
            add_weighted_adapter(model, *arguments)
        assert list(model.peft_config) == ["a0", "a1"]

    def test_options_of_the_other_kind(self) -> None:
        model = make("bert", [{}] * 2)
        for extra in ({"options": {"keep": 0.1}}, {"scale": 1.0}):
            with pytest.raises(OptionError, match="'svd' is PEFT's"):
                add_weighted_adapter(model, ["a0", "a1"], [1, 1], "m", "svd", **extra)
        with pytest.raises(OptionError, match="no option 'kep'"):
            add_weighted_adapter(model, ["a0", "a1"], [1, 1], "m", "dc_merge", options={"kep": 0.1})

    def test_a_driver_of_another_device(self) -> None:
        for method in (PEFTS_OWN, add_weighted_adapter):
            with pytest.raises(RuntimeError, match="driver"):
                add(method, make("bert", [{}] * 2), "svd", [1, 1], svd_driver="gesvd")

    def test_models_without_lora(self) -> None:
        with pytest.raises(TypeError, match="needs a model with LoRA adapters, got BertModel"):
            add_weighted_adapter(base_model("bert"), ["a"], [1], "m")
        ia3 = peft.get_peft_model(copy.deepcopy(base_model("bert")), peft.IA3Config(
            target_modules=["query"], feedforward_modules=[]))  # fmt: skip
        with pytest.raises(TypeError, match="got IA3Model"):
            add_weighted_adapter(ia3, ["default"], [1], "m")

    @pytest.mark.parametrize(
        ("kind", "says"), [("ties_svd", "not offered"), ("linear", "not offered"), ("sdv", "did you mean 'svd'")]
    )
    def test_offline(self, kind: str, says: str, tmp_path: Path) -> None:
        with families.quiet():
            make("bert", [{}]).save_pretrained(tmp_path, selected_adapters=["a0"])
        with pytest.raises(InputError, match=says):
            merge_adapters([tmp_path / "a0"], tmp_path / "out", combination_type=kind)
        with pytest.raises(OptionError, match="'cat' is PEFT's"):
            merge_adapters([tmp_path / "a0"], tmp_path / "out", combination_type="cat", scale=2.0)
        with pytest.raises(InputError, match="at least one adapter"):
            merge_adapters([], tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestPatching:
    def test_callers_change_nothing(self) -> None:
        theirs, ours = make("bert", [{}] * 2), make("bert", [{}] * 2)
        theirs.add_weighted_adapter(["a0", "a1"], [1.0, 0.5], "m", combination_type="ties_svd", density=0.5)
        with accelerated_peft():
            assert ours.add_weighted_adapter(adapters=["a0", "a1"], weights=[1.0, 0.5], adapter_name="m",
                                             combination_type="ties_svd", density=0.5) is None  # fmt: skip
            ours.add_weighted_adapter(["a0", "a1"], [1, 1], "n", combination_type="dc_merge", scale=1.0)
        assert 0 < distance(updates(ours), updates(theirs)) < CLOSE

    def test_the_arguments_are_pefts_and_two_more(self) -> None:
        ours, theirs = (inspect.signature(f).parameters for f in (add_weighted_adapter, PEFTS_OWN))
        assert list(ours)[1:-2] == list(theirs)[1:]
        assert [p.default for p in list(ours.values())[1:-2]] == [p.default for p in list(theirs.values())[1:]]

    def test_again_and_off(self) -> None:
        patch()
        patch()
        assert LoraModel.add_weighted_adapter is add_weighted_adapter
        with accelerated_peft():
            unpatch()
            assert LoraModel.add_weighted_adapter is add_weighted_adapter
        assert LoraModel.add_weighted_adapter is PEFTS_OWN
        unpatch()
        assert LoraModel.add_weighted_adapter is PEFTS_OWN

    def test_nested_and_on_an_error(self) -> None:
        with pytest.raises(KeyError), accelerated_peft(), accelerated_peft():
            raise KeyError
        assert LoraModel.add_weighted_adapter is PEFTS_OWN
        patch()
        try:
            with accelerated_peft():
                pass
            assert LoraModel.add_weighted_adapter is add_weighted_adapter
        finally:
            unpatch()

    def test_another_patch_on_top_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def other(*args: Any, **kwargs: Any) -> None: ...

        patch()
        monkeypatch.setattr(LoraModel, "add_weighted_adapter", other)
        unpatch()
        assert LoraModel.add_weighted_adapter is other
        monkeypatch.undo()
        unpatch()

    def test_threads(self) -> None:
        """Blocks overlap, each with a model of its own; the last one out restores PEFT's method."""
        models = [make("bert", [{}] * 2) for _ in range(4)]
        barrier = threading.Barrier(len(models), timeout=60)
        seen: list[bool] = []

        def work(model: Any) -> None:
            with accelerated_peft():
                barrier.wait()
                model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "m", svd_rank=8)
                seen.append(LoraModel.add_weighted_adapter is add_weighted_adapter)

        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [True] * 4
        assert all(distance(updates(m), weighted(m, [1, 1])) < 1e-6 for m in models)

    def test_adalora_keeps_its_own_method(self) -> None:
        config = peft.AdaLoraConfig(target_modules=["query"], total_step=10)
        with families.quiet():
            model = peft.get_peft_model(copy.deepcopy(base_model("bert")), config)
        with accelerated_peft(), pytest.raises(TypeError, match="does not support add_weighted_adapter"):
            model.add_weighted_adapter(["default"], [1.0], "m")
        with pytest.raises(TypeError, match="needs LORA"):
            add_weighted_adapter(model, ["default"], [1.0], "m")


def test_the_package_imports_no_peft() -> None:
    code = "import sys, dcmerge_ext; sys.exit(any(m.split('.')[0] in ('peft', 'transformers') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""integrations.mergekit inside the installed mergekit: by its command and in memory, against our own merges and its own."""

from __future__ import annotations

import logging
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import dcmerge_ext as dcm
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.methods.registry import describe_options

mergekit = pytest.importorskip("mergekit")

from click.testing import CliRunner, Result  # noqa: E402
from mergekit import merge_methods  # noqa: E402
from mergekit.merge_methods import merge_state_dicts  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from dcmerge_ext.integrations.mergekit import PREFIX, TWINS, register_all, why_not  # noqa: E402
from dcmerge_ext.integrations.mergekit_yaml import command  # noqa: E402

NAMES = register_all()
OURS = [name for name in NAMES if name.removeprefix(PREFIX) not in TWINS]
DOC = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
TASKS = 3
ROUNDINGS = 4
"""Roundings to the dtype of the tensors by which a result may differ from mergekit's: the number in the documentation."""


# --- models -----------------------------------------------------------------------------------------------------------


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of it, saved."""
    root = tmp_path_factory.mktemp("models")
    paths = [root / name for name in ("base", "a", "b", "c")]
    base = llama(0)
    base.save_pretrained(paths[0])
    for seed, path in enumerate(paths[1:], 1):
        model = llama(0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        model.save_pretrained(path)
    return paths


def configuration(
    paths: Sequence[Path],
    method: str,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    tasks: list[dict[str, Any]] = [{"model": str(path)} for path in paths[1:]]
    for task, weight in zip(tasks, weights or [], strict=False):
        task["parameters"] = {"weight": weight}
    return {
        "merge_method": method,
        "base_model": str(paths[0]),
        "models": tasks,
        **({"parameters": dict(parameters)} if parameters else {}),
        **others,
    }


def run(config: Mapping[str, Any], out: Path, *options: str) -> Result:
    """The launcher's command."""
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(dict(config)))
    return CliRunner().invoke(command(), [str(file), str(out), "--no-copy-tokenizer", "--quiet", *options])


def merged(config: Mapping[str, Any], out: Path, *options: str) -> dict[str, Tensor]:
    result = run(config, out, *options)
    assert result.exit_code == 0, result.output
    return load_file(out / "model.safetensors")


def own(paths: Sequence[Path], out: Path, method: str, **settings: Any) -> dict[str, Tensor]:
    dcm.merge_checkpoints(paths[0], paths[1:], out, method, **settings)
    return load_file(out / "model.safetensors")


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# --- registration -----------------------------------------------------------------------------------------------------


def test_registering_again_changes_nothing() -> None:
    before = merge_methods.registered_methods()
    assert register_all() == NAMES
    assert merge_methods.registered_methods() == before
    assert set(NAMES) <= {method.spec.name for method in before}


def test_every_method_is_offered_or_documented_as_left_out() -> None:
    for name in dcm.list_methods():
        reason = why_not(name)
        assert (reason is None) == (PREFIX + name in NAMES)
        assert f"`{PREFIX + name if reason is None else name}`" in DOC
    assert f"{ROUNDINGS} roundings" in DOC


@pytest.mark.parametrize("name", OURS)
def test_parameters_are_the_options_of_the_method(name: str) -> None:
    parameters = {p.name: p for p in merge_methods.get(name).spec.parameters}
    options = describe_options(dcm.list_methods()[name.removeprefix(PREFIX)])
    assert list(parameters) == ["weight", "lambda", *(o.name for o in options)]
    assert parameters["weight"].default == 1
    assert parameters["lambda"].default is None
    for option in options:
        parameter = parameters[option.name]
        assert parameter.validate(parameter.default) == parameter.default == option.default


@pytest.mark.parametrize("name", sorted(TWINS))
def test_twins_have_the_parameters_of_mergekit(name: str) -> None:
    assert merge_methods.get(PREFIX + name).spec.parameters == merge_methods.get(name).spec.parameters


def test_the_package_itself_imports_no_mergekit() -> None:
    code = "import dcmerge_ext, sys; sys.exit(any(m.partition('.')[0] == 'mergekit' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_or_older_mergekit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(dcm.__file__).parent / "integrations" / "mergekit.py"
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods.base", None)
    with pytest.raises(ImportError, match=r"needs mergekit 0\.1\.5 or later \(.*mergekit\.merge_methods\.base"):
        runpy.run_path(str(source))


# --- by the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_the_command_gives_the_bytes_of_our_own_merge(name: str, models: list[Path], tmp_path: Path) -> None:
    weights = [1.0, 0.5, 0.8]
    found = merged(configuration(models, name, weights), tmp_path / "found")
    assert_same(found, own(models, tmp_path / "own", name.removeprefix(PREFIX), weights=weights))


def test_options_and_scale_reach_the_method(models: list[Path], tmp_path: Path) -> None:
    options = {"smoothing": "average", "rank": 4, "seed": 3}
    parameters = {**options, "keep": "5e-2", "lambda": 1.5}  # YAML reads 5e-2 as a text
    found = merged(configuration(models, "dcmerge_dc_merge", parameters=parameters), tmp_path / "found")
    wanted = own(models, tmp_path / "own", "dc_merge", scale=1.5, keep=0.05, **options)
    assert_same(found, wanted)
    default = own(models, tmp_path / "default", "dc_merge", scale=1.5)
    assert not torch.equal(default["lm_head.weight"], wanted["lm_head.weight"])


def test_a_preset(models: list[Path], tmp_path: Path) -> None:
    found = merged(configuration(models, "dcmerge_iso_c", parameters={"official": "fft"}), tmp_path / "found")
    assert_same(found, own(models, tmp_path / "own", "iso_c", official="fft"))


def test_filters_and_gradients_over_layers_are_mergekits(models: list[Path], tmp_path: Path) -> None:
    scale = [{"filter": "mlp", "value": 0.0}, {"filter": "self_attn", "value": [1.0, 2.0]}, {"value": 0.5}]
    found = merged(configuration(models, "dcmerge_tsv_m", parameters={"lambda": scale}), tmp_path / "found")
    base = load_file(models[0] / "model.safetensors")
    by_scale = {s: own(models, tmp_path / f"own{s}", "tsv_m", scale=s) for s in (0.5, 1.0, 2.0)}
    for name, tensor in found.items():
        if "mlp" in name:
            wanted = base[name]
        elif "self_attn" in name:
            wanted = by_scale[1.0 if "layers.0." in name else 2.0][name]
        else:
            wanted = by_scale[0.5][name]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("name", ["dcmerge_dc_merge", "dcmerge_ties"])
def test_the_merged_model_loads_and_computes_what_it_should(name: str, models: list[Path], tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"weight": 0.5, "density": 0.3} if name == "dcmerge_ties" else {"weight": 0.5}
    merged(configuration(models, name, parameters=parameters, dtype="float32"), tmp_path / "found")
    merge_own = "ties" if name == "dcmerge_ties" else "dc_merge"
    if name == "dcmerge_ties":
        merged(configuration(models, merge_own, parameters=parameters, dtype="float32"), tmp_path / "wanted")
    else:
        own(models, tmp_path / "wanted", merge_own, weights=[0.5] * TASKS)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        found, wanted, base = (
            LlamaForCausalLM.from_pretrained(path).eval()(ids).logits
            for path in (tmp_path / "found", tmp_path / "wanted", models[0])
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (found - base).abs().max() > 1e-2


def test_half_precision_files_keep_their_dtype(models: list[Path], tmp_path: Path) -> None:
    halves = [tmp_path / path.name for path in models]
    for path, half in zip(models, halves, strict=True):
        LlamaForCausalLM.from_pretrained(path).bfloat16().save_pretrained(half)
    found = merged(configuration(halves, "dcmerge_dc_merge"), tmp_path / "found")
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert_same(found, own(halves, tmp_path / "own", "dc_merge"))


def test_options_of_the_command_pass_through(models: list[Path], tmp_path: Path) -> None:
    config = configuration(models, "dcmerge_dc_merge")
    merged(config, tmp_path / "card")
    assert "dc_merge (dcmerge_ext)" in (tmp_path / "card" / "README.md").read_text()
    assert run(config, tmp_path / "plain", "--no-write-model-card", "--out-shard-size", "8K").exit_code == 0
    assert not (tmp_path / "plain" / "README.md").exists()
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1


def test_the_launcher_as_a_process(models: list[Path], tmp_path: Path) -> None:
    """A configuration of mergekit's, the name of the method changed; and mergekit's methods stay what they are."""
    parameters = {
        "weight": 0.4,
        "density": 0.3,
        "int8_mask": True,
        "unknown": 1,
    }  # mergekit ignores what it does not know
    theirs = merged(configuration(models, "ties", parameters=parameters), tmp_path / "theirs")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(configuration(models, "dcmerge_ties", parameters=parameters)))
    code = "from dcmerge_ext.integrations.mergekit import entry; entry()"
    line = [sys.executable, "-c", code, str(tmp_path / "c.yaml"), str(tmp_path / "ours"), "--no-copy-tokenizer"]
    assert subprocess.run(line, check=False, capture_output=True, timeout=120).returncode == 0
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    base, *tasks = (load_file(path / "model.safetensors") for path in models)
    for name, tensor in ours.items():
        densities = [0.3] * TASKS
        updates = [task[name] - base[name] for task in tasks]
        assert_close_to_mergekit(tensor, theirs[name], base[name], updates, densities)


# --- in memory --------------------------------------------------------------------------------------------------------


def states(kind: str = "random", dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    """A base and the tasks: matrices, an embedding, a vector, a scalar, an integer buffer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "a.weight": (24, 16),
        "b.weight": (24, 16),
        "embed_tokens.weight": (30, 16),
        "norm.weight": (16,),
        "s": (),
    }

    def draw(shape: tuple[int, ...], rank: int | None = None) -> Tensor:
        if rank is not None and len(shape) == 2:
            return draw((shape[0], rank)) @ draw((rank, shape[1]))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {name: draw(shape) for name, shape in shapes.items()}
    tasks = []
    for i in range(TASKS):
        if kind == "duplicates" and i:
            tasks.append(dict(tasks[0]))
        elif kind == "untouched" and i == 1:
            tasks.append(dict(base))
        else:
            rank = 2 if kind == "rank deficient" else None
            tasks.append({name: base[name] + 0.1 * draw(shape, rank) for name, shape in shapes.items()})
    for state in (base, *tasks):
        state.update({name: tensor.to(dtype) for name, tensor in state.items()})
        state["position_ids"] = torch.arange(5)
    return [base, *tasks]


@pytest.mark.parametrize("kind", ["random", "rank deficient", "duplicates", "untouched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_in_memory_as_our_own(name: str, dtype: torch.dtype, kind: str) -> None:
    models = states(kind, dtype)
    weights = [1.0, 0.5, 0.8]
    found = merge_state_dicts(models, name, base=0, parameters={"weight": weights})
    wanted = dcm.merge_state_dicts(models[0], models[1:], name.removeprefix(PREFIX), weights=weights)
    assert_same(found, wanted)


def test_groups_side_by_side_give_the_same(restore_threads: None) -> None:
    models = states()
    wanted = merge_state_dicts(models, "dcmerge_dc_merge", base=0)
    torch.set_num_threads(2)
    found = merge_state_dicts(models, "dcmerge_dc_merge", base=0)
    in_turn = merge_state_dicts(
        models, "dcmerge_dc_merge", base=0, batch_options=merge_methods.BatchOptions(max_bytes=2)
    )
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
        torch.testing.assert_close(in_turn[name], wanted[name])


def test_one_task_takes_the_scale_of_one(models: list[Path], tmp_path: Path) -> None:
    found = merged(configuration(models[:2], "dcmerge_task_arithmetic", [1.0]), tmp_path / "found")
    task = load_file(models[1] / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, task[name])


# --- TIES and task arithmetic against mergekit's own ------------------------------------------------------------------


def ambiguous(updates: Sequence[Tensor], densities: Sequence[float]) -> Tensor:
    """Where mergekit's trimming depends on its unstable sort: the entries tie at the threshold and not all survive.

    It sorts in float32, so that entries of float64 tie there, too.
    """
    found = torch.zeros_like(updates[0], dtype=torch.bool)
    for update, density in zip(updates, densities, strict=True):
        magnitudes = update.abs().float()
        count = max(1, int(density * update.numel()))
        if 0 < density < 1:
            threshold = magnitudes.flatten().sort(descending=True).values[count - 1]
            if threshold > 0 and (magnitudes >= threshold).sum() > count:  # zeros have no vote, surviving or not
                found |= magnitudes == threshold
    return found


def assert_close_to_mergekit(
    found: Tensor, wanted: Tensor, base: Tensor, updates: Sequence[Tensor], densities: Sequence[float]
) -> None:
    """Within the documented roundings of the dtype, but for the entries whose survival mergekit leaves to chance."""
    assert found.dtype == wanted.dtype
    unit = torch.finfo(found.dtype).eps
    a, b, w = (x.double() for x in (found, wanted, base))
    clear = ~ambiguous(updates, densities)
    assert clear.double().mean() > 0.5
    assert bool(((a - b).abs() <= ROUNDINGS * unit * (w.abs() + (b - w).abs()))[clear].all())


SETTINGS: dict[str, dict[str, Any]] = {
    "published": {"weight": 1.0, "density": 0.2},
    "weighted": {"weight": [1.0, 0.5, 0.75], "density": [0.2, 0.5, 1.0], "lambda": 0.7},
    "one weight": {"weight": 0.3, "density": 0.5, "normalize": True},
    "summed": {"weight": [0.3, 0.9, 0.4], "density": 0.5, "normalize": False},
    "negative": {"weight": [1.0, -0.4, 0.7], "density": 0.5, "normalize": False, "lambda": 1.5},
    "rescaled": {"weight": [1.0, 0.5, 0.5], "density": 0.25, "rescale": True, "int8_mask": True},
    "nothing": {"weight": [0.0, 0.0, 0.0], "density": 0.5},
    "untrimmed": {"weight": [1.0, 0.5, 0.25], "density": 1.0},
    "one task out": {"weight": [1.0, 1.0, 1.0], "density": [0.5, 0.0, 0.5]},
}


@pytest.mark.parametrize("kind", ["random", "rank deficient", "duplicates", "untouched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_ties_is_mergekits(setting: str, dtype: torch.dtype, kind: str) -> None:
    models, parameters = states(kind, dtype), SETTINGS[setting]
    found = merge_state_dicts(models, "dcmerge_ties", base=0, parameters=parameters)
    wanted = merge_state_dicts(models, "ties", base=0, parameters=parameters)
    density = parameters["density"]
    densities = density if isinstance(density, list) else [density] * TASKS
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, wanted[name])
            continue
        updates = [task[name] - models[0][name] for task in models[1:]]
        assert_close_to_mergekit(tensor, wanted[name], models[0][name], updates, densities)
    if setting != "nothing":
        assert not torch.equal(found["a.weight"], models[0]["a.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_any_strides(name: str, dtype: torch.dtype) -> None:
    plain = states(dtype=dtype)
    transposed = [{k: v.mT.contiguous().mT if v.ndim == 2 else v for k, v in state.items()} for state in plain]
    assert not transposed[0]["a.weight"].is_contiguous()
    parameters = {"weight": [1.0, 0.5, 0.8]}
    found = merge_state_dicts(transposed, name, base=0, parameters=parameters)
    wanted = merge_state_dicts(plain, name, base=0, parameters=parameters)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rescale", [False, True])
def test_entries_that_tie_at_the_threshold_survive_from_the_first(dtype: torch.dtype, rescale: bool) -> None:
    base = {"w": torch.zeros(4, 3, dtype=dtype)}
    task = {"w": torch.tensor([[1, -2, 2], [3, 2, -2], [0, 2, 1], [-3, 0, 2]], dtype=dtype)}
    found = merge_state_dicts(
        [base, task], "dcmerge_ties", base=0, parameters={"weight": 1.0, "density": 5 / 12, "rescale": rescale}
    )
    wanted = torch.tensor([[0, -2, 2], [3, 2, 0], [0, 0, 0], [-3, 0, 0]], dtype=dtype)
    if rescale:
        wanted = wanted * (20 / 12)
    torch.testing.assert_close(found["w"], wanted)


def test_zeros_tie_without_a_vote() -> None:
    base = {"w": torch.zeros(4)}
    tasks = [{"w": torch.tensor([0.0, 0.0, 0.0, -1.0])}, {"w": torch.tensor([2.0, 0.0, 1.0, 1.0])}]
    parameters = {"weight": 1.0, "density": 0.75}
    found = merge_state_dicts([base, *tasks], "dcmerge_ties", base=0, parameters=parameters)
    assert torch.equal(found["w"], torch.tensor([2.0, 0.0, 1.0, 1.0]))  # a sum of 0 elects +


@pytest.mark.parametrize("kind", ["random", "rank deficient", "duplicates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "parameters",
    [
        {"weight": 0.4},
        {"weight": [1.0, -0.5, 0.25], "lambda": 0.7, "density": 0.3, "rescale": True},
        {"weight": [1.0, 0.5, 0.25], "normalize": True},
        {"weight": [1.0, -0.5, -0.25], "normalize": True, "int8_mask": True},
    ],
)
def test_task_arithmetic_is_mergekits(parameters: dict[str, Any], dtype: torch.dtype, kind: str) -> None:
    base, *tasks = states(kind, dtype)
    found = merge_state_dicts([base, *tasks], "dcmerge_task_arithmetic", base=0, parameters=parameters)
    wanted = merge_state_dicts([base, *tasks], "task_arithmetic", base=0, parameters=parameters)
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        if not tensor.is_floating_point():
            assert torch.equal(tensor, wanted[name])
            continue
        size = base[name].double().abs() + sum((task[name].double() - base[name].double()).abs() for task in tasks)
        difference = (tensor.double() - wanted[name].double()).abs()
        assert bool((difference <= ROUNDINGS * torch.finfo(dtype).eps * size).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_cancel_are_not_normalized(dtype: torch.dtype) -> None:
    """As in mergekit, which divides by zero where the dtype is float16."""
    models, parameters = states(dtype=dtype), {"weight": [1.0, -0.5, -0.5]}
    found = merge_state_dicts(models, "dcmerge_task_arithmetic", base=0, parameters={**parameters, "normalize": True})
    assert_same(found, merge_state_dicts(models, "dcmerge_task_arithmetic", base=0, parameters=parameters))


# --- gradients --------------------------------------------------------------------------------------------------------


def linears() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, 6) for _ in range(3)]


@pytest.mark.parametrize("name", ["ties", "task_arithmetic"])
def test_twins_leave_gradients_to_mergekit(name: str, caplog: pytest.LogCaptureFixture) -> None:
    modules, parameters = linears(), {"weight": 0.5}
    with caplog.at_level(logging.WARNING, "dcmerge_ext"):
        found = merge_state_dicts(modules, PREFIX + name, base=0, parameters=parameters)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    wanted = merge_state_dicts(modules, name, base=0, parameters=parameters)
    for key, tensor in found.items():
        assert tensor.grad_fn is not None
        assert torch.equal(tensor, wanted[key])


def test_other_methods_say_that_they_record_none(caplog: pytest.LogCaptureFixture) -> None:
    modules = linears()
    with caplog.at_level(logging.WARNING, "dcmerge_ext"):
        found = merge_state_dicts(modules, "dcmerge_iso_c", base=0)
        with torch.no_grad():
            again = merge_state_dicts(modules, "dcmerge_iso_c", base=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "records no gradients" in caplog.text
    assert not any(tensor.requires_grad for tensor in found.values())
    assert_same(found, again)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "b"])
@pytest.mark.parametrize("name", ["dcmerge_ties", "dcmerge_task_arithmetic", "dcmerge_dc_merge"])
def test_values_that_are_not_finite(name: str, where: str, value: float) -> None:
    base, a, b, c = states()
    (base if where == "base" else b)["b.weight"][1, 2] = value
    models = {"base": base, "models/a": a, "models/b": b, "models/c": c}
    with pytest.raises(InputError, match=r"'b\.weight'.* holds 1 NaN or Inf values") as caught:
        merge_state_dicts(models, name, base="base", parameters={"weight": 1.0})
    assert str(caught.value).startswith("models/b: " if where == "b" else "base: ")


def test_values_that_are_not_finite_by_the_command(models: list[Path], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(models[2])
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    paths = [*models[:2], tmp_path / "broken"]
    result = run(configuration(paths, "dcmerge_iso_c"), tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1] == (
        f"Error: {tmp_path / 'broken'}: tensor 'model.norm.weight' holds 1 NaN or Inf values; "
        "repair the model or leave it out"
    )


@pytest.mark.parametrize("name", ["dcmerge_ties", "dcmerge_task_arithmetic"])
def test_overflow(name: str) -> None:
    base, task = {"w": torch.zeros(4, 4, dtype=torch.float16)}, {"w": torch.full((4, 4), 6e4, dtype=torch.float16)}
    with pytest.raises(InputError, match=r"'w': values overflow float16"):
        merge_state_dicts([base, task], name, base=0, parameters={"weight": 1.0, "lambda": 2.0})


def test_an_update_that_overflows() -> None:
    base, task = ({"w": torch.full((4, 4), x, dtype=torch.float16)} for x in (-6e4, 6e4))
    with pytest.raises(
        InputError, match=r"1: 16 values of the update of tensor 'w' overflow float16; set dtype: float32"
    ):
        merge_state_dicts([base, task], "dcmerge_ties", base=0, parameters={"weight": 0.1})


@pytest.mark.parametrize("name", ["dcmerge_ties", "dcmerge_dc_merge"])
def test_shapes_that_differ(name: str) -> None:
    base, a, *_ = states()
    a["a.weight"] = torch.zeros(24, 17)
    with pytest.raises(ValueError, match=r"Tensor size mismatch for a\.weight"):
        merge_state_dicts([base, a], name, base=0, parameters={"weight": 1.0})


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_base(name: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="requires a base input"):
        merge_state_dicts(states(), name, parameters={"weight": 1.0})
    config = configuration(models, name, parameters={"weight": 1.0})
    del config["base_model"]
    result = run(config, tmp_path / "out")
    assert result.exit_code != 0
    assert "requires a base input" in str(result.exception)


def test_a_base_alone() -> None:
    base = states()[0]
    with pytest.raises(ValueError, match="at least 1 non-base"):
        merge_state_dicts([base], "dcmerge_dc_merge", base=0)
    for name in TWINS:
        assert_same(merge_state_dicts([base], PREFIX + name, base=0), base)


def test_unknown_parameters(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Unknown parameter"):
        merge_state_dicts(states(), "dcmerge_dc_merge", base=0, parameters={"smothing": "average"})
    for config in (
        configuration(models, "dcmerge_dc_merge", parameters={"smothing": "average"}),
        {
            **configuration(models, "dcmerge_dc_merge"),
            "models": [{"model": str(models[1]), "parameters": {"smothing": "average"}}],
        },
    ):
        result = run(config, tmp_path / "out")
        assert result.exit_code == 1
        assert re.search(
            r"Error: dcmerge_dc_merge has no parameter 'smothing'; did you mean 'smoothing'\?", result.output
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"keep": 2}, r"dcmerge_dc_merge, parameter keep: expected `?float`? <= 1\.0"),
        ({"smoothing": "averag"}, r"dcmerge_dc_merge, parameter smoothing: invalid enum value 'averag'"),
        ({"rank": "many"}, r"dcmerge_dc_merge, parameter rank: "),
        ({"rho": 3.0}, r"rho belongs to smoothing='linear'"),
    ],
)
def test_values_of_parameters(parameters: dict[str, Any], text: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?i){text}"):
        merge_state_dicts(states(), "dcmerge_dc_merge", base=0, parameters=parameters)
    result = run(configuration(models, "dcmerge_dc_merge", parameters=parameters), tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(f"(?i)Error: .*{text.removeprefix('dcmerge_dc_merge, parameter ')}", result.output)


@pytest.mark.parametrize("name", ["dcmerge_dare", "dcmerge_consensus"])
def test_a_setting_that_needs_the_whole_model(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} with aggregate=ties looks at the whole model first"):
        merge_state_dicts(states(), name, base=0, parameters={"aggregate": "ties"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dcmerge_knots", "looks at the whole model first"),
        ("dcmerge_robust_merge", "merges LoRA factors"),
        ("dcmerge_esm", "needs a file of activations"),
        ("dcmerge_dcmerge", "did you mean 'dcmerge_dc_merge'"),
    ],
)
def test_methods_that_are_not_offered(name: str, text: str, models: list[Path], tmp_path: Path) -> None:
    result = run(configuration(models, name), tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: merge_method '{name}' does not exist")
    assert text in result.output


def test_parameters_of_a_later_mergekit() -> None:
    group = merge_methods.TensorGroup.from_tensors([torch.zeros(2), torch.ones(2)], base_index=0, name="w")
    with pytest.raises(OptionError, match="does not know temperature"):
        TWINS["ties"](group, temperature=1.0)

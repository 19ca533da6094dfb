"""What is fuzzed. A target writes one case into the working directory and returns what to run on it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from dcmerge_ext import compare
from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.checkpoints.run import prepare, run
from dcmerge_ext.cli.merge import config_of
from dcmerge_ext.cli.parser import build_parser
from dcmerge_ext.comparison.result import Comparison
from dcmerge_ext.methods.registry import describe_options, list_methods
from fuzz import inputs, mutate
from fuzz.pickles import hostile_pickle
from fuzz.side_files import odd_side_file

OUT = "out"
SECRET = b"nobody's business"
"""Content of files outside the inputs: must not turn up in an output."""
Job = Callable[[], "Path | Comparison"]
"""Runs the package on a case: the directory it wrote, or a comparison."""
Target = Callable[[Random], Job]

_FULL = (
    "dc_merge",
    "dc_merge",
    "dc_merge",
    "ties",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "score",
    "averaging",
    "task_arithmetic",
    "dare",
    "consensus",
    "pcb",
)
_LORA = (*_FULL, "knots", "core_space", "robust_merge")


def merge(tasks: list[str], base: str | None = "base", **settings: Any) -> Job:
    values = {"base": base, "tasks": tasks, "out": OUT, **settings}
    return lambda: run(prepare(build_config(values))).out


def safetensors_headers(random: Random) -> Job:
    """Headers whose JSON, lengths, dtypes, shapes or offsets are wrong."""
    role = random.choice(["base/model.safetensors", "task0/model.safetensors", "adapter0/adapter_model.safetensors"])
    inputs.put("base", role.split("/")[0])
    header, data = inputs.safetensors_header(inputs.family()[role])
    names = [*header, "__metadata__"]
    wrong = (
        *inputs.SIZES,
        "F8_E4M3",
        "F4",
        "f32",
        "C64",
        *names,
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        [0, 0],
        [4, 4],
    )
    text = mutate.json_bytes(random, mutate.mutate(random, header, wrong))
    size = None
    if random.random() < 0.1:
        size = random.choice([0, 1, len(text) - 1, len(text) + 1, len(text) + len(data), 100_000_001, 2**31, 2**63 - 1, 2**63, 2**64 - 1])  # fmt: skip
    inputs.write(role, inputs.safetensors_bytes(text, data, size))
    return merge(["adapter0"] if role.startswith("adapter") else ["task0"] if role.startswith("task") else ["base"])


def safetensors_bytes(random: Random) -> Job:
    """Weight files with changed, missing or additional bytes."""
    role = random.choice(["base/model.safetensors", "task0/model.safetensors", "adapter0/adapter_model.safetensors"])
    inputs.put("base", "task0", "adapter0")
    inputs.write(role, mutate.mutate_bytes(random, inputs.family()[role]))
    return merge(["task0", "adapter0"], method=random.choice(_FULL))


def tensors(random: Random) -> Job:
    """Well-formed files whose tensors do not fit: names, dtypes, shapes, extreme values."""
    base = inputs.base_tensors()
    names = [*base, "lm_head.weight", "x.bias", "a" * 300, "__metadata__x", "é", "a\nb", "../x", "weight", "experts.w"]
    inputs.put("base", "task")
    for role in random.choice([["task0"], ["task0"], ["base"], ["base", "task0"]]):
        model = base if role == "base" else inputs.tuned(0)
        inputs.write(f"{role}/{inputs.MODEL}", inputs.odd_tensors(random, model, names))
    return merge(
        ["task0", "task1"],
        method=random.choice(_FULL),
        extra=random.choice(["error", "ignore"]),
        vocab=random.choice(["error", "base", "skip"]),
        dtype=random.choice(["keep", "keep", "float32", "bfloat16", "float16"]),
    )


def adapter_tensors(random: Random) -> Job:
    """Well-formed adapter files with odd names, dtypes, shapes and values."""
    from safetensors.torch import load

    inputs.put("base", "adapter")
    prefix = "base_model.model."
    module, other = inputs.MODULES
    parts = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_C",
        "base_layer",
    )
    names = [f"{prefix}{m}.{part}{leaf}" for m in (module, other, "embed_tokens", "x") for part in parts for leaf in (".weight", ".bias", "", ".default.weight")]  # fmt: skip
    names += [
        "lora_A",
        f"{module}.lora_A.weight",
        f"{prefix}{module}.weight",
        "layers.0.norm.weight",
        f"{prefix}layers.0.norm.weight",
        "",
        prefix,
    ]
    content = load(inputs.family()[f"adapter0/{inputs.WEIGHTS}"])
    inputs.write(f"adapter0/{inputs.WEIGHTS}", inputs.odd_tensors(random, content, names))
    return _adapters(random)


def _adapters(random: Random) -> Job:
    base = random.choice(["base", None])
    return merge(
        ["adapter0", "adapter1"],
        base,
        method=random.choice(_LORA),
        save_as=random.choice([None, "adapter", "full"]) if base else None,
        adapter_rank=random.choice([None, None, None, 1, 3]) if base is None else None,
    )


def adapter_configs(random: Random) -> Job:
    """adapter_config.json with wrong types, numbers, names and patterns."""
    inputs.put("base", "adapter")
    content = json.loads(inputs.family()[f"adapter0/{inputs.SETTINGS}"])
    more = {
        "base_model_name_or_path": "someone/base", "use_rslora": True, "fan_in_fan_out": True, "init_lora_weights": "gaussian",
        "modules_to_save": ["x"], "lora_dropout": 0.1, "layers_to_transform": [0], "target_parameters": None, "use_dora": False,
        "rank_pattern": {"query_projection": 1}, "alpha_pattern": {"layers.0.*": 3, "^x$": 1}, "auto_mapping": None,
        "layer_replication": None, "trainable_token_indices": None, "revision": None, "megatron_config": {}, "exclude_modules": "x",
    }  # fmt: skip
    for key in random.sample(list(more), random.choice([0, 1, 2, 5])):
        content[key] = more[key]
    patterns = [{pattern: 1} for pattern in mutate.CATASTROPHIC] + [{"(": 1}, {"a{99999999999}": 2}, {".*": 10**400}]
    edited = mutate.mutate(random, content, patterns)
    if random.random() < 0.2 and isinstance(edited, dict):
        edited[random.choice(["rank_pattern", "alpha_pattern"])] = random.choice(patterns)
    inputs.write(f"adapter0/{inputs.SETTINGS}", mutate.json_bytes(random, edited))
    return _adapters(random)


def indexes(random: Random) -> Job:
    """Indexes of sharded models: paths that lead out, wrong types, missing shards."""
    inputs.put("base", "task0")
    inputs.write("outside/secret.safetensors", inputs.family()["task1/model.safetensors"])
    role = random.choice(["base", "task0"])
    header, data = inputs.safetensors_header(inputs.family()[f"{role}/{inputs.MODEL}"])
    Path(role, inputs.MODEL).unlink()
    names = sorted(header, key=lambda n: header[n]["data_offsets"])
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for shard, held in shards.items():
        start, end = header[held[0]]["data_offsets"][0], header[held[-1]]["data_offsets"][1]
        own = {n: {**header[n], "data_offsets": [o - start for o in header[n]["data_offsets"]]} for n in held}
        inputs.write(f"{role}/{shard}", inputs.safetensors_bytes(json.dumps(own).encode(), data[start:end]))
    index = {"metadata": {"total_size": 1}, "weight_map": {n: shard for shard, held in shards.items() for n in held}}
    wrong = (
        *names, *shards, "a.safetensors/", "./a.safetensors", "a.safetensors/../b.safetensors", "model.safetensors.index.json",
        "config.json", "sub/../../outside/secret.safetensors", "/dev/zero", "A.safetensors", "b.bin", "outside",
    )  # fmt: skip
    inputs.write(f"{role}/{inputs.MODEL}.index.json", mutate.json_bytes(random, mutate.mutate(random, index, wrong)))
    return merge(["task0"], extra=random.choice(["error", "ignore"]))


def model_configs(random: Random) -> Job:
    """config.json of the base, which is read, copied, and changed where the dtype is converted."""
    inputs.put("base", "task0")
    content = {
        "model_type": "toy", "torch_dtype": "float32", "architectures": ["Toy"], "hidden_size": 3, "vocab_size": 5,
        "quantization_config": None, "auto_map": {"AutoModel": "modeling.Toy"}, "nested": {"a": [1, {"b": None}]},
    }  # fmt: skip
    wrong = ({"quant_method": "gptq"}, {"quant_method": ["x" * 10_000]}, "float16")
    inputs.write("base/config.json", mutate.json_bytes(random, mutate.mutate(random, content, wrong)))
    return merge(["task0"], dtype=random.choice(["keep", "float32", "bfloat16"]))


def records(random: Random) -> Job:
    """dcmerge.json of a merged model, which ``compare`` follows."""
    inputs.put("base", "task0", "adapter0", "merged")
    content = json.loads(inputs.family()["merged/dcmerge.json"])
    content["tensors"] = content["tensors"][:1]  # not read: leaves the edits to what is
    wrong = (
        content["config"],
        content["options"],
        "dc_merge",
        "ties",
        "esm",
        ["base"],
        ["task0", "task0"],
        [1.0],
        [1.0, 2.0],
        "merged",
    )
    edited = mutate.mutate(random, content, wrong)
    if isinstance(edited, dict) and isinstance(edited.get("config"), dict) and random.random() < 0.5:
        edited["config"] = mutate.mutate(random, edited["config"], wrong)
    if isinstance(edited, dict) and isinstance(edited.get("options"), dict) and random.random() < 0.3:
        edited["options"] = mutate.mutate(random, edited["options"], wrong)
    inputs.write("merged/dcmerge.json", mutate.json_bytes(random, edited))
    match = random.choice([".*query.*", *mutate.CATASTROPHIC]) if random.random() < 0.1 else None
    return lambda: compare("merged", match=match)


def calibrations(random: Random) -> Job:
    """Calibration files of ESM."""
    inputs.put("base", "task", "grams")
    module = inputs.MODULES[0]
    names = [f"{module}.weight.mT", "embed_tokens.weight", "layers.0.norm.weight", "position_ids", "x", module]
    path = random.choice(["grams0.safetensors", "grams1.safetensors"])
    whole = inputs.family()[path]
    kind = random.random()
    if kind < 0.6:
        content = inputs.odd_tensors(random, inputs.grams(0), names)
    elif kind < 0.8:
        content = mutate.mutate_bytes(random, whole)
    else:
        header, data = inputs.safetensors_header(whole)
        content = inputs.safetensors_bytes(
            mutate.json_bytes(random, mutate.mutate(random, header, (*inputs.SIZES, *names))), data
        )
    inputs.write(path, content)
    variant = random.choice(["vit", "roberta"])
    return merge(
        ["task0", "task1"],
        method="esm",
        options={"activations": ["grams0.safetensors", "grams1.safetensors"], "variant": variant},
    )


def pickles(random: Random) -> Job:
    """Weights as pickles: damaged, hostile, or holding odd things."""
    inputs.put("base", "adapter0")
    form = random.choice(["task", "base", "adapter"])
    path = {
        "task": "task/pytorch_model.bin",
        "base": "base/pytorch_model.bin",
        "adapter": "adapter0/adapter_model.bin",
    }[form]
    Path("base" if form == "base" else "adapter0", inputs.MODEL if form == "base" else inputs.WEIGHTS).unlink()
    inputs.write(path, hostile_pickle(random, inputs.tuned(0)))
    if form == "base":
        inputs.put("task0")
    return merge(
        [{"task": "task", "base": "task0", "adapter": "adapter0"}[form]], extra=random.choice(["error", "ignore"])
    )


def side_files(random: Random) -> Job:
    """What lies beside the weights of the base: links, pipes, devices, directories, odd names."""
    inputs.put("base", "task0")
    inputs.write("outside/secret.txt", SECRET)
    inputs.write("outside/secret.json", json.dumps({"model_type": SECRET.decode()}).encode())
    for _ in range(random.choice([1, 1, 2, 3])):
        odd_side_file(random, Path(random.choice(["base", "base", "task0", "base/sub"])))
    return merge(["task0"], dtype=random.choice(["keep", "bfloat16"]))


@functools.cache
def _parser() -> Any:
    return build_parser()


def configurations(random: Random) -> Job:
    """YAML configurations: types, unknown keys, aliases, tags, patterns, paths."""
    inputs.put("base", "task", "adapter")
    if random.random() < 0.2:
        return _raw_configuration(random)
    Path("merge.yaml").write_bytes(_yaml(random))
    # the place of the output comes from the user, on the command line
    args = _parser().parse_args(["merge", "--config", "merge.yaml", "--out", OUT])
    return lambda: run(prepare(config_of(args))).out


def _raw_configuration(random: Random) -> Job:
    """A configuration from Python, ``out`` included."""
    values = mutate.mutate(random, _configuration(random))
    if not isinstance(values, Mapping):
        values = {"out": OUT}
    if isinstance(values.get("out"), str):
        values["out"] = random.choice(
            [OUT, "base", "base/out", "", "a\0b", "new/er/out", "~nobody-here/x", "x" * 300, "base/config.json", "/"]
        )
    return lambda: run(prepare(build_config(values))).out


def _configuration(random: Random) -> dict[str, Any]:
    values: dict[str, Any] = {
        "base": "base", "tasks": random.choice([["task0", "task1"], ["task0"], ["adapter0", "task0"]]), "out": OUT,
        "method": random.choice(_FULL), "scale": 1.0,
        "overrides": [
            {"match": "embed_tokens.weight", "action": "copy"},
            {"match": random.choice([r"layers\.0.*", *mutate.CATASTROPHIC]), "scale": 0.5, "options": {}},
            {"match": ".*1.*", "method": random.choice(_FULL)},
        ],
    }  # fmt: skip
    more: dict[str, Any] = {
        "weights": [1.0, 0.5], "options": {"keep": 0.5}, "device": "cpu", "dtype": "bfloat16", "save_as": "full", "shard_size": "64B",
        "adapter_rank": 1, "vocab": "base", "extra": "ignore", "lora_scale": "ignore", "overwrite": True,
    }  # fmt: skip
    for key in random.sample(list(more), random.choice([0, 1, 2])):
        values[key] = more[key]
    if random.random() < 0.3:
        values["method"], values["options"] = _options(random)
    return values


def _options(random: Random) -> tuple[str, dict[str, Any]]:
    """A method and odd values of its options."""
    name, cls = random.choice(list(list_methods().items()))
    known = [option.name for option in describe_options(cls)]
    chosen = random.sample(known, min(len(known), random.choice([1, 1, 2])))
    numbers = (
        1,
        2,
        3,
        0.5,
        1e-3,
        [1, 2],
        [1],
        0,
        1.0,
        "ties",
        "sum",
        "mean",
        "none",
        "fft",
        "linear",
        "fast",
        10,
        2**31,
    )
    return name, {option: mutate.value(random, numbers) for option in chosen}


_YAML = (
    "!!python/object/apply:os.system ['touch code_ran']", "!!python/name:os.system", "!!timestamp 2001-99-99", "2001-99-99",
    "!!timestamp x", "!!int x", "!!float x", "!!bool x", "!!binary x", "!!null x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!unknown x", "&a [*a]", "&a {b: *a}", "{<<: &a {<<: *a}}", "{<<: 5}", "*nowhere", "? [a, b]\n: c", "{[a]: b}", "=", "<<", "0o9", "0x", "0b",
    "1:60:90", "-.inf", ".NaN", "1e400", "9" * 5000, "1_0", "~", "yes", "2001-01-01", "2001-01-01T00:00:00+99:99", "'", '"\\ud800"', '"\\x00"',
    "|\n  text", "%TAG ! x", "---", "...", "\t", "[" * 2000, "{a: " * 2000, "- " * 2000, "&x " * 50 + "a", "[" + "*a, " * 100 + "]",
)  # fmt: skip


def _yaml(random: Random) -> bytes:
    if random.random() < 0.3:
        return json.dumps(_configuration(random)).encode()
    if random.random() < 0.5:
        return mutate.json_bytes(random, mutate.mutate(random, _configuration(random)))
    lines = [f"{key}: {json.dumps(entry)}" for key, entry in _configuration(random).items()]
    for _ in range(random.choice([1, 1, 2])):
        at = random.randrange(len(lines))
        key = lines[at].split(":")[0]
        lines[at] = f"{key}: {random.choice(_YAML)}"
    if random.random() < 0.1:
        levels = random.choice([3, 12, 40])
        sides = random.choice([("[", "]"), ("{<<: [", "]}")])
        lines[:0] = ["l0: &l0 {a: b}" if "<" in sides[0] else "l0: &l0 [lol]"] + [
            f"l{i}: &l{i} {sides[0]}{', '.join([f'*l{i - 1}'] * 9)}{sides[1]}" for i in range(1, levels)
        ]
        lines.append(f"{random.choice(['options', 'tasks', 'overrides', 'scale', 'x'])}: *l{levels - 1}")
    if random.random() < 0.2:
        random.shuffle(lines)
    data = "\n".join(lines).encode()
    return mutate.mutate_bytes(random, data) if random.random() < 0.3 else data


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        safetensors_headers, safetensors_bytes, tensors, indexes, pickles, adapter_configs, adapter_tensors, model_configs,
        side_files, configurations, records, calibrations,
    )
}  # fmt: skip

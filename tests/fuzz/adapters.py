"""Targets: PEFT adapters."""

from __future__ import annotations

import json
from random import Random

from safetensors.torch import load

from fuzz import inputs, mutate
from fuzz.jobs import LORA, Job, merge


def adapter_tensors(random: Random) -> Job:
    """Well-formed adapter files with odd names, dtypes, shapes and values."""
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


def _adapters(random: Random) -> Job:
    base = random.choice(["base", None])
    return merge(
        ["adapter0", "adapter1"],
        base,
        method=random.choice(LORA),
        save_as=random.choice([None, "adapter", "full"]) if base else None,
        adapter_rank=random.choice([None, None, None, 1, 3]) if base is None else None,
    )

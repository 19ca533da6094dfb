"""Targets: the weights, index and configuration of full models."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from fuzz import inputs, mutate
from fuzz.jobs import FULL, Job, merge


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
    return merge(["task0", "adapter0"], method=random.choice(FULL))


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
        method=random.choice(FULL),
        extra=random.choice(["error", "ignore"]),
        vocab=random.choice(["error", "base", "skip"]),
        dtype=random.choice(["keep", "keep", "float32", "bfloat16", "float16"]),
    )


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

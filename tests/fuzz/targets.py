"""What is fuzzed. A target writes one case into the working directory and returns what to run on it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from dcmerge_ext import compare
from fuzz import inputs, mutate
from fuzz.adapters import adapter_configs, adapter_tensors
from fuzz.configurations import configurations
from fuzz.jobs import SECRET, Job, Target, merge
from fuzz.models import indexes, model_configs, safetensors_bytes, safetensors_headers, tensors
from fuzz.pickles import hostile_pickle
from fuzz.side_files import odd_side_file


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


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        safetensors_headers, safetensors_bytes, tensors, indexes, pickles, adapter_configs, adapter_tensors, model_configs,
        side_files, configurations, records, calibrations,
    )
}  # fmt: skip

"""Target: configurations, as YAML files and from Python."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.checkpoints.run import prepare, run
from dcmerge_ext.cli.merge import config_of
from dcmerge_ext.cli.parser import build_parser
from dcmerge_ext.methods.registry import describe_options, list_methods
from fuzz import inputs, mutate
from fuzz.jobs import FULL, OUT, Job

_YAML = (
    "!!python/object/apply:os.system ['touch code_ran']", "!!python/name:os.system", "!!timestamp 2001-99-99", "2001-99-99",
    "!!timestamp x", "!!int x", "!!float x", "!!bool x", "!!binary x", "!!null x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!unknown x", "&a [*a]", "&a {b: *a}", "{<<: &a {<<: *a}}", "{<<: 5}", "*nowhere", "? [a, b]\n: c", "{[a]: b}", "=", "<<", "0o9", "0x", "0b",
    "1:60:90", "-.inf", ".NaN", "1e400", "9" * 5000, "1_0", "~", "yes", "2001-01-01", "2001-01-01T00:00:00+99:99", "'", '"\\ud800"', '"\\x00"',
    "|\n  text", "%TAG ! x", "---", "...", "\t", "[" * 2000, "{a: " * 2000, "- " * 2000, "&x " * 50 + "a", "[" + "*a, " * 100 + "]",
)  # fmt: skip


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
        "method": random.choice(FULL), "scale": 1.0,
        "overrides": [
            {"match": "embed_tokens.weight", "action": "copy"},
            {"match": random.choice([r"layers\.0.*", *mutate.CATASTROPHIC]), "scale": 0.5, "options": {}},
            {"match": ".*1.*", "method": random.choice(FULL)},
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


@functools.cache
def _parser() -> Any:
    return build_parser()

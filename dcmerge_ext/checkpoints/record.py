"""What a run leaves beside the weights: a machine-readable record, timings, and a short model card."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml

from dcmerge_ext.backends import backends
from dcmerge_ext.checkpoints.config import MergeConfig
from dcmerge_ext.checkpoints.execute import TensorResult, content_digest
from dcmerge_ext.checkpoints.output import RECORD_NAME
from dcmerge_ext.checkpoints.plan import Plan, TensorPlan
from dcmerge_ext.checkpoints.tasks import AdapterTask
from dcmerge_ext.version import __version__

TIMINGS_NAME = "dcmerge_timings.json"


@contextmanager
def gathered_warnings() -> Iterator[list[str]]:
    """What this package logs as a warning inside the block, each message once, for the record."""
    messages: list[str] = []

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()) not in messages:
                messages.append(message)

    package, handler = logging.getLogger("dcmerge_ext"), Gather(logging.WARNING)
    package.addHandler(handler)
    try:
        yield messages
    finally:
        package.removeHandler(handler)
        messages.sort()  # threads warn in any order


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"dcmerge_ext": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def make_record(
    plan: Plan, config: MergeConfig, device: torch.device, results: Sequence[TensorResult], warned: Sequence[str]
) -> dict[str, Any]:
    """The record of a run, with what it ``warned`` of. Holds no times: runs on the same inputs compare equal."""
    tensors = {t.name: t for t in plan.tensors}
    method = plan.method
    return {
        "versions": versions(),
        "backends": {name: text.split(":", 1)[0] for name, text in backends().items()},
        "device": device.type,
        "method": method.name,
        "paper": method.paper,
        "options": msgspec.to_builtins(method),
        "scale": plan.scale,
        "weights": list(plan.weights),
        "config": config.settings(),
        "base": None if config.base is None else {"path": config.base, "content": content_digest(results, 0)},
        "tasks": [
            {
                "path": path,
                "kind": "adapter" if isinstance(task, AdapterTask) else "full",
                "content": content_digest(results, i),
            }
            for i, (path, task) in enumerate(zip(config.tasks, plan.tasks, strict=True), 1)
        ],
        "content_is": "xxh3-128 over the xxh3-128 of each tensor's stored bytes, for the tensors read, in the order of `tensors`",
        "tensors": [
            {
                "name": r.name,
                "shape": list(tensors[r.name].base.shape),
                "dtype": str(tensors[r.name].out_dtype).removeprefix("torch."),
                "action": r.action,
                **({"reason": tensors[r.name].reason} if tensors[r.name].reason else {}),
                **(
                    {}
                    if r.action == "copy"
                    else {"scale": tensors[r.name].scale, **_method_of(plan, tensors[r.name]), **r.facts}
                ),
            }
            for r in results
        ],
        "rounding": rounding(plan, results),
        "warnings": [*plan.notes, *warned, *rounding_warnings(plan, results)],
    }


def rounding(plan: Plan, results: Sequence[TensorResult]) -> dict[str, Any]:
    """What half-precision storage costs: the part of the change lost, and how near each task's update is to the
    rounding floor of its own storage."""
    stored = [r for r in results if "change_norm" in r.facts]
    if not stored:
        return {}
    total = {
        key: sqrt(sum(r.facts[key][0] ** 2 for r in stored)) for key in ("rounding_norm", "change_norm", "base_norm")
    }
    tensors = {t.name: t for t in plan.tensors}
    floor = sqrt(sum((_floor(tensors[r.name].base.dtype) * r.facts["base_norm"][0]) ** 2 for r in stored))
    updates = [sqrt(sum(r.facts["update_norms"][i] ** 2 for r in stored)) for i in range(plan.num_tasks)]
    return {
        "fraction_of_change_lost": total["rounding_norm"] / total["change_norm"] if total["change_norm"] else 0.0,
        "update_over_rounding_floor": [u / floor if floor else None for u in updates],
    }


def rounding_warnings(plan: Plan, results: Sequence[TensorResult]) -> list[str]:
    facts = rounding(plan, results)
    if not facts:
        return []
    warnings = []
    if facts["fraction_of_change_lost"] > 0.1:
        warnings.append(
            f"{facts['fraction_of_change_lost']:.0%} of the merged change is lost to rounding in half precision; "
            "pass --dtype float32 to keep it"
        )
    for task, ratio in zip(plan.tasks, facts["update_over_rounding_floor"], strict=True):
        if ratio is not None and 0 < ratio < 2:
            warnings.append(
                f"{task.label}: its update is only {ratio:.1f} times the rounding floor of its half-precision storage; "
                "much of it is noise"
            )
    return warnings


def _floor(dtype: torch.dtype) -> float:
    """Root mean square of relative rounding errors: uniform within half a unit in the last place, mean over a binade."""
    return 0.0 if dtype.itemsize >= 4 else float(torch.finfo(dtype).eps) * 0.2


def _method_of(plan: Plan, tensor: TensorPlan) -> dict[str, Any]:
    method = tensor.method
    return {} if method is None or method == plan.method else {"method": method.name}


def write_record(
    directory: Path, record: dict[str, Any], results: Sequence[TensorResult], seconds: float, peak_bytes: int
) -> None:
    (directory / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")
    timings = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "peak_bytes": peak_bytes,
        "threads": torch.get_num_threads(),
        "tensors": {r.name: round(r.seconds, 6) for r in results},
    }
    (directory / TIMINGS_NAME).write_text(json.dumps(timings, indent=1) + "\n")
    (directory / "README.md").write_text(model_card(record))


def model_card(record: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read."""
    config = record["config"]
    options = {k: v for k, v in record["options"].items() if v is not None}
    weighted = zip(record["tasks"], record["weights"], strict=True)
    tasks = "\n".join(f"| {task['path']} | {task['kind']} | {weight:g} |" for task, weight in weighted)
    kind = "adapter" if config["save_as"] == "adapter" else "model"
    return f"""---
library_name: {"peft" if kind == "adapter" else "transformers"}
tags:
- merge
- dcmerge
---
# Merged {kind}

Made without training by `{record["method"]}` ({record["paper"]}) at scale {record["scale"]:g},
with dcmerge_ext {record["versions"]["dcmerge_ext"]}.

Base: {config["base"] or "none needed: the adapters were merged among themselves"}

| task | kind | weight |
|---|---|---|
{tasks}

Options: {", ".join(f"{k}={v}" for k, v in options.items()) or "none"}. Per-tensor facts are in `{RECORD_NAME}`.

{_reproduce(record)}
"""


def _reproduce(record: dict[str, Any]) -> str:
    """The command that made the output, and the configuration file it needs for overrides."""
    config = record["config"]
    command = ["dcmerge", "merge"]
    text = ""
    if config["overrides"]:
        command += ["--config", "overrides.yaml"]
        overrides = yaml.safe_dump({"overrides": config["overrides"]}, sort_keys=False)
        text = f"With this as `overrides.yaml`:\n\n```yaml\n{overrides}```\n\n"
    if config["base"]:
        command += ["--base", config["base"]]
    for task, weight in zip(config["tasks"], record["weights"], strict=True):
        command += ["--task", task if config["weights"] is None else f"{task}={weight!r}"]
    command += ["--method", record["method"], "--scale", repr(record["scale"])]
    for key, value in config["options"].items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    defaults = msgspec.to_builtins(MergeConfig(tasks=config["tasks"], out=config["out"]))
    for key in ("device", "dtype", "save_as", "adapter_rank", "shard_size", "vocab", "extra", "lora_scale"):
        if config[key] != defaults[key]:
            command += [f"--{key.replace('_', '-')}", str(config[key])]
    return f"{text}    {shlex.join([*command, '--out', config['out']])}"

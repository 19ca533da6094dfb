"""What a target returns: the package at work on the case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.checkpoints.run import prepare, run
from dcmerge_ext.comparison.result import Comparison

OUT = "out"
SECRET = b"nobody's business"
"""Content of files outside the inputs: must not turn up in an output."""
Job = Callable[[], "Path | Comparison"]
"""Runs the package on a case: the directory it wrote, or a comparison."""
Target = Callable[[Random], Job]

FULL = (
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
LORA = (*FULL, "knots", "core_space", "robust_merge")


def merge(tasks: list[str], base: str | None = "base", **settings: Any) -> Job:
    values = {"base": base, "tasks": tasks, "out": OUT, **settings}
    return lambda: run(prepare(build_config(values))).out

"""What a plan will cost: bytes, time and peak memory, from headers and a fraction of a second of calibration."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod

import torch

from dcmerge_ext.checkpoints.plan import PANEL_ELEMENTS, Plan, TensorPlan, survey_dtype

_CALIBRATION_SIDE = 1024
_FIXED_BYTES = 64 << 20
"""Interpreter, headers and libraries beyond a bare torch process."""


@dataclass(frozen=True)
class Estimate:
    """Rough: within a factor of two or three where the machine is quiet."""

    read_bytes: int
    written_bytes: int
    seconds: float
    peak_bytes: int
    """Anonymous memory above a bare torch process; mapped input files are not counted."""


def estimate(plan: Plan, written_bytes: int) -> Estimate:
    """Estimate a plan; runs a short calibration of this machine."""
    product_rate, copy_rate = _calibrate()
    read = sum(_read_bytes(plan, tensor) for tensor in plan.tensors)
    flops = sum(
        t.method.flops(t.specs, plan.num_tasks) for t in plan.tensors if t.action == "merge" and t.method is not None
    )
    seconds = flops / product_rate + (read + written_bytes) / copy_rate
    peak = max((peak_bytes(plan, tensor) for tensor in plan.tensors), default=0)
    return Estimate(read, written_bytes, seconds, peak + _FIXED_BYTES)


def _read_bytes(plan: Plan, tensor: TensorPlan) -> int:
    passes = 1
    if tensor.action == "merge" and tensor.method is not None and tensor.method.scope == "model":
        passes += tensor.method.num_surveys(survey_dtype([tensor]))
    if tensor.action == "copy":
        return tensor.base.nbytes
    side = tensor.base.shape[0] + prod(tensor.base.shape[1:]) if tensor.base.shape else 1
    tasks = sum(tensor.base.numel if spec.rank is None else spec.rank * side for spec in tensor.specs)
    return passes * (tensor.base.nbytes + tasks * tensor.base.dtype.itemsize)


def peak_bytes(plan: Plan, tensor: TensorPlan) -> int:
    """Anonymous memory held while one tensor is merged."""
    if tensor.action == "copy" or tensor.method is None:
        return 0
    itemsize = survey_dtype([tensor]).itemsize
    if tensor.panelled:
        return min(PANEL_ELEMENTS, tensor.base.numel) * (plan.num_tasks + 4) * itemsize
    specs = tensor.specs
    if tensor.matrix_shape is not None:
        specs = tuple(spec._replace(shape=tensor.matrix_shape) for spec in specs)
    return tensor.method.workspace(specs, plan.num_tasks) * itemsize + 2 * tensor.base.nbytes


def _calibrate() -> tuple[float, float]:
    """Flop rate of a float32 matrix product and rate of reading plus adding, per second."""
    matrix = torch.ones(_CALIBRATION_SIDE, _CALIBRATION_SIDE)
    matrix @ matrix
    started = time.perf_counter()
    matrix @ matrix
    product_rate = 2.0 * _CALIBRATION_SIDE**3 / (time.perf_counter() - started)
    block = torch.ones(8 << 20)
    started = time.perf_counter()
    block.add_(block.clone())
    copy_rate = 3 * block.numel() * 4 / (time.perf_counter() - started)
    return product_rate, copy_rate / 2

"""The output of a merge, read again: is it what was written, and does the library it is for take it?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from dcmerge_ext.checkpoints.files import SafetensorsFile
from dcmerge_ext.checkpoints.libraries import check_peft, check_transformers
from dcmerge_ext.checkpoints.plan import PANEL_ELEMENTS
from dcmerge_ext.checkpoints.safetensors_writer import raw_bytes
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.checkpoints.weight_files import Layout
from dcmerge_ext.errors import InputError, RunError
from dcmerge_ext.updates import count_nonfinite

logger = logging.getLogger(__name__)


def verify_output(
    out: Path, layout: Layout, digests: Mapping[str, str], *, adapter: bool, as_given: Iterable[str] = ()
) -> None:
    """Check every tensor of the weight files, and that transformers (or PEFT: ``adapter``) take the directory.

    Args:
        digests: xxh3-128 of the bytes written, by tensor.   as_given: tensors that may hold NaN or Inf, as the base does.
    Raises:
        RunError: a file or tensor is not what was written, naming it.
    """
    lenient = set(as_given)
    for name, specs in layout.items():
        file = _open(out / name)
        if missing := sorted(specs.keys() ^ file.specs.keys()):
            raise RunError(f"{file.label}: tensor {missing[0]!r} is missing or unknown there; merge again")
        for tensor, spec in specs.items():
            _check(file, tensor, spec, digests[tensor], finite=tensor not in lenient)
    specs = {name: spec for group in layout.values() for name, spec in group.items()}
    (check_peft if adapter else check_transformers)(out, specs)
    logger.info("%s: verified %d tensors", out, len(specs))


def _open(path: Path) -> SafetensorsFile:
    try:
        return SafetensorsFile(path)
    except InputError as error:
        raise RunError(f"{error}: the output does not verify; merge again") from error


def _check(file: SafetensorsFile, name: str, spec: TensorSpec, digest: str, *, finite: bool) -> None:
    found = file.specs[name]
    if found != spec:
        raise RunError(f"{file.label}: tensor {name!r} is {found.text} and was written as {spec.text}; merge again")
    read = xxhash.xxh3_128()
    rows = max(1, PANEL_ELEMENTS * (spec.shape[0] if spec.shape else 1) // max(1, spec.numel))
    whole = not spec.shape or spec.numel <= PANEL_ELEMENTS
    for panel in [None] if whole else [slice(i, min(i + rows, spec.shape[0])) for i in range(0, spec.shape[0], rows)]:
        values = file.read(name, panel)
        read.update(raw_bytes(values))
        if finite and spec.dtype.is_floating_point and (bad := count_nonfinite(values)):
            raise RunError(f"{file.label}: tensor {name!r} holds {bad} NaN or Inf values; merge again")
    if read.hexdigest() != digest:
        raise RunError(
            f"{file.label}: tensor {name!r} does not hold the bytes that were written; check the disk and merge again"
        )

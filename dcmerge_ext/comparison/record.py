"""What a comparison takes from the record of a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dcmerge_ext.checkpoints.config import MergeConfig
from dcmerge_ext.checkpoints.files import read_json
from dcmerge_ext.checkpoints.output import RECORD_NAME
from dcmerge_ext.errors import InputError


class Record(msgspec.Struct, frozen=True):
    """Part of ``dcmerge.json``; all None where the merged checkpoint has none."""

    config: MergeConfig | None = None
    method: str | None = None
    options: dict[str, Any] = {}
    scale: float | None = None
    weights: list[float] | None = None


def read_record(merged: Path) -> Record:
    """The record beside a merged checkpoint.

    Raises:
        InputError: it is damaged.
    """
    path = merged / RECORD_NAME
    if not path.is_file():
        return Record()
    try:
        record = msgspec.convert(read_json(path), Record)
        msgspec.json.encode(record.options)  # they go into the comparison as they are
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not the record of a merge ({error}); give the inputs of a copy without it"
        ) from error
    return record

"""The events of a profile in Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from dcmerge_ext.checkpoints.output import new_file
from dcmerge_ext.stages import Event


def save_trace(events: Sequence[Event], path: str | Path, *, overwrite: bool = False) -> None:
    """Write the trace.

    Raises:
        InputError: the file exists, or its place cannot be written.   RunError: writing failed.
    """
    with new_file(path, overwrite) as partial:
        partial.write_bytes(msgspec.json.encode(trace(events)))


def trace(events: Sequence[Event]) -> dict[str, Any]:
    """One track per thread, in the order in which they began; times in microseconds from the first event."""
    ordered = sorted(events, key=lambda event: (event.started, -event.duration))
    threads = {name: i for i, name in enumerate(dict.fromkeys(event.thread for event in ordered))}
    origin = ordered[0].started if ordered else 0
    names: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": name}} for name, i in threads.items()
    ]
    ranges = [
        {
            "ph": "X",
            "name": event.stage,
            "cat": "stage",
            "pid": 0,
            "tid": threads[event.thread],
            "ts": (event.started - origin) / 1e3,
            "dur": event.duration / 1e3,
            "args": {"tensor": event.tensor, "flops": event.work.flops, "bytes": event.work.bytes},
        }
        for event in ordered
    ]
    return {"traceEvents": names + ranges, "displayTimeUnit": "ms"}

"""Where the time of a merge goes: rates (the machine's) -> run (a merge, watched) -> result (JSON), trace, picture."""

from __future__ import annotations

from dcmerge_ext.profiling.result import Profile
from dcmerge_ext.profiling.run import profile

__all__ = ["Profile", "profile"]

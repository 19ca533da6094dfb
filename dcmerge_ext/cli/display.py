"""Consoles and tables. Paths, tensor names and messages are printed as they are: no markup, nothing cut short."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dcmerge_ext.distributed import is_first


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Quiet in every process but the first."""
    return Console(
        stderr=stderr, quiet=quiet or not is_first(), soft_wrap=True, markup=False, emoji=False, highlight=False
    )


def make_table(*headers: str) -> Table:
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    return table

"""Consoles and tables. Paths, tensor names and messages are printed as they are: no markup, nothing cut short."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    return Console(stderr=stderr, quiet=quiet, soft_wrap=True, markup=False, emoji=False, highlight=False)


def make_table(*headers: str) -> Table:
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    return table

"""``python -m dcmerge_ext``: the command line."""

from dcmerge_ext.cli import entry

entry()

"""Merging methods: each a file, a class of options in the register, and a function of updates and options."""

from dcmerge_ext.methods.averaging import averaging
from dcmerge_ext.methods.base import Context, Method, Preset
from dcmerge_ext.methods.dc_merge import dc_merge
from dcmerge_ext.methods.registry import create, describe_options, list_methods, register
from dcmerge_ext.methods.task_arithmetic import task_arithmetic
from dcmerge_ext.methods.ties import ties

__all__ = [
    "Context",
    "Method",
    "Preset",
    "averaging",
    "create",
    "dc_merge",
    "describe_options",
    "list_methods",
    "register",
    "task_arithmetic",
    "ties",
]

"""Merging methods: each a file, a class of options in the register, and a function of updates and options."""

from dcmerge_ext.methods.averaging import averaging
from dcmerge_ext.methods.base import Context, Method, Preset
from dcmerge_ext.methods.consensus import consensus
from dcmerge_ext.methods.core_space import core_space
from dcmerge_ext.methods.dare import dare
from dcmerge_ext.methods.dc_merge import dc_merge
from dcmerge_ext.methods.doge import doge
from dcmerge_ext.methods.esm import esm
from dcmerge_ext.methods.iso_c import iso_c
from dcmerge_ext.methods.iso_cts import iso_cts
from dcmerge_ext.methods.knots import knots
from dcmerge_ext.methods.pcb import pcb
from dcmerge_ext.methods.registry import create, describe_options, list_methods, register
from dcmerge_ext.methods.robust_merge import robust_merge
from dcmerge_ext.methods.score import score
from dcmerge_ext.methods.task_arithmetic import task_arithmetic
from dcmerge_ext.methods.ties import ties
from dcmerge_ext.methods.tsv_m import tsv_m
from dcmerge_ext.methods.wudi import wudi

__all__ = [
    "Context",
    "Method",
    "Preset",
    "averaging",
    "consensus",
    "core_space",
    "create",
    "dare",
    "dc_merge",
    "describe_options",
    "doge",
    "esm",
    "iso_c",
    "iso_cts",
    "knots",
    "list_methods",
    "pcb",
    "register",
    "robust_merge",
    "score",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
]

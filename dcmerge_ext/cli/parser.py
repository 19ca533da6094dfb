"""Arguments of every subcommand."""

from __future__ import annotations

import argparse

from dcmerge_ext.cli import calibrate, commands, compare, merge, profile, sweep
from dcmerge_ext.version import __version__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcmerge", description="Merge fine-tuned models and LoRA adapters of one base, without training."
    )
    parser.add_argument("--version", action="version", version=f"dcmerge {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    noise = common.add_mutually_exclusive_group()
    noise.add_argument("-q", "--quiet", action="store_true", help="errors only")
    noise.add_argument("-v", "--verbose", action="store_true", help="more detail")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    merging = subcommands.add_parser("merge", parents=[common], help="merge checkpoints into one")
    _merge_arguments(merging)
    merging.add_argument(
        "--resume", action="store_true", default=None, help="continue the same merge where it was stopped, if it was"
    )
    merging.add_argument("--verify", action="store_true", default=None, help="read the output again and check it")
    merging.add_argument("--dry-run", action="store_true", help="plan and check only, as `dcmerge plan`")
    merging.set_defaults(run=merge.run_merge)

    plan = subcommands.add_parser("plan", parents=[common], help="check a merge from headers; estimate time and memory")
    _merge_arguments(plan)
    plan.set_defaults(run=merge.run_plan)

    profiling = subcommands.add_parser(
        "profile", parents=[common], help="where the time of a merge goes, by stage and tensor; the output is deleted"
    )
    _merge_arguments(profiling)
    profile.add_arguments(profiling)
    profiling.set_defaults(run=profile.run)

    sweeping = subcommands.add_parser(
        "sweep", parents=[common], help="merge once, evaluate a grid of scales with your function, keep the best"
    )
    _merge_arguments(sweeping)
    sweep.add_arguments(sweeping)
    sweeping.set_defaults(run=sweep.run)

    calibrating = subcommands.add_parser(
        "calibrate", parents=[common], help="run a model on a few samples, for the methods that need activations (esm)"
    )
    calibrate.add_arguments(calibrating)
    calibrating.set_defaults(run=calibrate.run)

    comparing = subcommands.add_parser(
        "compare", parents=[common], help="which layers of a merged checkpoint lost which task: a report"
    )
    compare.add_arguments(comparing)
    comparing.set_defaults(run=compare.run)

    info = subcommands.add_parser("info", parents=[common], help="versions, and which backends exist here or why not")
    info.set_defaults(run=commands.run_info)

    methods = subcommands.add_parser("methods", parents=[common], help="list methods, or describe one with its options")
    methods.add_argument("name", nargs="?", metavar="NAME")
    methods.set_defaults(run=commands.run_methods)

    demo = subcommands.add_parser(
        "demo", parents=[common], help="see what merging is for, on real digits (1-3 minutes)"
    )
    demo.add_argument("--out", default="dcmerge_demo", metavar="DIR", help="where to put models, table and picture")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="a few training steps only: checks that everything runs")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    demo.set_defaults(run=commands.run_demo)
    return parser


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--base",
        metavar="DIR",
        help="the model all tasks were fine-tuned from (not needed to merge adapters into an adapter)",
    )
    inputs.add_argument(
        "--task",
        action="append",
        dest="tasks",
        metavar="DIR[=WEIGHT]",
        help="a full fine-tuned model or a PEFT LoRA adapter; repeat for each task",
    )
    inputs.add_argument("--config", metavar="YAML", help="read the merge from a file; options given here win")
    inputs.add_argument("--vocab", choices=["error", "base", "skip"], help="embeddings with another vocabulary")
    inputs.add_argument("--extra", choices=["error", "ignore"], help="tensors that the base does not have")
    inputs.add_argument("--lora-scale", choices=["apply", "ignore"], help="lora_alpha / r of adapters")
    method = parser.add_argument_group("method")
    method.add_argument("--method", metavar="NAME", help="default dc_merge; see `dcmerge methods`")
    method.add_argument("--scale", type=float, metavar="S", help="coefficient of the merged update; default by method")
    method.add_argument(
        "--set", action="append", dest="settings", metavar="KEY=VALUE", help="an option of the method; repeatable"
    )
    method.add_argument("--seed", type=int, metavar="N", help="the same as --set seed=N")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR")
    output.add_argument("--save-as", choices=["full", "adapter"], help="default: full with a base, adapter without")
    output.add_argument("--adapter-rank", type=int, metavar="R", help="truncate the merged adapter to rank R")
    output.add_argument("--dtype", choices=["keep", "float32", "bfloat16", "float16"], help="of floating tensors")
    output.add_argument("--shard-size", metavar="SIZE", help="largest output file, default 5GB")
    output.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="bound on the memory of the process, such as 8GB (mapped input files not counted)",
    )
    output.add_argument("--overwrite", action="store_true", default=None, help="replace the output of an earlier merge")
    output.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to compute, default auto")

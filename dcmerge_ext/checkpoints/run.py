"""The main job: checkpoints in, one merged checkpoint or adapter out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from dcmerge_ext.backends import for_device
from dcmerge_ext.checkpoints.adapter import Adapter, is_adapter
from dcmerge_ext.checkpoints.adapter_output import AdapterOutput
from dcmerge_ext.checkpoints.config import MergeConfig, build_config
from dcmerge_ext.checkpoints.execute import Executor, TensorResult
from dcmerge_ext.checkpoints.files import unreadable
from dcmerge_ext.checkpoints.fingerprint import fingerprint, refuse_changes, refuse_differences
from dcmerge_ext.checkpoints.journal import Earlier, Entry, has_finished, read_journals
from dcmerge_ext.checkpoints.locate import locate
from dcmerge_ext.checkpoints.memory import MemoryBudget, watched_memory
from dcmerge_ext.checkpoints.model import ModelFiles
from dcmerge_ext.checkpoints.model_output import copy_side_files, output_specs, shard_layout, side_files, write_model
from dcmerge_ext.checkpoints.output import Existing, check_output, check_shared, check_space, partial_of, work_directory
from dcmerge_ext.checkpoints.plan import Plan, make_plan
from dcmerge_ext.checkpoints.record import make_record, rounding_warnings, write_record
from dcmerge_ext.checkpoints.source import TensorSource
from dcmerge_ext.checkpoints.tasks import AdapterTask, FullTask, Task
from dcmerge_ext.checkpoints.verify import verify_output
from dcmerge_ext.checkpoints.virtual_base import VirtualBase
from dcmerge_ext.checkpoints.weight_files import Layout
from dcmerge_ext.checkpoints.work import Work
from dcmerge_ext.distributed import Processes
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.methods.registry import list_methods, preset_of

logger = logging.getLogger(__name__)

METADATA_BYTES = 16 << 20
"""Room for headers, configuration, tokenizer and record when free space is checked."""


@dataclass(frozen=True)
class Prepared:
    """A merge that has passed every check headers allow."""

    config: MergeConfig
    plan: Plan
    save_as: str
    adapter: AdapterOutput | None
    base_path: Path | None

    @classmethod
    def of(cls, config: MergeConfig, plan: Plan, save_as: str, base_path: Path | None) -> Prepared:
        adapter = AdapterOutput(plan, config.adapter_rank) if save_as == "adapter" else None
        return cls(config, plan, save_as, adapter, base_path)

    @property
    def layout(self) -> Layout:
        """The weight files of the output."""
        if self.adapter is not None:
            return self.adapter.layout()
        return shard_layout(output_specs(self.plan), self.config.shard_bytes)

    @property
    def output_bytes(self) -> int:
        return sum(spec.nbytes for specs in self.layout.values() for spec in specs.values())


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. ``record`` is the content of ``dcmerge.json``."""

    out: Path
    seconds: float
    peak_bytes: int
    """Largest anonymous memory of the process meanwhile, looked at twenty times a second; 0 where the system does not tell."""
    record: dict[str, Any] = field(repr=False)

    @property
    def warnings(self) -> list[str]:
        return list(self.record["warnings"])


def prepare(config: MergeConfig) -> Prepared:
    """Open every input (headers only), plan, and check the output place. Writes nothing.

    Raises:
        InputError: any problem that headers or options show.
    """
    try:
        return _prepare(config)
    except OSError as error:
        raise unreadable(Path(error.filename or config.out), error) from error


def _prepare(config: MergeConfig) -> Prepared:
    for_device(compute_device(config.device))  # a forced backend that cannot run there is an error now, not half way
    paths = [locate(task) for task in config.tasks]
    base_path = None if config.base is None else locate(config.base)
    inputs = [*paths, *([base_path] if base_path else [])]
    check_output(Path(config.out).expanduser(), inputs, config.overwrite, config.resume)
    base, tasks = open_inputs(paths, base_path, lora_scale_of(config), save_as=config.save_as)
    plan = make_plan(base, tasks, config, with_base=base_path is not None)
    MemoryBudget(config.memory_bytes).check(plan)
    save_as = config.save_as or ("adapter" if base_path is None else "full")
    if save_as == "full" and config.adapter_rank is not None:
        raise OptionError("adapter_rank belongs to --save-as adapter")
    if save_as == "full" and base_path is not None:
        side_files(base_path)  # what is wrong with them is an error now
    return Prepared.of(config, plan, save_as, base_path)


def open_inputs(
    paths: Sequence[Path], base_path: Path | None, lora_scale: Any, *, save_as: str | None = None
) -> tuple[TensorSource, list[Task]]:
    """The base, or what stands for it where there are adapters alone, and the tasks against it. Reads headers.

    Raises:
        InputError: files that are missing or cannot be read, or a full model that has no base.
    """
    adapters = {path: Adapter(path, lora_scale=lora_scale) for path in dict.fromkeys(paths) if is_adapter(path)}
    _check_bases([adapters[path] for path in paths if path in adapters])
    if base_path is None:
        full = next((path for path in paths if path not in adapters), None)
        if full is not None or save_as == "full":
            why = f"{full} is a full model" if full is not None else "--save-as full writes a whole model"
            raise InputError(f"--base is missing: {why}; only adapters merge into an adapter without it")
        base: TensorSource = VirtualBase([adapters[path] for path in paths])
    else:
        if is_adapter(base_path):
            raise InputError(f"{base_path}: is an adapter; --base needs the model the tasks were fine-tuned from")
        base = ModelFiles(base_path)
    return base, [
        AdapterTask(adapters[path], base) if path in adapters else FullTask(ModelFiles(path), base) for path in paths
    ]


def run(
    prepared: Prepared, advance: Callable[[int], None] = lambda _: None, processes: Processes | None = None
) -> MergeReport:
    """Carry out a prepared merge.

    Args:
        advance: told bytes worked through, :func:`~dcmerge_ext.checkpoints.execute.work_bytes` in total.
        processes: this one and others that have prepared the same merge (:func:`dcmerge_ext.distributed.joined`).
    Raises:
        InputError: data that headers could not show (NaN); nothing is left.   RunError: writing failed, and what is
            finished stays for ``resume``; or the output is not what was written (``verify``).
    """
    processes = processes or Processes()
    config, out = prepared.config, Path(prepared.config.out).expanduser()
    started = time.perf_counter()
    device = compute_device(config.device, processes)
    described = processes.gather(fingerprint(config, prepared.plan, device))
    refuse_differences(described)
    told = _of_all(advance, processes)
    executor = Executor(prepared.plan, device, told, processes, config.memory_bytes)
    # The first process makes the directory and takes it away; a failure of any one reaches it inside the block.
    with ExitStack() as stack:
        peak = stack.enter_context(watched_memory())
        finished: dict[str, Entry] = {}
        if processes.first:
            check_space(out, prepared.output_bytes + METADATA_BYTES)
            earlier = _earlier(config, out, described[0])
            finished = earlier.entries if earlier else {}
            existing: Existing = "continue" if earlier else "replace" if config.overwrite or config.resume else "refuse"
            stack.enter_context(work_directory(out, existing, has_finished))
        check_shared(partial_of(out), processes)
        work = Work(partial_of(out), described[0], processes.gather(finished)[0], told, processes)
        results = write_output(prepared, executor, work)
        directory = work.directory if processes.first else None
        report = finish(prepared, device, directory, results, started, work.warnings, peak())
    if processes.first:
        for warning in rounding_warnings(prepared.plan, results):
            logger.warning("%s", warning)
    if processes.first and config.verify:
        copied = [t.name for t in prepared.plan.tensors if t.action == "copy"]
        verify_output(out, prepared.layout, work.digests, adapter=prepared.adapter is not None, as_given=copied)
    return report


def _of_all(advance: Callable[[int], None], processes: Processes) -> Callable[[int], None]:
    """``advance`` as if the other processes had come as far as this one."""
    return lambda nbytes: advance(nbytes * processes.size)


def _earlier(config: MergeConfig, out: Path, described: Mapping[str, Any]) -> Earlier | None:
    """What an earlier run finished, where this one is to continue it.

    Raises:
        InputError: it was another run.
    """
    if not config.resume:
        return None
    partial = partial_of(out)
    earlier = read_journals(partial)
    if earlier is None:
        logger.info("%s: nothing to continue; the merge starts from the beginning", partial)
        return None
    refuse_changes(earlier.run, described, partial)
    logger.info("%s: %d tensors are finished", partial, len(earlier.entries))
    return earlier


def write_output(prepared: Prepared, executor: Executor, work: Work) -> list[TensorResult]:
    """The merged model or adapter, complete but for the record. Returns what happened to each tensor."""
    if prepared.adapter is not None:
        return prepared.adapter.write(executor, work)
    results = write_model(executor, prepared.layout, work)
    if not work.processes.first:
        return results
    assert prepared.base_path is not None
    dtype = prepared.config.dtype
    copy_side_files(prepared.base_path, work.directory, None if dtype == "keep" else getattr(torch, dtype))
    return results


def finish(
    prepared: Prepared,
    device: torch.device,
    directory: Path | None,
    results: Sequence[TensorResult],
    started: float,
    warned: Sequence[str],
    peak_bytes: int,
    facts: Mapping[str, Any] = {},
) -> MergeReport:
    """Write the record, with what the methods ``warned`` of and further ``facts``, beside the weights.

    ``directory``: None where another process writes it.   ``started``: of ``time.perf_counter``.
    """
    config = msgspec.structs.replace(prepared.config, save_as=prepared.save_as)
    record = {**make_record(prepared.plan, config, device, results, warned), **facts}
    seconds = time.perf_counter() - started
    if directory is not None:
        write_record(directory, record, results, seconds, peak_bytes)
    return MergeReport(Path(config.out).expanduser(), seconds, peak_bytes, record)


def merge_checkpoints(
    base: str | Path | None,
    tasks: Sequence[str | Path],
    out: str | Path,
    method: str = "dc_merge",
    scale: float | None = None,
    *,
    weights: Sequence[float] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    device: str = "auto",
    dtype: str = "keep",
    save_as: str | None = None,
    adapter_rank: int | None = None,
    shard_size: str | int = "5GB",
    max_memory: str | int | None = None,
    vocab: str = "error",
    extra: str = "error",
    lora_scale: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    **options: Any,
) -> MergeReport:
    """Merge checkpoints on disk into one, with the memory of a few tensors.

    Args:
        base: the model all tasks were fine-tuned from: a Hugging Face directory (single or sharded safetensors, or
            ``.bin``), a weight file, or a Hub id. None when only adapters are merged into an adapter.
        tasks: full fine-tuned models and PEFT LoRA adapter directories, freely mixed.
        out: output directory; must not exist (see ``overwrite``). Nothing stands there until the merge is complete.
        method: a name from :func:`dcmerge_ext.list_methods`.
        scale: coefficient of the merged update; None is the method's default.
        weights: one factor per task, default 1.
        overrides: per-tensor exceptions, each a mapping with ``match`` (a regular expression for the whole name) and
            ``action`` ("copy", "mean", "merge"), ``method``, ``scale`` or ``options``; the first match wins. Another
            method than the main one takes its own default scale unless the override gives one.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        dtype: of the output's floating tensors: "keep", "float32", "bfloat16" or "float16".
        save_as: "full" or "adapter"; None is "full" with a base and "adapter" without.
        adapter_rank: truncate the merged adapter to this rank.
        shard_size: of the output's files, such as "5GB".
        max_memory: bound on the anonymous memory of this process, such as "8GB", what it holds already included; mapped
            input files are not counted. Has no influence on the result. None: no bound.
        vocab: embeddings whose vocabulary differs from the base's: "error", "base" (keep the base's tensor) or "skip"
            (leave that task out of the tensor).
        extra: tensors that the base does not have: "error" or "ignore".
        lora_scale: "apply" lora_alpha / r, or "ignore" it as some published code does; None is the preset's, or "apply".
        overwrite: replace the output of an earlier merge.
        resume: continue a run of these very inputs and options that was stopped; starts one where there is none.
        verify: read the output again at the end: shapes, dtypes, finite values, digests of what was written, and whether
            transformers or PEFT, where installed, take it.
        options: of the method.
    Returns:
        MergeReport with the record that is also written to ``dcmerge.json``.
    Raises:
        InputError: wrong inputs or options, naming file and tensor; nothing was written.   RunError: writing failed, or
            the output does not verify.
    """
    values = config_values(
        "merge_checkpoints",
        base=base,
        tasks=tasks,
        out=out,
        method=method,
        scale=scale,
        weights=weights,
        overrides=overrides,
        device=device,
        dtype=dtype,
        save_as=save_as,
        adapter_rank=adapter_rank,
        shard_size=shard_size,
        max_memory=max_memory,
        vocab=vocab,
        extra=extra,
        lora_scale=lora_scale,
        overwrite=overwrite,
        resume=resume,
        verify=verify,
        **options,
    )
    prepared = prepare(build_config(values, "merge_checkpoints"))
    for note in prepared.plan.notes:
        logger.warning("%s", note)
    return run(prepared)


def config_values(
    caller: str,
    *,
    base: str | Path | None,
    tasks: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Arguments of :func:`merge_checkpoints` as the keys of a configuration; those it does not know are the method's."""
    if isinstance(tasks, (str, Path)):
        raise InputError(f"{caller}: tasks needs a list of paths, got the one path {str(tasks)!r}")
    known = {f.name for f in msgspec.structs.fields(MergeConfig)} - {"options"}
    return {
        "base": None if base is None else str(base),
        "tasks": [str(task) for task in tasks],
        "out": str(out),
        "weights": None if weights is None else [float(w) for w in weights],
        "overrides": [dict(o) for o in overrides],
        **{name: value for name, value in settings.items() if name in known},
        "options": {name: value for name, value in settings.items() if name not in known},
    }


def lora_scale_of(config: MergeConfig) -> Any:
    """Whether adapters are multiplied by lora_alpha / r: as asked for, as the preset has it, or "apply"."""
    cls = list_methods().get(config.method)
    preset = preset_of(cls, config.options) if cls else None
    if preset and config.lora_scale not in (None, preset.lora_scale):
        raise OptionError(
            f"lora_scale={config.lora_scale!r} conflicts with official={config.options['official']!r}, "
            f"which sets lora_scale={preset.lora_scale!r}; give one of them"
        )
    return config.lora_scale or (preset.lora_scale if preset else "apply")


def _check_bases(adapters: Sequence[Adapter]) -> None:
    """Adapters that name different bases cannot be merged. Only the last part counts: paths differ between machines."""
    named = [(adapter, adapter.base_name.rstrip("/").split("/")[-1]) for adapter in adapters if adapter.base_name]
    for adapter, name in named:
        first, expected = named[0]
        if name != expected:
            raise InputError(
                f"{adapter.label}: trained on base {adapter.base_name!r}, but {first.label} on {first.base_name!r}; if "
                "both are the same weights, correct base_model_name_or_path in one adapter_config.json"
            )


def compute_device(name: str, processes: Processes | None = None) -> torch.device:
    """The device of that name; of the processes of a machine each has the next GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: this torch finds no CUDA device; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes is not None and processes.size > 1:
        return torch.device(name, processes.local_rank % torch.cuda.device_count())
    return torch.device(name)

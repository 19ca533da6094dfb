"""The pieces of work: each leaves a file, is skipped where that exists, and needs one thread."""

from __future__ import annotations

import functools
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from . import data, merging, training
from .data import Splits
from .protocol import KINDS, Merge, Protocol, merges
from .results import Place, Probe, Tuned
from .training import Head

Job = tuple[str, Callable[[], None]]
"""What a person calls it, and the work."""


def phases(place: Place, protocol: Protocol, seeds: Sequence[int]) -> list[list[Job]]:
    """What is still to be done: the jobs of one phase need those of the phases before, and none of their own."""
    probes: list[Job] = []
    tunings: list[Job] = []
    measurements: list[Job] = []
    for seed in seeds:
        for task in protocol.tasks:
            if not place.record(seed, f"probe-{task}").exists():
                probes.append((f"seed {seed}: probe {task}", functools.partial(probe, place, protocol, seed, task)))
            for kind in KINDS:
                if not place.record(seed, f"{kind}-{task}").exists():
                    work = functools.partial(tune, place, protocol, seed, kind, task)
                    tunings.append((f"seed {seed}: fine-tune {kind} {task}", work))
        for merge in merges(protocol, seed):
            if not place.record(seed, merge.name).exists():
                measurements.append((f"seed {seed}: {merge.name}", functools.partial(measure, place, protocol, merge)))
    return [probes, tunings, measurements]


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[str]:
    """Run them in this process, or in several of one thread each; yields the name of each that is done."""
    if processes == 1:
        for name, work in jobs:
            work()
            yield name
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context, initializer=one_thread) as pool:
        pending = {pool.submit(work): name for name, work in jobs}
        try:
            for done in as_completed(pending):
                done.result()
                yield pending[done]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def save_data(place: Place, protocol: Protocol, seeds: Sequence[int]) -> None:
    """Write the splits of all tasks; what exists already stays.

    Raises:
        InputError: a source is missing.
    """
    for task in data.TASKS:
        missing = [seed for seed in seeds if not place.data(seed, task.name).exists()]
        if task.name not in protocol.tasks or not missing:
            continue
        examples = list(task.examples())
        for seed in missing:
            file = place.data(seed, task.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            data.split(task.name, examples, protocol.sizes, seed).save(file)


def probe(place: Place, protocol: Protocol, seed: int, task: str) -> None:
    """Fit the head of one task on the base's features, and measure both."""
    started = time.perf_counter()
    splits = Splits.load(place.data(seed, task))
    model = training.load_encoder(place.base)
    head = training.fit_head(model, training.tokenise(splits.train))
    file = place.head(seed, task)
    file.parent.mkdir(parents=True, exist_ok=True)
    head.save(file)
    accuracy = training.accuracy(model, head, training.tokenise(splits.test))
    sizes = [len(part.texts) for part in (splits.train, splits.validation, splits.test)]
    record = Probe(task, seed, len(splits.classes), *sizes, accuracy, time.perf_counter() - started)
    place.write(seed, f"probe-{task}", record)


def tune(place: Place, protocol: Protocol, seed: int, kind: str, task: str) -> None:
    """Fine-tune the base for one task, save it, and measure what was saved."""
    splits = Splits.load(place.data(seed, task))
    head = Head.load(place.head(seed, task))
    model = training.prepare(place.base, kind, seed)
    started = time.perf_counter()
    training.train(
        model,
        head,
        training.tokenise(splits.train),
        steps=protocol.steps,
        learning_rate=training.LEARNING_RATES[kind],
        seed=seed,
    )
    seconds = time.perf_counter() - started
    directory = place.tuned(seed, kind, task)
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was cut off
    training.save_tuned(model, directory)
    saved = training.load_tuned(place.base, directory)
    validation, test = (
        training.accuracy(saved, head, training.tokenise(part)) for part in (splits.validation, splits.test)
    )
    place.write(seed, f"{kind}-{task}", Tuned(task, kind, seed, validation, test, seconds))


def measure(place: Place, protocol: Protocol, merge: Merge) -> None:
    place.write(merge.seed, merge.name, merging.measure(place, protocol, merge))


def keep_family(place: Place, merge: Merge, scale: float, folder: Path) -> None:
    """Copy the base and the fine-tuned models of one merge, and merge them at a scale, for other programs to look at."""
    shutil.copytree(place.base, folder / "base")
    for task in merge.tasks:
        shutil.copytree(place.tuned(merge.seed, merge.kind, task), folder / "tasks" / task)
    merging.merged_checkpoint(place, merge, folder / "merged", scale)


def one_thread() -> None:
    """Several processes of one thread are faster than one of several here, and results do not depend on the cores."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for library in ("transformers", "peft"):
        warnings.filterwarnings("ignore", module=library)

"""Carry out a plan, one tensor (or one row panel) at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from dcmerge_ext.checkpoints.blame import of_tensor
from dcmerge_ext.checkpoints.deal import deal
from dcmerge_ext.checkpoints.memory import MemoryBudget, is_side_by_side, peak_bytes, workers
from dcmerge_ext.checkpoints.plan import Plan, TensorPlan, survey_dtype
from dcmerge_ext.checkpoints.tasks import Task
from dcmerge_ext.checkpoints.virtual_base import VirtualBase
from dcmerge_ext.distributed import Processes
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.apply import survey_model
from dcmerge_ext.methods.base import Context, Method, SurveyState
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.products import gram_float64
from dcmerge_ext.stages import Work, by_tensor, stage, staged
from dcmerge_ext.updates import Updates, compute_dtype, count_nonfinite

_T = TypeVar("_T")
Advance = Callable[[int], None]
"""Told how many bytes of the base's tensors were just worked through, from any thread."""
Sink = Callable[[slice | None, Tensor, Update, dict[str, Any]], None]
Store = Callable[[str, slice | None, Tensor], None]


@dataclass
class TensorResult:
    """What happened to one tensor."""

    name: str
    action: str
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    digests: list[bytes] = field(default_factory=list)
    """xxh3-128 of the stored bytes read: of the base, then of each task."""


class Executor:
    """Merges the tensors of a plan; surveys of whole-model methods run first, when they are needed."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        advance: Advance = lambda _: None,
        processes: Processes | None = None,
        max_memory: int | None = None,
    ) -> None:
        """``max_memory``: bytes of anonymous memory that the process may hold; see :class:`MemoryBudget`."""
        self.plan = plan
        self.device = device
        self._budget = MemoryBudget(max_memory)
        self._advance = advance
        self._processes = processes or Processes()
        self._states: dict[Method, Any] = {}

    def run(self, tensors: Sequence[TensorPlan], work: Callable[[TensorPlan], TensorResult]) -> list[TensorResult]:
        """Do ``work`` for every tensor; results in their order.

        Tensors that take little memory go side by side, one thread each: reading, computing and writing overlap, and
        no thread waits for another inside an operation. Large matrices follow one at a time, with all threads.
        """
        for method in dict.fromkeys(t.method for t in tensors if t.action == "merge"):
            self.survey(method)

        def held(tensor: TensorPlan) -> TensorResult:
            with self._budget.hold(peak_bytes(self.plan, tensor)):
                return work(tensor)

        timed = by_tensor(held)
        small = [t for t in tensors if is_side_by_side(self.plan, t)]
        results = {r.name: r for r in self._side_by_side(small, timed)}
        results.update((t.name, timed(t)) for t in tensors if t.name not in results)
        return [results[t.name] for t in tensors]

    def _side_by_side(self, tensors: Sequence[TensorPlan], work: Callable[[TensorPlan], _T]) -> list[_T]:
        """``work`` for every tensor, each on its share of the threads. On a GPU, in turn.

        The share is the same however many tensors there are, so that one gives the same bytes in a run that is resumed.
        """
        if self.device.type != "cpu":
            return side_by_side(work, tensors, at_most=1)
        return side_by_side(work, tensors, at_most=workers(), each=max(1, torch.get_num_threads() // workers()))

    def merge(self, tensor: TensorPlan, sink: Sink, *, whole: bool = False) -> TensorResult:
        """Merge a tensor; ``sink`` receives each panel: rows, the base's stored values, the merged update, facts.

        ``whole``: one panel, even where the method works element by element.
        """
        assert tensor.method is not None
        result = TensorResult(tensor.name, tensor.action)
        started = time.perf_counter()
        digests = [xxhash.xxh3_128() for _ in range(1 + self.plan.num_tasks)]
        context = Context(self.plan.num_tasks, tensor.name, self._states.get(tensor.method), result.facts)
        merge_panel = self._merger(tensor, context, whole)
        for rows in [None] if whole else tensor.panels():
            norms = [0.0] * self.plan.num_tasks
            with of_tensor(tensor.name):
                base = self.plan.base.read(tensor.name, rows)
                if not isinstance(self.plan.base, VirtualBase):  # zeros of the full size, stored nowhere
                    _digest(digests[0], base)
                updates = load_updates(self.plan, tensor, rows, base, self.device, norms, digests[1:])
                with stage("merge"):
                    merged = merge_panel(updates)
                _accumulate(result.facts, "update_norms", norms)
                _accumulate(result.facts, "merged_norm", [_norm(merged)])
                sink(rows, base, merged, result.facts)
            self._advance(base.nbytes)
        result.seconds = time.perf_counter() - started
        result.digests = [digest.digest() for digest in digests]
        return result

    def _merger(self, tensor: TensorPlan, context: Context, whole: bool) -> Callable[[Updates], Update]:
        """Merges any panel of the tensor."""
        method = tensor.method
        assert method is not None
        if whole or not tensor.in_passes:
            return lambda updates: method.merge(updates, context)

        def panels() -> Iterator[Updates]:
            for rows in tensor.panels():
                yield load_updates(self.plan, tensor, rows, self.plan.base.read(tensor.name, rows), self.device)

        with of_tensor(tensor.name):
            return method.prepare(tensor.specs, panels, context)

    def write(self, tensor: TensorPlan, store: Store) -> TensorResult:
        """Give ``store`` the tensor as it is stored, base + scale * merged cast once, panel by panel."""
        if tensor.action != "copy":
            return self.merge(
                tensor,
                lambda rows, base, merged, facts: store(tensor.name, rows, self._stored(base, merged, tensor, facts)),
            )
        digest = xxhash.xxh3_128()
        for rows in tensor.panels():
            base = self.plan.base.read(tensor.name, rows)
            _digest(digest, base)
            store(tensor.name, rows, self._cast(base, base, tensor))
            self._advance(base.nbytes)
        return TensorResult(tensor.name, tensor.action, digests=[digest.digest()])

    @staged("add to base")
    def _stored(self, base: Tensor, merged: Update, tensor: TensorPlan, facts: dict[str, Any]) -> Tensor:
        """base + scale * merged in the compute dtype, cast once; the base's own bits where nothing changes."""
        if _is_zero(merged):
            return self._cast(base, base, tensor)
        dense = _dense(merged) if isinstance(merged, LowRank) else merged
        exact = dense.reshape(base.shape).mul_(tensor.scale).to(base.device)
        halved = tensor.out_dtype.itemsize < exact.dtype.itemsize
        change = _norm(exact) if halved else 0.0
        exact += base.to(exact.dtype)
        stored = self._cast(exact, base, tensor)
        if halved:
            _accumulate(facts, "rounding_norm", [_norm(exact.sub_(stored))])
            _accumulate(facts, "change_norm", [change])
            _accumulate(facts, "base_norm", [_norm(base)])
        return stored

    def _cast(self, values: Tensor, base: Tensor, tensor: TensorPlan) -> Tensor:
        """``values`` in the dtype of the output, refused where they are not finite there."""
        if values is base and tensor.out_dtype == base.dtype:
            return base  # as the base has it, whatever it holds
        stored = values.to(tensor.out_dtype)
        if not math.isfinite(_norm(stored)):
            if bad := count_nonfinite(base):
                raise InputError(
                    f"{self.plan.base.where(tensor.name)}: tensor {tensor.name!r} of the base holds {bad} NaN or Inf values"
                )
            kind = str(tensor.out_dtype).removeprefix("torch.")
            raise InputError(f"tensor {tensor.name!r}: values overflow {kind}; choose a wider dtype or a smaller scale")
        return stored

    def survey(self, method: Method | None) -> None:
        """The surveys of a whole-model method, over every tensor it merges. All processes call it, and see a share each."""
        if method is None or method.scope != "model" or method in self._states:
            return
        tensors = [t for t in self.plan.tensors if t.action == "merge" and t.method == method]
        mine = deal(tensors, self._processes.size)[self._processes.rank]

        def visit(state: SurveyState) -> None:
            shares: SimpleQueue[SurveyState] = SimpleQueue()
            for _ in range(workers()):
                shares.put(state.fork())

            def see(tensor: TensorPlan) -> None:
                self._processes.check()
                share = shares.get()  # at most as many tensors at a time as there are shares
                try:
                    with self._budget.hold(peak_bytes(self.plan, tensor)):
                        self._survey(method, tensor, share)
                finally:
                    shares.put(share)

            self._side_by_side(mine, by_tensor(see, "survey"))
            seen = state.fork()
            while not shares.empty():
                seen.join(shares.get())
            state.join(self._processes.total(seen))

        self._states[method] = survey_model(method, self.plan.num_tasks, survey_dtype(tensors), visit)

    def _survey(self, method: Method, tensor: TensorPlan, state: SurveyState) -> None:
        for rows in tensor.panels():
            with of_tensor(tensor.name):
                base = self.plan.base.read(tensor.name, rows)
                method.survey(tensor.name, load_updates(self.plan, tensor, rows, base, self.device), state)
            self._advance(base.nbytes)


def content_digest(results: Sequence[TensorResult], index: int) -> str:
    """Digest of one input: 0 the base, i + 1 task i; over the digests of its tensors in order."""
    digest = xxhash.xxh3_128()
    for result in results:
        if index < len(result.digests):
            digest.update(result.digests[index])
    return digest.hexdigest()


def work_bytes(plan: Plan, *, copies: bool) -> int:
    """What an executor reports to ``advance`` in total; ``copies``: copied tensors are written, too."""
    total = sum(t.base.nbytes for t in plan.tensors if copies or t.action != "copy")
    for method in {t.method for t in plan.tensors if t.method is not None and t.method.scope == "model"}:
        tensors = [t for t in plan.tensors if t.action == "merge" and t.method == method]
        total += method.num_surveys(survey_dtype(tensors)) * sum(t.base.nbytes for t in tensors)
    return total


def load_updates(
    plan: Plan,
    tensor: TensorPlan,
    rows: slice | None,
    base: Tensor,
    device: torch.device,
    norms: list[float] | None = None,
    digests: list[xxhash.xxh3_128] | None = None,
) -> Updates:
    """The updates of (a panel of) a tensor, read when a method asks for them; finite or refused by name."""
    on_device = base.to(device)
    shape = tuple(base.shape) if tensor.matrix_shape is None else tensor.matrix_shape
    specs = [spec._replace(shape=shape) for spec in tensor.specs]
    digested: set[int] = set()

    def load(i: int) -> Update:
        task, spec = plan.tasks[i], specs[i]
        if spec.rank == 0:
            empty = torch.zeros(*shape[:-1], 0, dtype=spec.dtype, device=device)
            return LowRank(empty, torch.zeros(*shape[:-2], 0, shape[-1], dtype=spec.dtype, device=device))
        update = task.update(tensor.name, on_device, rows)
        update = update.to(device) if isinstance(update, LowRank) else update.to(device).reshape(shape)
        norm = _norm(update)
        if not math.isfinite(norm):
            _refuse_nonfinite(task, tensor.name, plan, rows, update)
        if norms is not None:
            norms[i] = norm
        if digests is not None and i not in digested:
            digested.add(i)  # once, however often a method asks
            for raw in task.raw(tensor.name, rows):
                _digest(digests[i], raw)
        return update * plan.weights[i] if plan.weights[i] != 1 else update

    return Updates(specs, load, 0 if rows is None else rows.start * math.prod(shape[1:]))


def _refuse_nonfinite(task: Task, name: str, plan: Plan, rows: slice | None, update: Update) -> None:
    """Name the model that holds the NaN or Inf, looking at the stored tensors."""
    base = plan.base.read(name)
    if bad := count_nonfinite(base):
        raise InputError(f"{plan.base.where(name)}: tensor {name!r} of the base holds {bad} NaN or Inf values")
    bad = sum(count_nonfinite(raw) for raw in task.raw(name, None))
    if bad:
        raise InputError(
            f"{task.where(name)}: tensor {name!r} holds {bad} NaN or Inf values; repair the model or leave it out"
        )
    raise InputError(f"{task.where(name)}: the update of tensor {name!r} overflows {update.dtype}")


@staged("back-project", lambda merged: Work(2.0 * merged.rank * math.prod(merged.shape)))
def _dense(merged: LowRank) -> Tensor:
    return merged.dense()


@staged("norms")
def _norm(update: Update) -> float:
    """Frobenius norm; not finite exactly if some value is not (or the sum of squares overflows double)."""
    if isinstance(update, LowRank):
        if update.rank == 0:
            return 0.0
        square = float((_gram(update.left.mT) * _gram(update.right)).sum())  # a NaN or Inf in a factor stays one
        return math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan
    single = float(torch.linalg.vector_norm(update, dtype=compute_dtype(update.dtype)))
    return single if math.isfinite(single) else float(torch.linalg.vector_norm(update, dtype=torch.float64))


def _gram(rows: Tensor) -> Tensor:
    """In float64: a norm must not lose what cancels between the factors."""
    if rows.dtype == torch.float32:
        return gram_float64(rows)  # a fifth of the time of the product of float64 copies
    return rows.double() @ rows.double().mT


def _is_zero(update: Update) -> bool:
    if isinstance(update, LowRank):
        return update.rank == 0 or not bool(update.left.any()) or not bool(update.right.any())
    return not bool(update.any())


def _accumulate(facts: dict[str, Any], name: str, norms: list[float]) -> None:
    """Norms of a tensor from norms of its panels."""
    before = facts.get(name, [0.0] * len(norms))
    facts[name] = [math.hypot(a, b) for a, b in zip(before, norms, strict=True)]


@staged("digest", lambda digest, tensor: Work(bytes=tensor.nbytes))
def _digest(digest: xxhash.xxh3_128, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

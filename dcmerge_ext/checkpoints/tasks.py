"""One fine-tuned task against the base: what it changes, as updates in the orientation of the base's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dcmerge_ext.checkpoints.adapter import Adapter
from dcmerge_ext.checkpoints.source import TensorSource
from dcmerge_ext.checkpoints.virtual_base import VirtualBase
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.stages import Work, staged
from dcmerge_ext.updates import UpdateSpec, compute_dtype


class Task(Protocol):
    """A fine-tuned model or adapter."""

    label: str

    @property
    def extra(self) -> list[str]:
        """Tensors of the task that the base does not have."""
        ...

    @property
    def missing(self) -> list[str]:
        """Floating tensors of the base that a full model lacks."""
        ...

    def spec(self, name: str) -> UpdateSpec:
        """The update of a tensor of the base, from headers. Its shape may differ from the base's."""
        ...

    def update(self, name: str, base: Tensor | None, rows: slice | None) -> Update:
        """The update in the compute dtype; ``base`` holds the same rows of the base tensor, on the device to use."""
        ...

    def raw(self, name: str, rows: slice | None) -> list[Tensor]:
        """The stored tensors an update of these rows is made of, for digests."""
        ...

    def where(self, name: str) -> str:
        """File of a tensor, for messages."""
        ...


def _stored(task: Task, name: str, base: Tensor | None, rows: slice | None) -> Work:
    return Work(bytes=sum(raw.nbytes for raw in task.raw(name, rows)))


class FullTask:
    """A full fine-tune: Delta = W - W_0."""

    def __init__(self, model: TensorSource, base: TensorSource) -> None:
        self.label = model.label
        self.model = model
        self._base = base

    @property
    def extra(self) -> list[str]:
        known = {*self._base.specs, *self._base.aliases}
        return [name for name in self.model.specs if name not in known]

    @property
    def missing(self) -> list[str]:
        return [n for n, spec in self._base.specs.items() if spec.dtype.is_floating_point and self._own(n) is None]

    def spec(self, name: str) -> UpdateSpec:
        own = self._own(name)
        if own is None:
            base = self._base.specs[name]
            return UpdateSpec(base.shape, 0, compute_dtype(base.dtype))
        spec = self.model.specs[own]
        return UpdateSpec(
            spec.shape, None, compute_dtype(torch.promote_types(spec.dtype, self._base.specs[name].dtype))
        )

    @staged("read", _stored)
    def update(self, name: str, base: Tensor | None, rows: slice | None) -> Update:
        assert base is not None
        dtype = self.spec(name).dtype
        (own,) = self.raw(name, rows)
        self._check_tied(name, own, rows)
        return torch.sub(own.to(base.device, dtype), base.to(dtype))

    def raw(self, name: str, rows: slice | None) -> list[Tensor]:
        own = self._own(name)
        return [] if own is None else [self.model.read(own, rows)]

    def where(self, name: str) -> str:
        return self.model.where(self._own(name) or name)

    def _own(self, name: str) -> str | None:
        """The name under which this model stores the tensor: its own, or that of a tensor it is tied to."""
        if name in self.model.specs:
            return name
        tied = [self.model.aliases.get(name), *(n for n in self._tied(name) if n in self.model.specs)]
        return next((n for n in tied if n is not None), None)

    def _tied(self, name: str) -> list[str]:
        """Further names of the tensor in the base."""
        return [alias for alias, stored in self._base.aliases.items() if stored == name]

    def _check_tied(self, name: str, own: Tensor, rows: slice | None) -> None:
        for twin in self._tied(name):
            if twin in self.model.specs and not torch.equal(self.model.read(twin, rows), own):
                raise InputError(
                    f"{self.model.where(twin)}: {twin!r} differs from {name!r}, and {self._base.label} ties them to one "
                    "tensor; untie them in the base first"
                )


class AdapterTask:
    """A LoRA adapter: Delta = scale B A, never made dense; DoRA and replaced tensors as dense updates of the base."""

    def __init__(self, adapter: Adapter, base: TensorSource) -> None:
        self.label = adapter.label
        self.adapter = adapter
        self._base = base
        self._rename = match_prefix(
            [f"{m}.weight" for m in adapter.modules] or list(adapter.values), base, adapter.label
        )
        self.modules = {self._rename(f"{module}.weight"): module for module in adapter.modules}
        self._values = {self._rename(name): name for name in adapter.values}
        # One flag serves all modules of an adapter; a module that is not square shows how its kind is stored.
        shapes = {name: (base.specs[name].shape, adapter.modules[m].shape) for name, m in self.modules.items()}
        self._stored_transposed = {
            _leaf(name): stored != own for name, (stored, own) in shapes.items() if own[0] != own[-1]
        }

    @property
    def extra(self) -> list[str]:
        return [name for name in self._values if name not in self._base.specs]

    @property
    def missing(self) -> list[str]:
        return []

    def spec(self, name: str) -> UpdateSpec:
        base = self._base.specs[name]
        if name in self._values:
            spec = self.adapter.value_spec(self._values[name])
            return UpdateSpec(spec.shape, None, compute_dtype(torch.promote_types(spec.dtype, base.dtype)))
        if name not in self.modules:
            return UpdateSpec(base.shape, 0, compute_dtype(base.dtype))
        lora = self.adapter.modules[self.modules[name]]
        shape = lora.shape[::-1] if self.transposed(name) else lora.shape
        return UpdateSpec(shape, None if lora.key_magnitude else lora.rank, compute_dtype(lora.dtype))

    def transposed(self, name: str) -> bool:
        """Whether the base stores this weight as (in, out), as GPT-2's Conv1D does.

        The configuration has one flag for the whole model, that of the layer PEFT met last, so shapes decide where they
        can: its own, or for a square weight that of another module of the same kind (the same last name).
        """
        lora = self.adapter.modules[self.modules[name]]
        if lora.kind != "linear":
            return False
        shape = self._base.specs[name].shape
        if shape[0] != shape[-1]:
            return shape == lora.shape[::-1]
        return self._stored_transposed.get(_leaf(name), self.adapter.fan_in_fan_out)

    def own_name(self, name: str) -> str:
        """The adapter's name for a tensor of the base."""
        return self._rename.inverse(name)

    @staged("read", _stored)
    def update(self, name: str, base: Tensor | None, rows: slice | None) -> Update:
        if name in self._values:
            assert base is not None
            dtype = self.spec(name).dtype
            return torch.sub(self.raw(name, rows)[0].to(base.device, dtype), base.to(dtype))
        copy = self.adapter.base_copy(self.modules[name])
        if copy is not None and base is not None and not self._is_base(name, copy, base, rows):
            raise InputError(
                f"{self.adapter.file.label}: stores a weight for {name!r} that is not the base's ({self._base.label}); "
                "the adapter was trained on another base"
            )
        update = self.adapter.factors(self.modules[name])
        magnitude = self.adapter.magnitude(self.modules[name])
        if magnitude is not None:
            return self._dora(name, update, magnitude, rows)
        if self.transposed(name):
            update = update.mT
        return update if rows is None else LowRank(update.left[rows], update.right)

    def _is_base(self, name: str, copy: Tensor, base: Tensor, rows: slice | None) -> bool:
        if isinstance(self._base, VirtualBase):
            return True  # no base at hand to compare with
        copy = copy if rows is None else copy[rows]
        return copy.shape == base.shape and torch.equal(copy.to(base.device, base.dtype), base)

    def _dora(self, name: str, update: LowRank, magnitude: Tensor, rows: slice | None) -> Tensor:
        # DoRA (arXiv 2402.09353, eq. 5): W = magnitude * (W_0 + Delta) / row norms, in the orientation (out, in).
        dtype = update.dtype
        transposed = self.transposed(name)
        whole = self._base.read(name).to(dtype)
        base = whole.mT if transposed else whole
        adapted = base + update.dense()
        norms = torch.linalg.vector_norm(adapted, dim=1)
        result: Tensor = adapted * (magnitude.to(dtype) / norms)[:, None] - base
        result = result.mT.contiguous() if transposed else result
        return result if rows is None else result[rows]

    def raw(self, name: str, rows: slice | None) -> list[Tensor]:
        if name in self._values:
            value = self.adapter.value(self._values[name])
            return [value if rows is None else value[rows]]
        if name not in self.modules:
            return []
        lora = self.adapter.modules[self.modules[name]]
        keys = (lora.key_a, lora.key_b, lora.key_magnitude)
        return [self.adapter.file.read(key) for key in keys if key is not None]

    def where(self, name: str) -> str:
        return self.adapter.file.label


def match_prefix(names: Iterable[str], base: TensorSource, label: str) -> _Rename:
    """A function from an adapter's parameter names to the base's: the same, one prefix less, or one prefix more.

    An adapter of a model with a head names ``bert.encoder...`` what a checkpoint of the bare encoder names ``encoder...``.

    Raises:
        InputError: some module is in the base under none of these names: the adapter belongs to another base.
    """
    wanted = list(names)
    known = {*base.specs, *base.aliases}
    heads = sorted({name.split(".", 1)[0] + "." for name in known if "." in name})
    first = wanted[0].split(".", 1)[0] + "."
    candidates = [("", ""), (first, ""), *(("", head) for head in heads)]
    found: dict[tuple[str, str], list[str]] = {}
    for cut, put in candidates:
        found[cut, put] = [n for n in wanted if not n.startswith(cut) or put + n.removeprefix(cut) not in known]
        if (cut, put) == ("", "") and not found[cut, put]:
            break
    fitting = [_Rename(cut, put, base.aliases) for (cut, put), missing in found.items() if not missing]
    if len(fitting) > 1:
        places = " and ".join(repr(rename(wanted[0])) for rename in fitting)
        raise InputError(f"{label}: adapts {wanted[0]!r}, which fits {places} of {base.label}; rename its tensors")
    if fitting:
        return fitting[0]
    missing = min(found.values(), key=len)
    raise InputError(
        f"{label}: adapts {missing[0]!r}"
        + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
        + f", which {base.label} does not have; the adapter was trained on another base, or on this one under other "
        "tensor names (transformers 5 saves some models, such as ViT, under their older names: save the base again with "
        "save_pretrained(..., save_original_format=False))"
    )


@dataclass(frozen=True)
class _Rename:
    cut: str
    put: str
    aliases: Mapping[str, str]

    def __call__(self, name: str) -> str:
        renamed = self.put + name.removeprefix(self.cut)
        return self.aliases.get(renamed, renamed)

    def inverse(self, name: str) -> str:
        return self.cut + name.removeprefix(self.put)


def _leaf(name: str) -> str:
    """Last name of a module: ``c_proj`` of ``h.0.attn.c_proj.weight``."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]

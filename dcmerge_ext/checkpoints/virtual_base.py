"""The base that adapters imply, for merging them without the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcmerge_ext.checkpoints.adapter import Adapter
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.errors import InputError


class VirtualBase:
    """Names and shapes of all weights that some adapter touches; every value reads as zero.

    The update of a tensor that adapters replace outright (modules_to_save, biases) is then the value itself.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.label = "the other adapters"
        self.specs: dict[str, TensorSpec] = {}
        self.aliases: dict[str, str] = {}
        self._owners: dict[str, str] = {}
        for adapter in adapters:
            for module, lora in adapter.modules.items():
                if lora.key_magnitude is not None:
                    raise InputError(
                        f"{adapter.label}: DoRA on {module!r} is defined against the base weights; give --base"
                    )
                self._add(adapter, f"{module}.weight", TensorSpec(lora.shape, torch.float32))
            for name in adapter.values:
                self._add(adapter, name, adapter.value_spec(name))

        self._check_names(adapters)

    def _check_names(self, adapters: Sequence[Adapter]) -> None:
        """Adapters of a bare encoder and of one with a head name the same weights differently."""
        for adapter in adapters:
            own = {f"{module}.weight" for module in adapter.modules}
            for name in sorted(own):
                shorter = name.partition(".")[2]
                if shorter in self.specs and shorter not in own and self.specs[shorter].shape == self.specs[name].shape:
                    raise InputError(
                        f"{adapter.label}: {name!r} and {shorter!r} of {self._owners[shorter]} look like the same weight under "
                        "two names; give --base, which tells"
                    )

    def _add(self, adapter: Adapter, name: str, spec: TensorSpec) -> None:
        if self.specs.setdefault(name, spec).shape != spec.shape:
            raise InputError(
                f"{adapter.label}: {name!r} has shape {spec.text}, {self._owners[name]} has {self.specs[name].text}; "
                "the adapters were trained on different bases"
            )
        self._owners.setdefault(name, adapter.label)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        spec = self.specs[name]
        zeros = torch.zeros((), dtype=spec.dtype).expand(spec.shape)
        return zeros if rows is None else zeros[rows]

    def where(self, name: str) -> str:
        return self._owners[name]

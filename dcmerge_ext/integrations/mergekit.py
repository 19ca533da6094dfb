"""The methods of this package inside mergekit (0.1.5 or later), which keeps reading, planning, tokenizers and writing.

:func:`register_all` once, or the command ``dcmerge-mergekit-yaml`` in the place of ``mergekit-yaml``; then
``merge_method: dcmerge_NAME`` in a configuration, and in ``mergekit.merge_methods.merge_state_dicts``. ``dcmerge_ties``
and ``dcmerge_task_arithmetic`` take the parameters of mergekit's methods and give their results. All others are merged
by :func:`dcmerge_ext.merge_state_dicts`, tensor by tensor, with our options as parameters: ``weight`` per model
(default 1), ``lambda`` the scale (default: the method's own).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, get_type_hints

import msgspec
import torch
from torch import Tensor

try:
    from mergekit import merge_methods
    from mergekit.merge_methods import (
        BasePolicy,
        BatchOptions,
        InputContract,
        MergeMethod,
        MergeMethodSpec,
        OptionalTensorPolicy,
        ParameterScope,
        TensorGroup,
    )
    from mergekit.merge_methods.base import FunctionalGroupMergeMethod, ParameterSpec
except ImportError as error:
    raise ImportError(f"dcmerge_ext.integrations.mergekit needs mergekit 0.1.5 or later ({error})") from error
from pydantic import BeforeValidator

from dcmerge_ext.checkpoints.state_dicts import merge_state_dicts
from dcmerge_ext.errors import DcmergeError, OptionError
from dcmerge_ext.integrations.mergekit_ties import merge_ties
from dcmerge_ext.methods.base import Method
from dcmerge_ext.methods.registry import create, describe_options, explain, list_methods
from dcmerge_ext.parallel import side_by_side

logger = logging.getLogger(__name__)

PREFIX = "dcmerge_"

_NEEDS_MORE = {
    "core_space": "merges LoRA factors, and mergekit hands over full weights",
    "robust_merge": "merges LoRA factors, and mergekit hands over full weights",
    "esm": "needs a file of activations for each task",
}


def register_all() -> tuple[str, ...]:
    """Enter the methods into mergekit's register. Again is no change.

    Returns:
        The names under which they stand there.
    """
    known = {method.spec.name for method in merge_methods.registered_methods()}
    names = []
    for name, cls in list_methods().items():
        if why_not(name) is not None:
            continue
        names.append(PREFIX + name)
        if PREFIX + name not in known:
            merge_methods.register(_twin(name) if name in TWINS else _Method(_spec(cls), partial(_merge, name)))
    return tuple(names)


def entry() -> None:
    """The installed command ``dcmerge-mergekit-yaml``."""
    from dcmerge_ext.integrations.mergekit_yaml import command  # after the message about a missing mergekit

    command()()


def why_not(name: str) -> str | None:
    """Why a method of this package is not offered in mergekit; None if it is."""
    if name in TWINS:
        return None
    if name in _NEEDS_MORE:
        return _NEEDS_MORE[name]
    return _whole_model(list_methods()[name]())


def _whole_model(method: Method) -> str | None:
    if method.num_surveys(torch.float32) == 0:
        return None
    return "looks at the whole model first, and mergekit hands over one tensor at a time; use `dcmerge merge`"


class _Method(FunctionalGroupMergeMethod):  # type: ignore[misc]
    """A function of one group of tensors; small groups, where mergekit hands over several, side by side on the cores.

    Not in batches of one shape: these have no names, which seeds and messages need.
    """

    def __init__(self, spec: MergeMethodSpec, merge: Callable[..., Tensor], theirs: MergeMethod | None = None) -> None:
        super().__init__(spec, merge)
        self._theirs = theirs
        """mergekit's method with the same results."""

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        merge = super()._execute
        tensors = [tensor for group in groups for tensor in group.tensors]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            if self._theirs is None:
                logger.warning("%s records no gradients: its results are constants", self.spec.name)
            else:
                logger.warning("%s records no gradients: merged by mergekit's own method", self.spec.name)
                merge = self._theirs._execute

        def one(i: int) -> Tensor:
            (merged,) = merge(
                groups[i : i + 1],
                parameters[i : i + 1],
                options,
                input_dtypes=input_dtypes[i : i + 1],
                out_dtype=out_dtype,
            )
            result: Tensor = merged
            return result

        on_cpu = all(tensor.is_cpu for tensor in tensors)
        most = options.max_bytes // torch.get_num_threads() if on_cpu else 0
        small = [i for i, group in enumerate(groups) if sum(tensor.nbytes for tensor in group.tensors) <= most]
        results = dict(zip(small, side_by_side(one, small), strict=True))
        return tuple(results[i] if i in results else one(i) for i in range(len(groups)))


# --- our parameters ---------------------------------------------------------------------------------------------------


def _spec(cls: type[Method]) -> MergeMethodSpec:
    hints = get_type_hints(cls, include_extras=True)
    options = [
        ParameterSpec(
            o.name,
            _checked(cls, o.name, hints[o.name]),
            ParameterScope.SHARED,
            default=o.default,
            description=o.meaning,
        )
        for o in describe_options(cls)
    ]
    return MergeMethodSpec(
        name=PREFIX + cls.name,
        parameters=(
            ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0, description="factor of the update"),
            ParameterSpec("lambda", float | None, ParameterScope.SHARED, default=None, description="the scale"),
            *options,
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        pretty_name=f"{cls.name} (dcmerge_ext)",
        reference_url=cls.paper,
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )


def _checked(cls: type[Method], option: str, hint: Any) -> Any:
    """The type of one option for pydantic: what msgspec makes of it. Numbers may be texts, as YAML reads 1e-3."""

    def convert(value: Any) -> Any:
        try:
            return msgspec.convert(value, hint, strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"{PREFIX}{cls.name}, parameter {option}: {explain(error, cls)}") from error

    return Annotated[Any, BeforeValidator(convert)]


def _merge(name: str, group: TensorGroup, /, **parameters: Any) -> Tensor:
    """One tensor as this package merges it in a model."""
    cls = list_methods()[name]
    weights, scale = parameters.pop("weight"), parameters.pop("lambda")
    # a preset refuses options beside it, even those with their default
    options = {o.name: parameters[o.name] for o in describe_options(cls) if parameters[o.name] != o.default}
    if cls.scope == "model" and (why := _whole_model(create(name, options))):
        raise OptionError(f"{PREFIX}{name} with {', '.join(f'{k}={v}' for k, v in options.items())} {why}")
    return _by_us(group, name, scale, weights, options)


def _by_us(group: TensorGroup, method: str, scale: float | None, weights: Any, options: dict[str, Any]) -> Tensor:
    name, tasks = group.metadata.name or "tensor", group.non_base
    try:
        merged = merge_state_dicts(
            {name: group.base.tensor},
            [{name: entry.tensor} for entry in tasks],
            method,
            scale,
            weights.values_for(tasks),
            **options,
        )
    except DcmergeError as error:
        # "task 0: tensor ..." by the name of the model
        raise type(error)(
            re.sub(r"^task (\d+)(?=:)", lambda found: str(tasks[int(found[1])].id), str(error))
        ) from error
    return merged[name]


# --- mergekit's parameters --------------------------------------------------------------------------------------------


def _task_arithmetic(group: TensorGroup, **parameters: Any) -> Tensor:
    """mergekit's ``task_arithmetic``: without sparsification its other parameters have no effect, there and here."""
    if not group.non_base:
        result: Tensor = group.base.tensor
        return result
    scale, weights = parameters["lambda"], parameters["weight"]
    if parameters["normalize"]:
        total = sum(weights.values_for(group.non_base))
        scale /= total if abs(total) >= 1e-8 else 1
    return _by_us(group, "task_arithmetic", scale, weights, {})


TWINS: dict[str, Callable[..., Tensor]] = {"task_arithmetic": _task_arithmetic, "ties": merge_ties}
"""Methods that mean what mergekit's method of that name means."""


def _twin(name: str) -> _Method:
    theirs = merge_methods.get(name)
    spec = replace(theirs.spec, name=PREFIX + name, pretty_name=f"{theirs.spec.pretty_name} (dcmerge_ext)")
    return _Method(spec, TWINS[name], theirs)

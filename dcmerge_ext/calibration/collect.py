"""Watching a model run: the Gram matrix of what goes into each linear layer, and nothing else, is kept."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcmerge_ext.calibration.grams import TRANSPOSED
from dcmerge_ext.errors import InputError
from dcmerge_ext.methods.registry import nearest
from dcmerge_ext.products import gram_float64
from dcmerge_ext.updates import count_nonfinite

logger = logging.getLogger(__name__)


def collect_grams(
    model: nn.Module, batches: Iterable[Any], *, names: Mapping[str, str] | Collection[str] | None = None
) -> dict[str, Tensor]:
    """Run ``model`` on ``batches`` and return X'X for the inputs X of its linear layers.

    All tokens of all batches count as rows of X. Each input is reduced on the fly, in float64, by a hook: memory is one
    n x n matrix per layer, whatever the number of samples. Gradients are off; training mode comes back afterwards.

    Args:
        model: with torch.nn.Linear modules (or Conv1D of transformers), in any floating dtype, on any device. Adapters
            must be merged into it first, so that its modules have the checkpoint's names.
        batches: each a mapping of keyword arguments, a tuple of positional ones, or a tensor. Where a mapping holds an
            ``attention_mask`` (samples, tokens), tokens that it masks are left out of inputs (samples, tokens, n).
        names: weights to collect, as ``state_dict`` names them; a mapping gives each the name to be found under, that of
            the checkpoint's tensor where transformers stores it under another one
            (:func:`~dcmerge_ext.calibration.stored_names`). None: all.
    Returns:
        Name of the weight -> (n, n) float64 on the CPU, n = in features; the name of a Conv1D weight, stored as
        (in, out), is followed by ``.mT``. Layers that never ran have no entry.
    Raises:
        InputError: names that are no linear layer's weight; no layer ran; NaN or Inf.
    """
    layers = linear_weights(model)
    if names is not None:
        for name in names:
            if name not in layers:
                raise InputError(
                    f"collect_grams: {name!r} is not the weight of a linear layer of the model"
                    f"{nearest(name, list(layers))}"
                )
        layers = {name: module for name, module in layers.items() if name in names}
    renamed = names if isinstance(names, Mapping) else {}
    keys = {
        name: renamed.get(name, name) + (TRANSPOSED if _is_conv1d(module) else "") for name, module in layers.items()
    }
    totals: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def hook(key: str) -> Any:
        def add(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = positional[0] if positional else next(iter(keywords.values()))
            found = _gram(x.detach(), mask).cpu()
            totals[key] = totals[key].add_(found) if key in totals else found

        return add

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(hook(keys[name]), with_kwargs=True).remove)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple):
                model(*batch)
            else:
                model(batch)
    if not totals:
        raise InputError("collect_grams: no linear layer of the model ran; give at least one batch")
    for key, matrix in totals.items():
        if bad := count_nonfinite(matrix):
            raise InputError(f"collect_grams: the inputs of {key!r} lead to {bad} NaN or Inf values")
    if idle := [name for name, key in keys.items() if key not in totals]:
        logger.info("%d linear layers did not run, such as %r", len(idle), idle[0])
    return totals


def linear_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Name of the weight -> linear layer."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or _is_conv1d(module)
    }


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' linear layer with a transposed weight; not imported, because the package is optional."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _gram(x: Tensor, mask: Tensor | None) -> Tensor:
    """X'X of (..., n), in float64."""
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.to(x.device).bool()]
    x = x.reshape(-1, x.shape[-1])
    return x.mT @ x if x.dtype == torch.float64 else gram_float64(x.float().mT)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

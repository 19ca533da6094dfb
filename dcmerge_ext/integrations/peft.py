"""PEFT's ``add_weighted_adapter`` on factors: the same call and the same adapter, without dense updates and full SVDs.

Either call :func:`add_weighted_adapter` instead of the method, or :func:`patch` once, or merge inside
``with accelerated_peft():``. :func:`merge_adapters` does it from directory to directory, without a model.
PEFT itself still checks the request, makes the configuration and injects the layers; only the two of its steps that
compute one layer's factors are replaced.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from dcmerge_ext.backends import prefers_products
from dcmerge_ext.checkpoints.adapter import Adapter
from dcmerge_ext.checkpoints.locate import locate
from dcmerge_ext.checkpoints.run import MergeReport, merge_checkpoints
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.integrations import peft_layers
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.methods.apply import merge_with
from dcmerge_ext.methods.registry import create, list_methods, nearest, preset_of
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.updates import check_weights

logger = logging.getLogger(__name__)

_DENSE_TYPES = ("ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")
_FACTOR_TYPES = ("linear", "cat", "ties", "dare_ties", "dare_linear", "magnitude_prune")
PEFT_TYPES = ("svd", *_DENSE_TYPES, *_FACTOR_TYPES)
"""Combination types that mean what they mean in PEFT."""

_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Of a new adapter; the others change the base weights as soon as PEFT injects it."""
_UNSUPPORTED = {
    "lora_bias": "trained LoRA biases",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters",
    "ensure_weight_tying": "tied adapters",
    "megatron_config": "Megatron layers",
}
_STEPS = ("_svd_generalized_task_arithmetic_weighted_adapter", "_generalized_task_arithmetic_weighted_adapter")
"""Methods of LoraModel that compute the new factors of one layer."""

_Combine = Callable[[LoraLayer, int], LowRank | None]
"""The merged update of a layer, of at most that rank; None where no adapter touches it."""


def add_weighted_adapter(
    model: PeftModel | LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    options: Mapping[str, Any] | None = None,
    scale: float | None = None,
) -> None:
    """Add an adapter that merges others: ``LoraModel.add_weighted_adapter``, faster, and with further combination types.

    Nothing is added where an error is raised. Everything that PEFT itself computes (``linear``, ``cat``, ``ties``,
    ``dare_*``, ``magnitude_prune``, a single adapter, ``svd_clamp``, and kinds of LoRA that this function does not know,
    with a warning) goes through PEFT's code.

    Args:
        model: a PeftModel with LoRA adapters, or its LoraModel.
        adapters: names of the adapters to merge.   weights: one finite number for each.
        adapter_name: of the new adapter. Where it exists already nothing happens, as in PEFT.
        combination_type: one of PEFT's, or a method of this package that keeps rank: ``dc_merge``, ``tsv_m``,
            ``iso_c``, ``iso_cts``, ``knots_ties`` and others (see :func:`dcmerge_ext.list_methods`).
        svd_rank: rank of the new adapter. None: the largest of the sources with PEFT's ``svd`` types; with methods of
            this package the rank of their result, which loses nothing.
        svd_clamp: as in PEFT, computed by PEFT: what is clamped depends on the signs that its SVD happens to choose.
        svd_full_matrices: accepted; no product depends on it.
        svd_driver: checked as torch checks it, otherwise unused: no dense SVD runs.
        density, majority_sign_method: as in PEFT.
        options: of a method of this package.   scale: its coefficient; None is the method's default.
    Raises:
        InputError (a ValueError): no adapters, unknown names, NaN, shapes that do not fit, DoRA adapters, options of the
            other kind of combination.   TypeError: no LoRA model.
    """
    lora = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(lora, LoraModel):
        raise TypeError(f"add_weighted_adapter: needs a model with LoRA adapters, got {type(lora).__name__}")
    if adapter_name in lora.peft_config:
        return
    values = _checked(lora, adapters, weights)
    layers = peft_layers.lora_layers(lora)
    request: dict[str, Any] = {
        "adapters": list(adapters),
        "weights": list(values),
        "adapter_name": adapter_name,
        "combination_type": combination_type,
        "svd_rank": svd_rank,
        "svd_clamp": svd_clamp,
        "svd_full_matrices": svd_full_matrices,
        "svd_driver": svd_driver,
        "density": density,
        "majority_sign_method": majority_sign_method,
    }
    combine: _Combine | None = None
    rank: int | None = None
    if combination_type not in PEFT_TYPES:
        if density is not None or svd_clamp is not None:
            raise OptionError(f"density and svd_clamp do not apply to {combination_type!r}; pass its own in options")
        if why := _unsupported(lora, layers, adapters):
            raise InputError(f"combination_type {combination_type!r} cannot merge {why}")
        merged = _merge_by_method(layers, adapters, values, combination_type, options or {}, scale)
        rank = svd_rank or max(update.rank for update in merged.values())
        request.update(combination_type="svd", svd_rank=rank)
        combine = _lookup(layers, merged)
    elif options or scale is not None:
        raise OptionError(f"options and scale belong to methods of dcmerge_ext, and {combination_type!r} is PEFT's")
    elif len(values) > 1 and combination_type not in _FACTOR_TYPES:  # PEFT makes "linear" of a single adapter
        if why := _why_peft(lora, layers, adapters, svd_clamp):
            logger.warning("add_weighted_adapter: %s: combined by PEFT's own, dense code", why)
        else:
            _check_driver(layers, adapters, svd_driver)
            updates = peft_layers.read_updates(layers, adapters)
            if combination_type == "svd":
                combine = _lookup(layers, {n: peft_layers.weighted_sum(u, values) for n, u in updates.items()})
            else:
                combine = _dense(adapters, values, combination_type, density, majority_sign_method)
    with _undone_on_error(lora, adapter_name), _corrected(lora, layers, adapters, rank):
        with _combining(lora, adapter_name, combine):
            _peft_method(lora, **request)
        _complete(lora, layers, adapters, adapter_name)


_peft_method: Callable[..., None] = LoraModel.add_weighted_adapter
_lock = threading.Lock()
_patched = False
_contexts = 0


def patch() -> None:
    """Make ``LoraModel.add_weighted_adapter`` (and so that of every PeftModel) this module's. Again is no change."""
    global _patched
    with _lock:
        _patched = True
        _install()


def unpatch() -> None:
    """Give PEFT its method back, at the end of the last :func:`accelerated_peft` where one is open."""
    global _patched
    with _lock:
        _patched = False
        _install()


@contextlib.contextmanager
def accelerated_peft() -> Iterator[None]:
    """:func:`patch` within a ``with`` block; blocks may nest, and overlap in several threads."""
    global _contexts
    with _lock:
        _contexts += 1
        _install()
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            _install()


def merge_adapters(
    dirs: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    scale: float | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merge adapter directories into one, which PEFT loads, with the memory of a few tensors and no base model.

    Args:
        dirs: of PEFT LoRA adapters.   out: directory to write; must not exist (see ``overwrite``).
        weights: one per adapter; None is 1 for each.
        combination_type: ``svd`` or ``cat``, as in PEFT, or a method as in :func:`add_weighted_adapter`.
        svd_rank, options, scale: as in :func:`add_weighted_adapter`.
    Raises:
        InputError: as :func:`dcmerge_ext.merge_checkpoints`, which does the work; a type that needs dense updates.
    """
    if not dirs:
        raise InputError("merge_adapters: needs at least one adapter, got none")
    if combination_type in ("svd", "cat"):
        if options or scale is not None:
            raise OptionError(f"options and scale belong to methods of dcmerge_ext, and {combination_type!r} is PEFT's")
        name, given, scale = "task_arithmetic", dict[str, Any](), 1.0
        if combination_type == "cat":
            svd_rank = None
        elif not svd_rank:
            svd_rank = max(lora.rank for path in dirs for lora in Adapter(locate(str(path))).modules.values())
    elif combination_type in PEFT_TYPES:
        raise InputError(
            f"combination_type {combination_type!r} is not offered for directories (svd, cat and the methods are); load "
            "the adapters into their model and use add_weighted_adapter"
        )
    else:
        name, given = _method(combination_type, options or {})
    return merge_checkpoints(
        None, dirs, out, name, scale, weights=weights, adapter_rank=svd_rank, overwrite=overwrite, **given
    )


def _install() -> None:
    """Put the method in place that the state asks for. Another library's later patch is left as it is."""
    global _peft_method
    owner: Any = LoraModel
    ours = owner.add_weighted_adapter is add_weighted_adapter
    if (_patched or _contexts) and not ours:
        _peft_method = owner.add_weighted_adapter
        owner.add_weighted_adapter = add_weighted_adapter
    elif ours and not (_patched or _contexts):
        owner.add_weighted_adapter = _peft_method


def _checked(model: LoraModel, adapters: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    if not adapters:
        raise InputError("add_weighted_adapter: needs at least one adapter, got none")
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise InputError(f"Adapter {adapter} does not exist (the model has {', '.join(model.peft_config)})")
        config = model.peft_config[adapter]
        if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
            raise TypeError(f"add_weighted_adapter: adapter {adapter!r} is {config.peft_type}, needs LORA")
        if config.use_dora:
            raise InputError(
                f"adapter {adapter!r} uses DoRA: its magnitudes would be replaced by those of the base weights. Merge full "
                "models instead: dcmerge_ext.merge_checkpoints takes DoRA adapters together with their base"
            )
    return check_weights(weights, len(adapters))


def _unsupported(model: LoraModel, layers: Mapping[str, LoraLayer], adapters: Sequence[str]) -> str | None:
    """What makes an update of these adapters something other than scaling * B A in plain tensors."""
    for adapter in adapters:
        config: Any = model.peft_config[adapter]
        for entry, title in _UNSUPPORTED.items():
            if getattr(config, entry, None):
                return f"{title} ({entry} of adapter {adapter!r})"
        init = config.init_lora_weights
        if init not in _PLAIN_INITS:
            return f"adapter {adapter!r}, initialised with {init!r}: adding an adapter initialised so changes the base weights"
        for name, layer in layers.items():
            if variant := getattr(layer, "lora_variant", {}).get(adapter):
                return f"{type(variant).__name__} (adapter {adapter!r}, module {name!r})"
            found = peft_layers.factors(layer, adapter)
            if found is None:
                continue
            if getattr(layer.get_base_layer(), "groups", 1) > 1:
                return f"grouped convolutions (module {name!r})"
            if any(type(x.data) is not Tensor or x.is_meta for x in found):
                return f"weights that are sharded or not loaded (adapter {adapter!r}, module {name!r})"
    return None


def _why_peft(
    model: LoraModel, layers: Mapping[str, LoraLayer], adapters: Sequence[str], svd_clamp: float | None
) -> str | None:
    """Why a combination that this package knows is left to PEFT."""
    if svd_clamp is not None:
        return "svd_clamp depends on the signs of PEFT's singular vectors"
    if missing := [step for step in _STEPS if not hasattr(model, step)]:
        return f"this version of PEFT has no LoraModel.{missing[0]}"
    return _unsupported(model, layers, adapters)


def _check_driver(layers: Mapping[str, LoraLayer], adapters: Sequence[str], driver: str | None) -> None:
    """Raise what torch raises for a driver that it does not know, or has not on that device."""
    if driver is not None:
        found = (peft_layers.factors(layer, adapter) for layer in layers.values() for adapter in adapters)
        for device in {pair[0].device for pair in found if pair is not None}:
            torch.linalg.svd(torch.zeros(1, 1, device=device), driver=driver)


def _method(combination_type: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name of the method in the register, and its options."""
    known = {name for name, cls in list_methods().items() if cls.keeps_rank and name != "knots"}
    if combination_type == "knots_ties":
        return "knots", {"aggregate": "ties", **options}
    if combination_type not in known:
        names = [*PEFT_TYPES, "knots_ties", *sorted(known)]
        hint = nearest(combination_type, names)
        raise InputError(f"Invalid combination_type: {combination_type}{hint} (known: {', '.join(names)})")
    return combination_type, dict(options)


def _merge_by_method(
    layers: dict[str, LoraLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    options: Mapping[str, Any],
    scale: float | None,
) -> dict[str, LowRank]:
    """Path -> merged update. Matrices lie as in files: (out, in), (num_embeddings, dim)."""
    name, given = _method(combination_type, options)
    method = create(name, given)
    preset = preset_of(type(method), given)
    read = peft_layers.read_updates(layers, adapters, scaled=preset is None or preset.lora_scale == "apply")
    tasks = {f"{path}.weight": _facing(layers[path], _filled(updates)) for path, updates in read.items()}
    coefficient = method.default_scale(len(adapters)) if scale is None else scale
    merged = {}
    for path, update in zip(read, merge_with(method, tasks, weights).values(), strict=True):
        assert isinstance(update, LowRank)  # the method keeps rank
        merged[path] = _facing(layers[path], [update])[0] * coefficient
    return merged


def _filled(updates: Sequence[LowRank | None]) -> list[LowRank]:
    """Rank 0 where an adapter does not touch the module."""
    like = next(u for u in updates if u is not None)
    empty = LowRank(like.left[:, :0], like.right[:0])
    return [empty if u is None else u for u in updates]


def _facing(layer: LoraLayer, updates: Sequence[LowRank]) -> list[LowRank]:
    return [u.mT for u in updates] if peft_layers.is_embedding(layer) else list(updates)


def _lookup(layers: Mapping[str, LoraLayer], updates: Mapping[str, LowRank]) -> _Combine:
    """Each layer's own update. All are truncated when the first is asked for, one thread each: their SVDs are small."""
    found = {layers[name]: update for name, update in updates.items()}
    narrow: dict[LoraLayer, LowRank] = {}

    def combine(layer: LoraLayer, rank: int) -> LowRank | None:
        if found and not narrow:
            alone = any(prefers_products(update.left) for update in found.values())
            cut = side_by_side(
                lambda update: peft_layers.truncated(update, rank),
                list(found.values()),
                at_most=1 if alone else None,
                each=1,
            )
            narrow.update(zip(found, cut, strict=True))
        return narrow.get(layer)

    return combine


def _dense(
    adapters: Sequence[str], weights: Sequence[float], kind: str, density: float | None, majority_sign_method: str
) -> _Combine:
    if not isinstance(density, (int, float)):
        raise InputError(f"density: combination_type {kind!r} needs a number from 0 to 1, got {density!r}")

    def combine(layer: LoraLayer, rank: int) -> LowRank | None:
        if all(peft_layers.factors(layer, adapter) is None for adapter in adapters):
            return None
        dense = peft_layers.elementwise(kind, layer, adapters, weights, density, majority_sign_method)
        return peft_layers.truncated(dense, rank)

    return combine


@contextlib.contextmanager
def _undone_on_error(model: LoraModel, adapter_name: str) -> Iterator[None]:
    """PEFT leaves a half-made adapter behind."""
    active = model.active_adapter
    try:
        yield
    except BaseException:
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
            model.active_adapter = active
        raise


@contextlib.contextmanager
def _corrected(
    model: LoraModel, layers: Mapping[str, LoraLayer], adapters: Sequence[str], rank: int | None
) -> Iterator[None]:
    """What PEFT copies from the sources' configurations made fit for the new adapter.

    The new factors hold every scale and span all modules that any source touches; PEFT copies the first source's
    use_rslora, layers and saved modules. ``rank``: of the new adapter, where PEFT is not to find it.
    """
    configs: dict[str, Any] = {adapter: model.peft_config[adapter] for adapter in adapters}
    first = configs[adapters[0]]
    changes: dict[str, Any] = {} if rank is None else {"r": rank, "rank_pattern": {}, "alpha_pattern": {}}
    if first.use_rslora:
        changes["use_rslora"] = False
        logger.warning("add_weighted_adapter: rsLoRA's scale is in the merged factors; the new adapter does not use it")
    saved = list(dict.fromkeys(name for config in configs.values() for name in config.modules_to_save or []))
    if saved != list(first.modules_to_save or []):
        changes["modules_to_save"] = saved
    selections = {
        repr((c.layers_to_transform, c.layers_pattern, getattr(c, "exclude_modules", None))) for c in configs.values()
    }
    for adapter, config in configs.items():
        exact: dict[str, Any] = {}
        if len(selections) > 1:
            touched = {name for name, layer in layers.items() if peft_layers.factors(layer, adapter) is not None}
            exact = {"target_modules": touched, "layers_to_transform": None, "layers_pattern": None}
            if hasattr(config, "exclude_modules"):
                exact["exclude_modules"] = None
        if changes or exact:
            model.peft_config[adapter] = replace(config, **changes, **exact)
    try:
        yield
    finally:
        model.peft_config.update(configs)


@contextlib.contextmanager
def _combining(model: LoraModel, adapter_name: str, combine: _Combine | None) -> Iterator[None]:
    """Let PEFT ask ``combine`` for the factors of each layer. On this model alone."""
    if combine is None:
        yield
        return

    def step(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer = next(x for x in (*args, *kwargs.values()) if isinstance(x, LoraLayer))
        found = peft_layers.factors(layer, adapter_name)
        assert found is not None  # PEFT asks for layers that it has injected
        return peft_layers.laid_out(combine(layer, found[0].shape[0]), *found)

    for name in _STEPS:
        setattr(model, name, step)
    try:
        yield
    finally:
        for name in _STEPS:
            delattr(model, name)


def _complete(model: LoraModel, layers: Mapping[str, LoraLayer], adapters: Sequence[str], adapter_name: str) -> None:
    """Factors as wide as the configuration says, so that they load again, and the sources' saved modules."""
    for layer in layers.values():
        peft_layers.widen(layer, adapter_name)
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for adapter in adapters:
                if adapter in wrapper.modules_to_save:
                    source: nn.Module = wrapper.modules_to_save[adapter]
                    wrapper.modules_to_save[adapter_name].load_state_dict(source.state_dict())

"""A PEFT LoRA adapter on disk: its factors, its scales, and the whole tensors it replaces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dcmerge_ext.checkpoints.files import check_link, open_weights, read_json
from dcmerge_ext.checkpoints.patterns import check_pattern, whole_name
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.updates import compute_dtype

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
WRAPPED = ".base_layer."
"""What PEFT inserts into the names of the other parameters of a module that has LoRA."""

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
# Initialisations that subtract the adapter from the base weights: the base it adds to is not the base on disk.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Configuration entries that make the update something other than scale * B A.
_UNSUPPORTED = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "lora_bias": "LoRA with a trained bias (lora_bias)",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trainable tokens",
}

_LARGEST_ALPHA = 1e30

Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True)
class LoraFactors:
    """LoRA on one module."""

    kind: Kind
    key_a: str
    key_b: str
    key_magnitude: str | None
    """DoRA: row norms of the adapted weight."""
    rank: int
    scale: float
    shape: tuple[int, ...]
    """Of the weight it adapts, as PEFT's factors give it: (out, in), (out, in, *kernel), (num_embeddings, dim)."""
    dtype: torch.dtype


class Adapter:
    """A PEFT adapter directory.

    ``modules`` maps module paths to factors; ``values`` maps names of parameters that the adapter replaces outright to
    keys of its file; ``base_copies`` maps modules to keys of base weights that PEFT stored along with their factors.
    """

    def __init__(self, path: Path, *, lora_scale: Literal["apply", "ignore"] = "apply") -> None:
        self.path = path
        self.label = str(path)
        check_link(path / CONFIG_NAME, path)
        self.config = read_json(path / CONFIG_NAME)
        self._require_plain_lora()
        weights = next((path / name for name in WEIGHT_NAMES if (path / name).exists()), None)
        if weights is None:
            raise InputError(f"{path}: holds {CONFIG_NAME} but neither {' nor '.join(WEIGHT_NAMES)}")
        self.file = open_weights(weights)
        self.fan_in_fan_out = bool(self.config.get("fan_in_fan_out"))
        self.modules: dict[str, LoraFactors] = {}
        self.values: dict[str, str] = {}
        self.base_copies: dict[str, str] = {}
        self._read_keys(lora_scale)
        if not self.modules and not self.values:
            raise InputError(f"{weights}: holds no LoRA factors")

    @property
    def base_name(self) -> str | None:
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    def factors(self, module: str) -> LowRank:
        """The update of a module as LowRank with its scale folded in, convolutions flattened, in the compute dtype.

        linear: (out, in).   conv: (out, in * kernel).   embedding: (num_embeddings, dim).
        """
        lora = self.modules[module]
        dtype = compute_dtype(lora.dtype)
        a, b = (self.file.read(key).to(dtype) for key in (lora.key_a, lora.key_b))
        if lora.kind == "conv":
            a, b = a.flatten(1), b.flatten(1)
        update = LowRank(b, a) * lora.scale
        return update.mT if lora.kind == "embedding" else update

    def base_copy(self, module: str) -> Tensor | None:
        """The base's own weight, where PEFT stored it along (embeddings do not change under LoRA)."""
        key = self.base_copies.get(module)
        return None if key is None else self.file.read(key)

    def magnitude(self, module: str) -> Tensor | None:
        key = self.modules[module].key_magnitude
        return None if key is None else self.file.read(key).flatten()

    def value_spec(self, name: str) -> TensorSpec:
        return self.file.specs[self.values[name]]

    def value(self, name: str) -> Tensor:
        """A tensor that the adapter replaces outright (modules_to_save, trained biases)."""
        return self.file.read(self.values[name])

    def _require_plain_lora(self) -> None:
        where = self.path / CONFIG_NAME
        kind = str(self.config.get("peft_type", "")).upper()
        if kind != "LORA":
            raise InputError(f"{where}: peft_type is {kind or 'missing'}; only LORA adapters can be merged")
        init = self.config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
            raise InputError(
                f"{where}: initialised with {init}, which changes the base weights; convert it to an ordinary LoRA "
                "first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
            )
        bias, saved = self.config.get("bias"), self.config.get("modules_to_save") or []
        if bias not in (None, "none", "all", "lora_only") or not (
            isinstance(saved, list) and all(isinstance(m, str) for m in saved)
        ):
            raise InputError(
                f"{where}: bias must be none, all or lora_only and modules_to_save a list of names, "
                f"got {bias!r} and {saved!r}"
            )
        for entry, title in _UNSUPPORTED.items():
            if self.config.get(entry):
                raise InputError(f"{where}: {title} ({entry}) cannot be merged as a LoRA update")

    def _read_keys(self, lora_scale: str) -> None:
        parts: dict[str, dict[str, str]] = {}
        for key in self.file.specs:
            match = _KEY.fullmatch(key.removeprefix(PREFIX))
            if match is None:
                if "lora_" in key:
                    raise InputError(f"{self.file.label}: tensor {key!r} is not a LoRA factor this version knows")
                name = key.removeprefix(PREFIX).replace(WRAPPED, ".")
                self._once(key, self.values.setdefault(name, key))
            elif match["leaf"] == ".bias":
                raise InputError(f"{self.file.label}: tensor {key!r}: a trained LoRA bias cannot be merged")
            else:
                self._once(key, parts.setdefault(match["module"], {}).setdefault(match["part"], key))
        for module, keys in parts.items():
            self.modules[module] = self._factors_of(module, keys, lora_scale)
            if f"{module}.weight" in self.values:
                self.base_copies[module] = self.values.pop(f"{module}.weight")

    def _once(self, key: str, first: str) -> None:
        if first != key:
            raise InputError(
                f"{self.file.label}: tensors {first!r} and {key!r} have one meaning; save the adapter again"
            )

    def _factors_of(self, module: str, keys: dict[str, str], lora_scale: str) -> LoraFactors:
        infix = "lora_embedding_" if "lora_embedding_A" in keys or "lora_embedding_B" in keys else "lora_"
        key_a, key_b = keys.get(f"{infix}A"), keys.get(f"{infix}B")
        if key_a is None or key_b is None:
            raise InputError(
                f"{self.file.label}: module {module!r} has {' and '.join(sorted(keys))} but not its partner"
            )
        a, b = self.file.specs[key_a], self.file.specs[key_b]
        rank = a.shape[0] if a.shape else 0
        flat = [(s.shape[0], prod(s.shape[1:])) if len(s.shape) >= 2 else (0, 0) for s in (a, b)]
        fit = rank > 0 and flat[1][1] == rank and len(a.shape) == len(b.shape)
        fit &= a.dtype.is_floating_point and b.dtype.is_floating_point
        if not fit or (infix == "lora_embedding_" and len(a.shape) != 2):
            raise InputError(
                f"{self.file.label}: factors of {module!r} do not fit: {key_a} is {a.text}, {key_b} is {b.text}"
            )
        if infix == "lora_embedding_":
            kind: Kind = "embedding"
            shape: tuple[int, ...] = (a.shape[1], b.shape[0])
        else:
            kind = "linear" if len(a.shape) == 2 else "conv"
            shape = (b.shape[0], *a.shape[1:])
        magnitude = keys.get("lora_magnitude_vector")
        if magnitude is not None and kind != "linear":
            raise InputError(
                f"{self.file.label}: DoRA on {module!r} ({kind}) cannot be merged; DoRA on linear layers can"
            )
        if magnitude is not None and self.file.specs[magnitude].numel != shape[0]:
            found = self.file.specs[magnitude].text
            raise InputError(
                f"{self.file.label}: DoRA magnitude {magnitude} is {found}, the layer has {shape[0]} outputs"
            )
        scale = self._scale(module, rank) if lora_scale == "apply" else 1.0
        dtype = torch.promote_types(a.dtype, b.dtype)
        return LoraFactors(kind, key_a, key_b, magnitude, rank, scale, shape, dtype)

    def _scale(self, module: str, rank: int) -> float:
        """lora_alpha / r, or / sqrt(r) with rsLoRA, by the patterns of the configuration."""
        where = self.path / CONFIG_NAME
        expected = _by_pattern(where, self.config.get("rank_pattern"), module, self.config.get("r"))
        if expected is not None and expected != rank:
            raise InputError(
                f"{where}: gives rank {expected} to {module!r}, whose factors in "
                f"{self.file.label} have rank {rank}; its scale lora_alpha / r would be wrong"
            )
        alpha = _by_pattern(where, self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) <= _LARGEST_ALPHA:
            raise InputError(f"{where}: lora_alpha of {module!r} is {alpha!r}, needs a finite number")
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)


def is_adapter(path: Path) -> bool:
    """Raises InputError where its configuration is missing."""
    if not path.is_dir():
        return False
    if (path / CONFIG_NAME).exists():
        return True
    if weights := [path / name for name in WEIGHT_NAMES if (path / name).exists()]:
        raise InputError(
            f"{weights[0]}: {CONFIG_NAME} is missing beside it; save the adapter again, configuration included"
        )
    return False


def _by_pattern(where: Path, patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module path, as PEFT resolves them."""
    if patterns and not isinstance(patterns, dict):
        raise InputError(f"{where}: patterns must map module names to numbers, got {patterns!r}")
    for pattern, value in (patterns or {}).items():
        check_pattern(pattern, str(where))
        if whole_name(rf"(.*\.)?({pattern})", module, str(where)):
            return value
    return default

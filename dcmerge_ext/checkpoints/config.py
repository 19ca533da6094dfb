"""What a user asks for: one typed structure behind the command line, YAML files and Python."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from dcmerge_ext.checkpoints.patterns import check_pattern
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.methods.registry import explain, nearest

Action = Literal["copy", "mean", "merge"]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_CONDUCT = ("overwrite", "resume", "verify", "max_memory")
"""Fields that say how to go about a run: the same bytes come out of it."""


class Override(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to do differently for the tensors whose whole name matches; the first match wins."""

    match: str
    method: str | None = None
    action: Action | None = None
    scale: float | None = None
    options: dict[str, Any] = {}


class MergeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A merge, completely. Keys of a YAML file are these fields."""

    tasks: Annotated[list[str], msgspec.Meta(min_length=1)]
    out: str
    base: str | None = None
    method: str = "dc_merge"
    scale: float | None = None
    weights: list[float] | None = None
    options: dict[str, Any] = {}
    overrides: list[Override] = []
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    save_as: Literal["full", "adapter"] | None = None
    adapter_rank: Annotated[int, msgspec.Meta(ge=1)] | None = None
    shard_size: str | int = "5GB"
    max_memory: str | int | None = None
    vocab: Literal["error", "base", "skip"] = "error"
    extra: Literal["error", "ignore"] = "error"
    lora_scale: Literal["apply", "ignore"] | None = None
    overwrite: bool = False
    resume: bool = False
    verify: bool = False

    @property
    def shard_bytes(self) -> int:
        return parse_size("shard_size", self.shard_size)

    @property
    def memory_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_size("max_memory", self.max_memory)

    def settings(self) -> dict[str, Any]:
        """Every field that decides what is written, as plain values."""
        return {name: value for name, value in msgspec.to_builtins(self).items() if name not in _CONDUCT}


def parse_size(name: str, size: str | int) -> int:
    """Bytes from ``5GB``, ``512MiB`` or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(size), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    factor = _UNITS.get(unit if unit.endswith("B") or not unit else unit + "B")
    if match is None or factor is None or not 1 <= float(match[1]) * factor < 2**63:
        raise OptionError(f"{name}: {size!r} is not a size; write 5GB, 512MiB or a number of bytes")
    return int(float(match[1]) * factor)


_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML as people write numbers: 1e-3 is one (YAML 1.2), where YAML 1.1 sees a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """Parse YAML, plain data only, of a size that aliases cannot blow up. Raises yaml.YAMLError."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > _MOST_VALUES:
                raise yaml.YAMLError(f"its aliases make it more than {_MOST_VALUES} values, or endless")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        # what its constructors of numbers, dates and tags let through
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below a node with every alias written out; infinite where one refers to itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below: Any = () if isinstance(node, yaml.ScalarNode) else node.value
        known[id(node)] = 1 + sum(
            sum(_values(n, known) for n in item) if isinstance(item, tuple) else _values(item, known) for item in below
        )
    return known[id(node)]


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML configuration file, checked by :func:`build_config` together with the command line."""
    try:
        content = load_yaml(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: needs a mapping of keys such as base, tasks, out; holds a {type(content).__name__}")
    return content


def build_config(values: Mapping[str, Any], where: str = "configuration") -> MergeConfig:
    """Validate names and types.

    Raises:
        OptionError: an unknown key (the nearest is suggested), a wrong type, a pattern that is no regular expression.
    """
    known = [f.name for f in msgspec.structs.fields(MergeConfig)]
    for key in values:
        if key not in known:
            raise OptionError(f"{where}: unknown key {key!r}{nearest(str(key), known)} (known: {', '.join(known)})")
    for required, remedy in (
        ("tasks", "give --task DIR for each model or adapter to merge"),
        ("out", "give --out DIR for the merged model"),
    ):
        if values.get(required) is None:
            raise OptionError(f"{where}: {required} is missing; {remedy} (see dcmerge merge --help)")
    _check_out(str(values["out"]), where)
    try:
        config = msgspec.convert(dict(values), MergeConfig)
    except msgspec.ValidationError as error:
        raise OptionError(f"{where}: {explain(error, MergeConfig)}") from error
    except UnicodeEncodeError as error:
        raise OptionError(f"{where}: {error.object!r} is no text (half of a surrogate pair)") from error
    for name, scale in [
        ("scale", config.scale),
        *((f"scale of override {o.match!r}", o.scale) for o in config.overrides),
    ]:
        if scale is not None and not math.isfinite(scale):
            raise OptionError(f"{where}: {name} must be a finite number, got {scale}")
    for override in config.overrides:
        check_pattern(override.match, f"{where}: override", OptionError)
    _ = config.shard_bytes, config.memory_bytes
    return config


def _check_out(out: str, where: str) -> None:
    if not out.strip():
        raise OptionError(f"{where}: out is empty; give --out DIR for the merged model")
    try:
        os.fsencode(Path(out).expanduser())
    except (RuntimeError, ValueError) as error:  # no such user, half of a surrogate pair
        raise OptionError(f"{where}: out {out!r} is no path ({error})") from error
    if "\0" in out:
        raise OptionError(f"{where}: out {out!r} holds a null character")

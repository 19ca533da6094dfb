"""A checkpoint on disk as one tensor source: a Hugging Face directory (single or sharded) or a single file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from dcmerge_ext.checkpoints.files import open_weights, read_json
from dcmerge_ext.checkpoints.source import TensorSource, TensorSpec
from dcmerge_ext.errors import InputError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class ModelFiles:
    """All weights of one model, headers read, tensors on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self.config: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.aliases: dict[str, str] = {}
        self._files: dict[str, TensorSource] = {}
        if path.is_dir():
            if (path / "config.json").is_file():
                self.config = read_json(path / "config.json")
            if quantization := self.config.get("quantization_config"):
                kind = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
                raise InputError(f"{path}: quantised model ({kind}); dequantise it before merging")
            self._open_directory(path)
        else:
            self._open(open_weights(path))
        if not self._files:
            raise InputError(f"{path}: holds no tensors")

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._files[name].read(name, rows)

    def where(self, name: str) -> str:
        return self._files[name].where(name) if name in self._files else self.label

    def _open(self, file: TensorSource) -> None:
        self.specs.update(file.specs)
        self.aliases.update(file.aliases)
        self._files.update(dict.fromkeys(file.specs, file))

    def _open_directory(self, path: Path) -> None:
        for index, single in zip(_INDEXES, _SINGLE, strict=True):
            if (path / single).exists():
                return self._open(open_weights(path / single))
            if (path / index).exists():
                return self._open_sharded(path / index)
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return self._open(open_weights(found[0]))
        several = (
            f"several weight files without an index ({', '.join(f.name for f in found)})" if found else "no weights"
        )
        raise InputError(f"{path}: {several}; needs one of {', '.join(_SINGLE + _INDEXES)}")

    def _open_sharded(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: has no weight_map from tensor names to files; download or save it again")
        shards: dict[str, list[str]] = defaultdict(list)
        for name, shard in weight_map.items():
            shards[_inside(index, shard)].append(name)
        for shard, names in shards.items():
            if not (index.parent / shard).is_file():
                raise InputError(f"{index}: names {shard}, which is missing from {index.parent}; download it again")
            file = open_weights(index.parent / shard)
            known = {*file.specs, *file.aliases}
            if absent := [name for name in names if name not in known]:
                raise InputError(f"{index}: places tensor {absent[0]!r} in {shard}, which does not hold it")
            if unlisted := [name for name in file.specs if weight_map.get(name) != shard]:
                raise InputError(f"{index}: has no entry for tensor {unlisted[0]!r} of {shard}; save the model again")
            self._open(file)


def _inside(index: Path, shard: Any) -> str:
    """The shard's name, if it stays inside the directory of the index. Links of a download cache are fine."""
    parts = PurePosixPath(shard).parts if isinstance(shard, str) else ()
    if not parts or ".." in parts or PurePosixPath(shard).is_absolute() or "\\" in shard or "\0" in shard:
        raise InputError(f"{index}: names the file {shard!r}, outside its own directory; refused")
    return str(shard)

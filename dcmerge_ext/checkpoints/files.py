"""Weight files as tensor sources: safetensors, and pickles read with ``weights_only``."""

from __future__ import annotations

import json
import pickle
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcmerge_ext.checkpoints.pickles import check_archive, check_entry
from dcmerge_ext.checkpoints.source import StateDict, TensorSource, TensorSpec
from dcmerge_ext.errors import InputError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_DIMENSIONS = 64
"""Of a tensor in torch."""
_LARGEST_JSON = 256 << 20
"""Bytes. Python needs up to thirty times as much; an index of 100,000 tensors takes 10 MB."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


class SafetensorsFile:
    """A safetensors file, memory-mapped: opening reads the header only."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.aliases: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        try:
            with open(path, "rb"):
                pass  # safe_open reports a file it may not read as missing
            self._file = safe_open(path, framework="pt")
            for name in self._file.keys():  # noqa: SIM118 - not a mapping
                header = self._file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise _unmergeable(path, name, header.get_dtype())
                shape = tuple(header.get_shape())
                if prod(side or 1 for side in shape) >= 1 << 48 or len(shape) > _MOST_DIMENSIONS:
                    raise InputError(
                        f"{path}: tensor {name!r} has shape {list(shape)}, which no tensor can have; save it again"
                    )
                self.specs[name] = TensorSpec(shape, dtype)
        except SafetensorError as error:
            raise InputError(f"{path}: not a complete safetensors file ({error}); download or save it again") from error
        except OSError as error:
            raise unreadable(path, error) from error

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name) if rows is None else self._file.get_slice(name)[rows]
        return tensor

    def where(self, name: str) -> str:
        return self.label


def open_pickle(path: Path) -> StateDict:
    """A ``.bin`` / ``.pt`` state dict, mapped where its format allows; code in the pickle is refused, never run."""
    try:
        check_archive(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no mapping
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, the pickle holds more than tensors (weights_only): {_refusal(error)}; "
            "ask its author for safetensors"
        ) from error
    except Exception as error:  # a damaged pickle may call what it is allowed to with any arguments
        raise InputError(f"{path}: not a complete torch file ({_first_line(error)}); save it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    size = path.stat().st_size
    for name, tensor in content.items():
        check_entry(path, size, name, tensor)
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise _unmergeable(path, name, str(tensor.dtype).removeprefix("torch."))
    return StateDict(content, str(path))


def open_weights(path: Path) -> TensorSource:
    """Open one weight file by its suffix."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file (a directory, a pipe or a device)")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return open_pickle(path)
    raise InputError(f"{path}: unknown kind of weight file; use .safetensors, or .bin / .pt / .pth of torch")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        if not path.is_file():
            path.stat()
            raise InputError(f"{path}: is not a file (a directory, a pipe or a device)")
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path}: larger than {_LARGEST_JSON >> 20} MiB, which no such file is; save it again")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply; save it again") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: needs a JSON object, holds a {type(content).__name__}")
    return content


def check_link(file: Path, folder: Path) -> None:
    """Refuse a link out of ``folder`` where the file's content goes into the output, which is often given on.

    Links into a download cache are fine: huggingface_hub keeps contents in models--OWNER--NAME/blobs.

    Raises:
        InputError: the link leads out.
    """
    target = file.resolve()
    download = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if folder.resolve() not in target.parents and not download:
        raise InputError(f"{file}: is a link to {target}, outside its folder; put a copy in its place, or remove it")


def unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")


def _unmergeable(path: Path, name: str, dtype: str) -> InputError:
    return InputError(
        f"{path}: tensor {name!r} has dtype {dtype}, which cannot be merged; "
        "dequantise or convert the model to float32, bfloat16 or float16 first"
    )


def _refusal(error: pickle.UnpicklingError) -> str:
    """What torch refused, out of a page of advice to load it all the same."""
    found = re.search(r".*(WeightsUnpickler error|GLOBAL|Unsupported).*", str(error))
    return found[0].strip() if found else _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

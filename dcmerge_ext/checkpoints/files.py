"""Weight files as tensor sources: safetensors, and pickles read with ``weights_only``."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
                self.specs[name] = TensorSpec(tuple(header.get_shape()), dtype)
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
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no mapping
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, the pickle holds more than tensors (weights_only): {_first_line(error)}; "
            "ask its author for safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a complete torch file ({_first_line(error)}); save it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}, not a tensor; save model.state_dict() alone"
            )
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise _unmergeable(path, name, str(tensor.dtype).removeprefix("torch."))
    return StateDict(content, str(path))


def open_weights(path: Path) -> TensorSource:
    """Open one weight file by its suffix."""
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
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: needs a JSON object, holds a {type(content).__name__}")
    return content


def unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")


def _unmergeable(path: Path, name: str, dtype: str) -> InputError:
    return InputError(
        f"{path}: tensor {name!r} has dtype {dtype}, which cannot be merged; "
        "dequantise or convert the model to float32, bfloat16 or float16 first"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

"""The smallest inputs that reach every reader: a base, two fine-tunes, two adapters, calibration files, a merged model."""

from __future__ import annotations

import functools
import json
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import families
import torch
from safetensors.torch import save
from torch import Tensor

from dcmerge_ext import merge_checkpoints
from dcmerge_ext.checkpoints.files import SAFETENSORS_DTYPES

MODULES = tuple(f"layers.{i}.attention.self.query_projection" for i in range(2))  # long: patterns run on these names
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MODEL, WEIGHTS, SETTINGS = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"


def base_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {f"{m}.weight": (4, 3) for m in MODULES} | {"embed_tokens.weight": (5, 3), "layers.0.norm.weight": (3,)}
    model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**model, "position_ids": torch.arange(3)[None]}


def tuned(seed: int) -> dict[str, Tensor]:
    return families.tuned(base_tensors(), seed)


@functools.cache
def family() -> dict[str, bytes]:
    """Path -> content of every well-formed input."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the record of the merged model names its inputs as every case has them
        try:
            base = base_tensors()
            families.write_model(Path("base"), base)
            for i in range(2):
                families.write_model(Path(f"task{i}"), tuned(i))
                families.write_adapter(
                    Path(f"adapter{i}"), base, MODULES, rank=1, seed=i, rank_pattern={}, alpha_pattern={}
                )
                Path(f"grams{i}.safetensors").write_bytes(save(grams(i)))
            merge_checkpoints("base", ["task0", "adapter0"], "merged")
            return {str(p): p.read_bytes() for p in sorted(Path().rglob("*")) if p.is_file()}
        finally:
            os.chdir(before)


def grams(seed: int) -> dict[str, Tensor]:
    samples = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {f"{m}.weight": samples.mT @ samples for m in MODULES}


def put(*roles: str) -> None:
    """Write the well-formed inputs whose paths start with one of ``roles`` into the working directory."""
    for path, content in family().items():
        if path.startswith(roles):
            write(path, content)


def write(path: str, content: bytes) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def safetensors_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a well-formed file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def safetensors_bytes(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def odd_tensors(random: Random, tensors: Mapping[str, Tensor], names: Sequence[str]) -> bytes:
    """A well-formed safetensors file in which some tensors have another name, dtype or shape, or odd values."""
    entries = {
        name: [_dtype(values), list(values.shape), values.contiguous().numpy().tobytes()]
        for name, values in tensors.items()
    }
    for _ in range(random.choice([1, 1, 2, 3])):
        name = random.choice(list(entries))
        dtype, shape, _data = entries[name]
        kind = random.randrange(6)
        if kind == 0:
            entries[random.choice([*names, f"{name}.x", name.upper(), name[1:], ""])] = entries.pop(name)
        elif kind == 1:
            del entries[name]
        elif kind == 2:
            entries[random.choice(names)] = [dtype, shape, None]
        elif kind == 3:
            entries[name] = [random.choice(list(SIZES)), shape, None]
        elif kind == 4:
            entries[name] = [dtype, _shape(random, shape), None]
        else:
            entries[name] = [dtype, shape, _values(random, dtype, shape)]
        if not entries:
            break
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in sorted(entries.items(), key=lambda item: -SIZES[item[1][0]]):
        if content is None:
            content = _values(random, dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return safetensors_bytes(text + b" " * (-len(text) % 8), data)


def _dtype(values: Tensor) -> str:
    return next(name for name, dtype in SAFETENSORS_DTYPES.items() if dtype == values.dtype)


def _shape(random: Random, shape: list[int]) -> list[int]:
    """Another shape of at most a few hundred elements; or an empty one with an enormous side."""
    if random.random() < 0.1:
        return [*random.choice([[0, 2**40], [2**62, 0], [10**15, 0, 3], [0, 2**63 - 1, 2**63 - 1]])]
    changed = list(shape)
    kind = random.randrange(5)
    if kind == 0:
        changed.insert(random.randrange(len(shape) + 1), random.choice([0, 1, 1, 2]))
    elif kind == 1 and changed:
        changed.pop()
    elif kind == 2:
        changed.reverse()
    elif kind == 3 and changed:
        changed[random.randrange(len(changed))] = random.choice([0, 1, 2, 5, 9])
    else:
        changed = [1] * random.choice([0, 1, 4, 40, 70])
    return changed if prod(changed) < 10_000 else [0]  # one of the enormous shapes above, changed again


def _values(random: Random, dtype: str, shape: Sequence[int]) -> bytes:
    """Zeros, ones, random numbers, random bytes (NaN and Inf among them), or the largest and smallest there are."""
    count = prod(shape)
    kind = random.randrange(6)
    if kind == 0:
        return random.randbytes(count * SIZES[dtype])
    torch_dtype = SAFETENSORS_DTYPES[dtype]
    numbers = [random.gauss(0, 1) for _ in range(count)]
    if torch_dtype.is_floating_point:
        limits = torch.finfo(torch_dtype)
        factor = [1.0, 0.0, limits.max / 8, limits.tiny, limits.max**0.5][kind - 1]
        numbers = [x * factor for x in numbers]
        if numbers and random.random() < 0.2:
            numbers[random.randrange(count)] = random.choice([float("nan"), float("inf"), limits.max, -limits.max])
    else:
        numbers = [round(x) % 2 for x in numbers]
    return torch.tensor(numbers, dtype=torch.float64).to(torch_dtype).view(torch.uint8).numpy().tobytes()

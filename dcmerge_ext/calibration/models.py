"""A checkpoint with its samples, ready to be watched: needs transformers, imported when it is used."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from dcmerge_ext.calibration.collect import collect_grams, linear_weights
from dcmerge_ext.checkpoints.adapter import is_adapter
from dcmerge_ext.checkpoints.files import unreadable
from dcmerge_ext.checkpoints.model import ModelFiles
from dcmerge_ext.errors import InputError, OptionError

logger = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_MOST_TOKENS = 512


def require_package(module: str, package: str) -> None:
    """Raise InputError where an optional package is missing."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"calibrate needs {package}; install it with: pip install {package}")


def calibrate(
    model: Path, batches: Iterable[Mapping[str, Any]], *, match: str | None, device: torch.device
) -> dict[str, Tensor]:
    """Gram matrices of the linear layers of a saved model, by the names of the checkpoint's tensors.

    Args:
        model: a Hugging Face directory; its own architecture is loaded, in float32.
        batches: keyword arguments of the model.   match: regular expression for the whole name of a weight; None: all.
    Raises:
        InputError: a model that cannot be loaded, or run on these inputs alone; no weight of that name.
    """
    network = load_model(model).to(device)
    if getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{model}: {type(network).__name__} needs inputs for its encoder and its decoder; "
            "call dcmerge_ext.calibration.collect_grams in Python with batches of both"
        )
    names = _chosen(network, model, match)
    moved = ({key: value.to(device) for key, value in batch.items()} for batch in batches)
    try:
        return collect_grams(network, moved, names=names)
    except InputError:
        raise
    except Exception as error:  # whatever a model raises on inputs that it does not take
        raise InputError(
            f"{model}: {type(network).__name__} does not run on these samples ({type(error).__name__}: {error}); "
            "call dcmerge_ext.calibration.collect_grams in Python with batches of your own"
        ) from error


def check_model(path: Path) -> None:
    """Raise InputError for an adapter: its modules have names of their own, and it may have no tokenizer."""
    if is_adapter(path):
        raise InputError(
            f"{path}: is an adapter; make the model that it adapts first, by `dcmerge merge --base BASE --task {path} "
            "--method averaging --out DIR`, and calibrate that"
        )


def load_model(path: Path) -> nn.Module:
    """The model of a directory, in the class that its configuration names, in float32.

    Raises:
        InputError: an adapter, or whatever transformers cannot load.
    """
    check_model(path)
    require_package("transformers", "transformers")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        named = (getattr(config, "architectures", None) or [""])[0]
        cls: Any = getattr(transformers, named, None) or transformers.AutoModel
        network: nn.Module = cls.from_pretrained(path, config=config)
    except Exception as error:  # whatever the library raises on a directory that it does not understand
        raise InputError(f"{path}: transformers cannot load it ({_first_line(error)})") from error
    return network.float()


def text_batches(model: Path, file: Path, count: int) -> list[dict[str, Tensor]]:
    """The first ``count`` lines of a file that are not empty, each as a batch of its own: nothing is padded."""
    require_package("transformers", "transformers")
    import transformers

    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise unreadable(file, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file in UTF-8 ({error})") from error
    if not lines:
        raise InputError(f"{file}: holds no text; write one sample per line")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{model}: transformers finds no tokenizer in it ({_first_line(error)})") from error
    positions = getattr(config, "max_position_embeddings", None) or _MOST_TOKENS
    most = min(_MOST_TOKENS, int(tokenizer.model_max_length), positions)
    _log_count(file, "lines", len(lines), count)
    return [dict(tokenizer(line, truncation=True, max_length=most, return_tensors="pt")) for line in lines[:count]]


def image_batches(model: Path, folder: Path, count: int) -> list[dict[str, Tensor]]:
    """The first ``count`` pictures of a directory, in the order of their names, each as a batch of its own."""
    require_package("transformers", "transformers")
    require_package("PIL", "pillow")
    import transformers
    from PIL import Image

    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; --images takes a directory of pictures")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(f"{folder}: holds no pictures ({', '.join(_SUFFIXES)})")
    try:
        auto: Any = transformers.AutoImageProcessor  # untyped
        processor = auto.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{model}: transformers finds no image processor in it ({_first_line(error)})") from error
    _log_count(folder, "pictures", len(files), count)
    batches = []
    for file in files[:count]:
        try:
            with Image.open(file) as picture:
                batches.append(dict(processor(images=picture.convert("RGB"), return_tensors="pt")))
        except OSError as error:
            raise InputError(f"{file}: not a picture that can be read ({_first_line(error)})") from error
    return batches


def stored_names(network: nn.Module, path: str | Path) -> dict[str, str]:
    """Weight of a linear layer -> the tensor of the checkpoint it was loaded from: of its name, or else of its values.

    Transformers loads many checkpoints into modules of other names. Layers whose weight is an embedding, too, or stored
    nowhere, or the same as several others, are left out.
    """
    stored = ModelFiles(Path(path))
    linear = linear_weights(network)
    elsewhere = {
        id(parameter)
        for module in set(network.modules()) - set(linear.values())
        for parameter in module.parameters(recurse=False)
    }
    layers = {name: module.weight for name, module in linear.items() if id(module.weight) not in elsewhere}
    names = {name: name for name in layers if name in stored.specs}
    others: dict[bytes, list[str]] = defaultdict(list)
    if len(names) < len(layers):
        for name, spec in stored.specs.items():
            if len(spec.shape) == 2 and spec.dtype.is_floating_point and name not in names:
                others[_digest(stored.read(name))].append(name)
    for name, weight in layers.items():
        if name not in names and len(alike := others[_digest(weight)]) == 1:
            names[name] = alike[0]
    if len(names) < len(layers):
        logger.info("%s: %d linear layers are not stored, or not told apart", path, len(layers) - len(names))
    return names


def _chosen(network: nn.Module, path: Path, match: str | None) -> dict[str, str]:
    names = stored_names(network, path)
    if not names:
        raise InputError(
            f"{path}: stores none of the linear layers of {type(network).__name__}; "
            "call dcmerge_ext.calibration.collect_grams in Python with names of your own"
        )
    if match is None:
        return names
    try:
        chosen = {name: key for name, key in names.items() if re.fullmatch(match, key)}
    except re.error as error:
        raise OptionError(f"--match {match}: not a regular expression ({error})") from error
    if not chosen:
        example = next(iter(names.values()))
        raise OptionError(f"--match {match}: fits the whole name of none of {len(names)} weights such as {example!r}")
    return chosen


def _digest(weight: Any) -> bytes:
    return xxhash.xxh3_128_digest(weight.detach().float().cpu().contiguous().numpy().data)


def _log_count(path: Path, kind: str, found: int, count: int) -> None:
    if found > count:
        logger.info("%s: the first %d of %d %s are used", path, count, found, kind)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

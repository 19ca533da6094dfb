"""Whether the library that an output is for takes it: configuration, names and shapes. No weights are loaded.

What cannot be told here - the library is not installed, or does not know the model - is logged, not refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dcmerge_ext.checkpoints.adapter import PREFIX
from dcmerge_ext.checkpoints.files import read_json
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.errors import RunError

logger = logging.getLogger(__name__)

_RANK_SIDE = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(_RANK_SIDE)})(?:\.weight)?")


def check_transformers(out: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Build the model that the configuration describes, without memory for weights, and compare names and shapes.

    Raises:
        RunError: a shape differs, or no name fits.
    """
    if not (out / "config.json").is_file():
        logger.info("%s: has no config.json; whether transformers loads it was not checked", out)
        return
    try:
        import transformers

        auto: Any = transformers.AutoModel  # without annotations
    except ImportError:
        logger.info("%s: transformers is not installed; whether it loads the model was not checked", out)
        return
    try:
        config = transformers.AutoConfig.from_pretrained(out, local_files_only=True)
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            model: Any = auto.from_config(config) if cls is None else cls(config)
    except Exception as error:  # custom code, models newer than the library: many kinds
        logger.info("%s: transformers cannot tell (%s); loading was not checked", out, _first_line(error))
        return
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."  # a bare model loads from one with a head, and the other way round
    fitting = {key: key if key in specs else _other(key, prefix, specs) for key in wanted}
    found = {key: own for key, own in fitting.items() if own is not None}
    if not found:
        raise RunError(
            f"{out}: {type(model).__name__} of transformers has none of its tensors; check config.json of the base"
        )
    for key, own in found.items():
        if specs[own].shape != wanted[key]:
            raise RunError(
                f"{out}: tensor {own!r} is {specs[own].text}, and {type(model).__name__} of transformers expects "
                f"{'x'.join(map(str, wanted[key]))}; check config.json of the base"
            )
    logger.info("%s: %s of transformers takes %d of its %d tensors", out, type(model).__name__, len(found), len(wanted))


def check_peft(out: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Read the configuration with PEFT, and compare the factors' ranks with it.

    Raises:
        RunError: PEFT does not take the configuration, or a rank differs.
    """
    config = read_json(out / "adapter_config.json")
    try:
        from peft import LoraConfig
    except ImportError:
        logger.info("%s: PEFT is not installed; whether it loads the adapter was not checked", out)
    else:
        try:
            LoraConfig.from_pretrained(str(out))
        except Exception as error:
            raise RunError(f"{out}: PEFT does not take adapter_config.json ({_first_line(error)})") from error
    for name, spec in specs.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        pattern = config["rank_pattern"]
        rank = next((r for p, r in pattern.items() if re.fullmatch(rf"(?:.*\.)?(?:{p})", match[1])), config["r"])
        if spec.shape[_RANK_SIDE[match[2]]] != rank:
            raise RunError(f"{out}: tensor {name!r} is {spec.text}, and adapter_config.json gives it rank {rank}")


def _other(key: str, prefix: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The name of a tensor with the model's prefix added or taken away."""
    names = (prefix + key, key.removeprefix(prefix))
    return next((name for name in names if name in specs), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Small models, adapters and hand-made files for the tests of checkpoints, and one way to run the command line."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcmerge_ext.cli import main

# --- the command line --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a run of the command line returned and printed."""

    status: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Result:
    """Run ``dcmerge`` in this process."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return Result(status, printed.out, printed.err)


def merged(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str | Path) -> dict[str, Tensor]:
    """Run a merge that must succeed; the tensors it wrote."""
    result = run(capsys, "merge", "--out", out, *arguments)
    assert result.status == 0, result.err
    assert not out.with_name(out.name + ".partial").exists()
    return read_model(out)


def refused(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    *arguments: str | Path,
    says: Sequence[str | Path],
    status: int = 1,
    command: str = "merge",
) -> str:
    """Run a merge that must be refused: one message with every part of ``says``, and ``folder`` as it was before.

    Returns the message.
    """
    before = tree(folder)
    result = run(capsys, command, *arguments)
    assert result.status == status, f"status {result.status}\n{result.err}"
    assert "Traceback" not in result.err
    title = "error: " if status == 1 else "failed: "
    messages = [line for line in result.err.splitlines() if line.startswith(title)]
    assert len(messages) == 1, result.err
    assert result.err.rstrip().endswith(messages[0]), f"the message must come last\n{result.err}"
    for part in says:
        assert str(part) in messages[0], messages[0]
    assert result.out == ""
    assert tree(folder) == before
    return messages[0]


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Every path below a folder with its content: bytes of a file, target of a link, None for a directory."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def tasks(*paths: Path | str) -> list[str]:
    return [argument for path in paths for argument in ("--task", str(path))]


# --- a family without any library: every kind of tensor that a checkpoint may hold ---------------------------------------

SHAPES = {
    "embed_tokens.weight": (20, 8),
    "layers.0.attn.weight": (12, 8),
    "layers.0.mlp.weight": (8, 12),
    "layers.0.norm.weight": (8,),
    "layers.0.gain": (),
    "layers.0.moe.experts.weight": (3, 6, 8),
    "layers.0.conv.weight": (4, 3, 3, 3),
    "layers.1.attn.weight": (12, 8),
    "lm_head.weight": (20, 8),
}


def toy(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model of ten floating tensors, an empty one, and integer and boolean buffers."""
    generator = torch.Generator().manual_seed(seed)
    model = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    frozen = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    frozen[0, :2] = torch.tensor([-0.0, 0.0])
    model["frozen.weight"] = frozen
    model["empty.weight"] = torch.zeros(0, 8)
    return {name: values.to(dtype) for name, values in model.items()} | {
        "position_ids": torch.arange(7).reshape(1, 7) + 3_000_000_000,
        "mask": torch.tensor([[True, False], [True, True]]),
        "steps": torch.tensor(17, dtype=torch.int32),
    }


def tuned(base: Mapping[str, Tensor], seed: int, amount: float = 0.1) -> dict[str, Tensor]:
    """A fine-tune of every floating tensor but ``frozen.weight``, in the base's dtypes; its buffers differ too."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    model = {}
    for name, values in base.items():
        if name == "frozen.weight":
            model[name] = values.clone()
        elif values.is_floating_point():
            change = amount * torch.randn(values.shape, generator=generator, dtype=torch.float64)
            model[name] = (values.double() + change).to(values.dtype)
        else:
            model[name] = values.logical_not() if values.dtype == torch.bool else values + seed
    return model


# --- writing models ------------------------------------------------------------------------------------------------------

FORMS = ("single", "sharded", "bin", "sharded bin", "odd name")


def write_model(
    path: Path, tensors: Mapping[str, Tensor], form: str = "single", *, config: Mapping[str, Any] | None = None
) -> Path:
    """A model directory in one of FORMS. Tied tensors stay tied in ``bin``. Returns the directory."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "toy", "dtype": "float32"}))
    if form in ("single", "odd name"):
        save_file(dict(tensors), path / ("model.safetensors" if form == "single" else "weights.fp32.safetensors"))
    elif form == "bin":
        torch.save(dict(tensors), path / "pytorch_model.bin")
    else:
        suffix = "safetensors" if form == "sharded" else "bin"
        stem = "model" if form == "sharded" else "pytorch_model"
        shards: list[dict[str, Tensor]] = [{}, {}, {}]
        for i, (name, values) in enumerate(tensors.items()):
            shards[i % 3][name] = values
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = f"{stem}-{i:05d}-of-00003.{suffix}"
            weight_map.update(dict.fromkeys(shard, file))
            if form == "sharded":
                save_file(shard, path / file)
            else:
                torch.save(shard, path / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return path


def read_model(path: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a directory."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        content = load_file(file)
        assert not found.keys() & content.keys()
        found.update(content)
    return found


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header: JSON values or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal dtype, shape and stored bytes; tells -0.0 from 0.0."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
    return torch.equal(a, b)


# --- adapters by hand ----------------------------------------------------------------------------------------------------


def write_adapter(
    path: Path,
    base: Mapping[str, Tensor],
    modules: Sequence[str] = ("layers.0.attn", "layers.1.attn"),
    *,
    rank: int = 2,
    seed: int = 0,
    prefix: str = "base_model.model.",
    extra: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A LoRA adapter of modules of ``base`` with random factors, as PEFT lays it out. Returns its directory."""
    generator = torch.Generator().manual_seed(2_000 + seed)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        out, *rest = base[f"{module}.weight"].shape
        tensors[f"{prefix}{module}.lora_A.weight"] = 0.3 * torch.randn(rank, *rest, generator=generator)
        tensors[f"{prefix}{module}.lora_B.weight"] = 0.3 * torch.randn(
            out, rank, *([1] * (len(rest) - 1)), generator=generator
        )
    path.mkdir(parents=True)
    save_file({**tensors, **(extra or {})}, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), "bias": "none",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return path


# --- models of transformers, adapters of PEFT -------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what transformers and PEFT say while models are built, saved and loaded."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)


def tiny(kind: str, **settings: Any) -> nn.Module:
    """A randomly initialised model: bert, bert-classifier, gpt2, gpt2-lm, llama-lm, t5, vit, resnet."""
    import transformers as hf

    kinds: dict[str, tuple[Callable[..., Any], Callable[[Any], nn.Module], dict[str, Any]]] = {
        "bert": (hf.BertConfig, hf.BertModel, _BERT),
        "bert-classifier": (hf.BertConfig, hf.BertForSequenceClassification, _BERT),
        "gpt2": (hf.GPT2Config, hf.GPT2Model, _GPT2),
        "gpt2-lm": (hf.GPT2Config, hf.GPT2LMHeadModel, _GPT2),
        "llama-lm": (hf.LlamaConfig, hf.LlamaForCausalLM, _LLAMA),
        "t5": (hf.T5Config, hf.T5ForConditionalGeneration, _T5),
        "vit": (hf.ViTConfig, hf.ViTModel, _VIT),
        "resnet": (hf.ResNetConfig, hf.ResNetModel, _RESNET),
    }
    config, model, defaults = kinds[kind]
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(5)
        built = model(config(**{**defaults, **settings}))
        # initial biases and norms are zeros and ones: any mistake with them would go unseen
        for parameter in built.parameters():
            if parameter.ndim < 2:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


_BERT = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36,
    "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
_GPT2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2}
_LLAMA = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "tie_word_embeddings": True,
}  # fmt: skip
_T5 = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 36,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_VIT = {
    "image_size": 8, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 36,
}  # fmt: skip

_RESNET = {"embedding_size": 6, "hidden_sizes": [6, 10], "depths": [1, 1], "layer_type": "basic"}


def save_pretrained(model: nn.Module, path: Path, **settings: Any) -> Path:
    with quiet():
        model.save_pretrained(path, **settings)  # type: ignore[operator]
    return path


def load_pretrained(model: nn.Module | type, path: Path) -> nn.Module:
    """The directory as a model of the same class."""
    cls = model if isinstance(model, type) else type(model)
    with quiet():
        return cls.from_pretrained(path).eval()


def perturbed(path: Path, out: Path, seed: int, amount: float = 0.02) -> Path:
    """A full fine-tune of a saved model: the same files with every floating tensor moved."""
    out.mkdir(parents=True)
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            save_file(tuned(load_file(file), seed, amount), out / file.name, metadata={"format": "pt"})
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def save_lora(
    base: Path, model: type, out: Path, *, seed: int, dtype: torch.dtype | None = None, **config: Any
) -> Path:
    """A PEFT adapter of a saved model with random factors (and whatever else it trains moved). Returns its directory."""
    from peft import LoraConfig, get_peft_model

    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(load_pretrained(model, base), LoraConfig(**config))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                moved = 0.1 * torch.randn_like(parameter)
                parameter.data = parameter.data + moved if "lora_" not in name or "magnitude" in name else moved
            if dtype is not None and "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        wrapped.save_pretrained(out)
    return out


def peft_update(base: Path, model: type, adapter: Path) -> dict[str, Tensor]:
    """What PEFT's own merge_and_unload adds to the base, in float64."""
    from peft import PeftModel

    plain = load_pretrained(model, base).state_dict()
    with quiet():
        whole = (
            PeftModel.from_pretrained(load_pretrained(model, base).double(), adapter).merge_and_unload().state_dict()
        )
    return {name: whole[name].double() - values.double() for name, values in plain.items()}


def outputs(model: nn.Module) -> Tensor:
    """Deterministic output of a tiny model."""
    config: Any = model.config
    with torch.no_grad():
        if config.model_type in ("vit", "resnet"):
            side = 8 if config.model_type == "vit" else 32
            pixels = torch.linspace(-1, 1, 2 * 3 * side * side).sin().reshape(2, 3, side, side)
            return model(pixel_values=pixels).last_hidden_state
        ids = torch.arange(24).reshape(2, 12) % config.vocab_size
        if config.model_type == "t5":
            return model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
        found = model(input_ids=ids)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def adapted_outputs(base: Path, model: type, adapter: Path) -> Tensor:
    """Output of the base with the adapter loaded by PEFT; every key of the adapter file must be used."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    with quiet():
        wrapped = PeftModel.from_pretrained(load_pretrained(model, base), adapter)
        found = set_peft_model_state_dict(wrapped, load_peft_weights(str(adapter), device="cpu"))
        assert not found.unexpected_keys, found.unexpected_keys
        return outputs(wrapped.get_base_model().eval())

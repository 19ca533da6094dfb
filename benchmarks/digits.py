"""Real full fine-tunes, made offline: a small vision transformer on scikit-learn's handwritten digits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TASKS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda images: images.rot90(1, (-2, -1)),
    lambda images: images.rot90(2, (-2, -1)),
    lambda images: images.rot90(3, (-2, -1)),
    lambda images: images.flip(-1),
    lambda images: images.flip(-2),
    lambda images: images.mT,
    lambda images: images.flip(-2, -1).mT,
    lambda images: 1 - images,
)
"""The ways a task shows its digits: the seven symmetries of the square other than the identity, and the negative."""


def attention_updates(cache: Path, hidden: int, *, steps: int) -> list[Tensor]:
    """What eight fine-tunes added to the attention output (hidden, hidden) of a transformer's last layer, float32.

    The common start has learnt the digits as they are; each task goes on from it with AdamW at 1e-4 on all weights.
    The first layer would not do: its inputs span the few dimensions of 2 x 2 pixels and 17 positions.

    Args:
        cache: where the result is kept.   steps: of the start, and of each fine-tune; batches of 16 images.
    """
    path = cache / f"digits-{hidden}-{steps}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        save_file({f"task{i}": update for i, update in enumerate(_fine_tunes(hidden, steps))}, path)
    stored = load_file(path)
    return [stored[f"task{i}"] for i in range(len(TASKS))]


def _fine_tunes(hidden: int, steps: int) -> list[Tensor]:
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()
    settings: dict[str, Any] = {
        "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10, "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 12,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = _train(ViTForImageClassification(ViTConfig(**settings)), images, labels, steps)
        tuned = [_train(copy.deepcopy(start), show(images), labels, steps) for show in TASKS]
    return [_attention_output(model) - _attention_output(start) for model in tuned]


def _train(model: Any, images: Tensor, labels: Tensor, steps: int) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for batch in torch.randint(len(images), (steps, 16)):
        loss = model(pixel_values=images[batch, None], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _attention_output(model: Any) -> Tensor:
    weight: Tensor = model.vit.layers[-1].attention.o_proj.weight
    return weight.detach()

"""Real handwritten digits, and five tasks on them: each a question about the digit and a way the image is shown.

The images are the 1,797 digits of scikit-learn's ``load_digits`` (UCI Optical Recognition of Handwritten Digits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LOOPS = torch.tensor(
    [1, 0, 0, 0, 0, 0, 1, 0, 2, 1]
)  # closed loops in the usual shape of 0..9; an open-topped 4 has none
_PRIMES = torch.tensor([2, 3, 5, 7])
_STRIPES = (torch.arange(8) % 2 == 0).float()[:, None]


@dataclass(frozen=True)
class Question:
    """What is asked about a digit."""

    text: str
    answers: tuple[str, ...]
    label: Callable[[Tensor], Tensor]
    """Digits (N,) -> index of the right answer (N,)."""


@dataclass(frozen=True)
class Task:
    """One question, asked about images shown in one way."""

    name: str
    """Also the name of its checkpoint's directory."""
    question: Question
    show: Callable[[Tensor], Tensor]
    """Images (N, 8, 8) in [0, 1] -> images of the same shape and range."""

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


QUESTIONS = (
    Question("which digit?", tuple("0123456789"), lambda digits: digits),
    Question("odd or even?", ("even", "odd"), lambda digits: digits % 2),
    Question("how many closed loops?", ("0", "1", "2"), lambda digits: _LOOPS[digits]),
    Question("greater than four?", ("no", "yes"), lambda digits: (digits > 4).long()),
    Question("prime number?", ("no", "yes"), lambda digits: torch.isin(digits, _PRIMES).long()),
)

TASKS = (
    Task("upside_down", QUESTIONS[0], lambda images: images.flip(-2, -1)),
    Task("negative", QUESTIONS[1], lambda images: 1 - images),
    Task("striped", QUESTIONS[2], lambda images: (images - _STRIPES).abs()),
    Task("mirrored", QUESTIONS[3], lambda images: images.flip(-1)),
    Task("sideways", QUESTIONS[4], lambda images: images.rot90(1, (-2, -1))),
)


def num_outputs() -> int:
    """Outputs of the one classifier: the answers of all questions, side by side."""
    return sum(len(question.answers) for question in QUESTIONS)


def outputs_of(question: Question) -> slice:
    """Which outputs of the classifier are this question's answers."""
    start = sum(len(other.answers) for other in QUESTIONS[: QUESTIONS.index(question)])
    return slice(start, start + len(question.answers))


@dataclass(frozen=True)
class Images:
    """Digits: ``pixels`` (N, 8, 8) float32 in [0, 1], ``digits`` (N,) int64, ``index`` (N,) their place in the set."""

    pixels: Tensor
    digits: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.digits)


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the data set; all tasks share the images of a part, each in its own way of showing them."""

    base: Images
    """To train the base model."""
    train: Images
    """To fine-tune it."""
    validation: Images
    """To choose the scale of each merging method."""
    test: Images
    """For every accuracy that is reported."""


def load_splits(seed: int) -> Splits:
    """The digits in four disjoint parts of 400, 697, 300 and 400 images with the same share of each digit."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = torch.from_numpy(data.images).float() / 16  # 17 grey levels, 0..16
    digits = torch.from_numpy(data.target).long()
    rest = torch.arange(len(digits)).numpy()
    parts = {}
    for name, size in (("test", 400), ("validation", 300), ("base", 400)):
        rest, parts[name] = train_test_split(rest, test_size=size, stratify=digits.numpy()[rest], random_state=seed)
    parts["train"] = rest
    return Splits(
        **{name: Images(pixels[index], digits[index], torch.from_numpy(index)) for name, index in parts.items()}
    )

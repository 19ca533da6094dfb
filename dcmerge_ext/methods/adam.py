"""Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), for the methods that descend a loss on the updates alone."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.999)
EPS = 1e-8


class Adam:
    """Steps of ``lr`` on X in place, from a gradient that the caller finds."""

    def __init__(self, X: Tensor, lr: float, eps: float = EPS) -> None:
        self._X, self._lr, self._eps = X, lr, eps
        self._first, self._second = torch.zeros_like(X), torch.zeros_like(X)
        self._steps = 0

    def step(self, gradient: Tensor) -> None:
        self._steps += 1
        beta1, beta2 = _BETAS
        self._first.lerp_(gradient, 1 - beta1)
        self._second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = self._second.sqrt().div_((1 - beta2**self._steps) ** 0.5).add_(self._eps)
        self._X.addcdiv_(self._first, root, value=-self._lr / (1 - beta1**self._steps))


def warn_if_raised(name: str, iterations: int, lr: float, before: float, after: float) -> None:
    """A warning where the steps took the loss up: they are absolute, and may be too long for the updates at hand."""
    if after > before:
        logger.warning(
            "%s: %d steps of lr %g raised the loss from %.3g to %.3g: too long for updates of this size, lower lr",
            name,
            iterations,
            lr,
            before,
            after,
        )

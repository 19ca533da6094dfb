"""The cover basis as the maximum of an objective (DC-Merge, arXiv 2603.06242, algorithm 2), instead of a polar factor.

Over orthonormal U~, V~, with P = U~' U and Q = V~' V (k x k), the paper maximizes what the dyads of the basis keep of the
tasks' dyads:
    L = sum over all (a, c) of (P o Q)_ac^2          at most k
The polar factors come near (they are not stationary points). Everything takes place in their span, and there
U~ X with X orthogonal has P = X' H: the ascent is over two orthogonal k x k matrices, whatever m and n are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dcmerge_ext.backends import prefers_products
from dcmerge_ext.linalg.polar import polar
from dcmerge_ext.methods.cover import Cover, Side
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.products import wide_product
from dcmerge_ext.updates import UpdateSpec

_STATIONARY = 1e-8
"""Norm of the gradient, divided by sqrt(k), at which the ascent ends: float64."""
_ROUND_OFF = 32
"""Times the eps of the coordinates: the same, where they are known to fewer digits."""
_SHORTEST = 2.0**-20
"""Fraction of a step below which round-off decides whether the objective rises."""
_LEAST_CURVATURE = 1e-3
"""Relative to the largest: dyads that nothing holds in place must not move arbitrarily far."""


def stiefel_cover(cover: Cover, steps: int) -> tuple[Cover, list[list[float]]]:
    """The cover turned, inside its span, to a maximum of L; and L before and after each step, per matrix of the batch.

    Starts from the polar factors, not from the singular vectors of the sum of the updates as the paper does: L takes no
    notice of the order of the basis vectors, which the structural mask needs. From there each one stays that of its
    component where k is well below min(m, n); where it is as large, a fifth went over to components of other tasks
    (measured at k = 192 and 384), and the mask drops those. Where L has several maxima, it is the one nearby. Task order
    does not matter.

    L gives a direction that tasks nearly share to one basis vector, where the polar factors halve it among them: the
    masked sum of near copies of a task is their sum, that of the polar cover half of it and noise. Exact copies (to about
    1e-5) are a saddle, where no step is taken: round-off would choose.

    ``root`` of the new sides is U~' U, no longer symmetric. Directions dropped from a rank-deficient basis stay dropped.
    """
    *leading, k, _ = cover.u.root.shape
    roots = [side.root.double().reshape(-1, k, k) for side in (cover.u, cover.v)]
    stationary = max(_STATIONARY, _ROUND_OFF * torch.finfo(cover.u.root.dtype).eps)
    found = side_by_side(
        lambda pair: ascend(pair[0], pair[1], steps, stationary),
        list(zip(*roots, strict=True)),
        at_most=1 if prefers_products(cover.u.root) else None,
        each=1 if leading else None,
    )
    X, Y = (torch.stack([matrices[i] for matrices, _ in found]).reshape(*leading, k, k) for i in range(2))
    return Cover(_turned(cover.u, X), _turned(cover.v, Y), cover.spectra), [trace for _, trace in found]


def stiefel_flops(specs: Sequence[UpdateSpec], ranks: Sequence[int], steps: int) -> float:
    """Of all steps, 90 k^3 each: the polar factors of two k x k matrices, and 8 products."""
    return float(90 * steps * sum(ranks) ** 3 * math.prod(specs[0].shape[:-2]))


def ascend(
    P: Tensor, Q: Tensor, steps: int, stationary: float = _STATIONARY
) -> tuple[tuple[Tensor, Tensor], list[float]]:
    """Orthogonal X, Y (k, k) that maximize L(X' P, Y' Q) from the identity, and L from the start, never falling.

    The gradient is dL/dX = 2 X G, G = P (P o Q o Q)'; its tangent part X (G - G') is divided by the curvature that a
    turn of the plane (a, c) meets near the maximum, g_a + g_c with g the diagonal of G, so that no step size is to be
    chosen. A step is X <- X polar(I + K), halved until L does not fall: 90 k^3 flops, and 16 k^2 numbers. On one core it
    takes 0.03 s at k = 192 and 0.2 s at 384; adapters come to rest within some tens, full fine-tunes take all 250.
    """
    k = P.shape[-1]
    eye = torch.eye(k, dtype=P.dtype, device=P.device)
    turns = torch.stack([eye, eye])
    sides = torch.stack([P, Q])
    value = _objective(sides)
    trace = [value]
    for _ in range(steps):
        dyads = sides[0] * sides[1]
        gradient = sides @ (dyads * sides.flip(0)).mT
        tangent = gradient - gradient.mT
        if float(tangent.norm()) <= stationary * math.sqrt(k):
            break
        weight = dyads.square().sum(-1)  # the diagonal of both gradients
        curvature = (weight[:, None] + weight).clamp(min=_LEAST_CURVATURE * float(weight.max()))
        direction = tangent / curvature
        length = 1.0
        while length >= _SHORTEST:
            turn = polar(eye + length * direction).Q
            trial = turn.mT @ sides
            if (reached := _objective(trial)) >= value:
                break
            length /= 2
        else:
            break
        turns, sides, value = turns @ turn, trial, reached
        trace.append(value)
    X, Y = polar(turns).Q  # what many products left of orthogonality
    return (X, Y), trace


def _objective(sides: Tensor) -> float:
    return float((sides[0] * sides[1]).square().sum())


def _turned(side: Side, X: Tensor) -> Side:
    root = (X.mT @ side.root.double()).to(side.root.dtype)
    if side.mix is None:
        return Side(wide_product(side.factor, X), None, root, side.values)
    return Side(side.factor, side.mix @ X, root, side.values)

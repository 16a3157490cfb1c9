"""The safeguard of winners of Diffusion-SDPO (Fu et al. 2025, arXiv 2511.03317): the loser's gradient, scaled per pair.

Raising a margin lowers the winner's error A and raises the loser's, B. Where their gradients point the same way, the
second undoes the first, and both errors may grow. With the loser's gradient times lambda, a step along
-a grad A + lambda b grad B changes A, to first order, by no more than -mu a |grad A|^2 if

    lambda <= (1 - mu) a |grad A|^2 / (b <grad A, grad B>),  where that product is positive,

a and b the weights of the two errors in the loss, which are equal for losses of the margin alone. As there, the
gradients are those by the model's output, 2 (prediction - target), and lambda is at most 1. It changes gradients, and
no score, loss or metric. The published code takes one lambda for the batch of a process; here each pair has its own, so
that none depends on the others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.errors import PlanError


def loser_scales(
    name: str,
    residuals: Mapping[int, Sequence[Tensor]],
    coefficients: Float[Tensor, " 2P"],
    mu: float,
    called: Callable[[int], str] = "pair {} of the batch".format,
) -> Float[Tensor, " P"]:
    """lambda of each pair.

    Args:
        name: the node, for errors.
        residuals: of each row, winners before losers: prediction - target of each of its draws. A draw without one at
            its place on the other side has no part in the product.
        coefficients: the derivative of the loss by each row's score.
        mu: in [0, 1], how much of the winner's own decrease is to stay.
        called: what an error calls the pair of a place.

    Raises:
        PlanError: where the two sides' samples differ in shape, so that their gradients have no product.
    """
    count = len(coefficients) // 2
    scales = torch.ones_like(coefficients[:count])
    for pair in range(count):
        winner, loser = -coefficients[pair], coefficients[pair + count]
        if winner <= 0 or loser <= 0:
            continue  # the loss does not trade the loser's error for the winner's
        sides = residuals.get(pair, ()), residuals.get(pair + count, ())
        product = torch.zeros((), dtype=torch.float64, device="cpu")
        for place, (ours, theirs) in enumerate(zip(*sides, strict=False)):
            if ours.shape != theirs.shape:
                raise PlanError(
                    f"Node {name!r}: winner_safeguard compares samples of one shape, but {called(pair)} has "
                    f"{tuple(ours.shape)} and {tuple(theirs.shape)} (value {place}). Give both sides one size, or "
                    "leave it out."
                )
            product += (ours.double() * theirs.double()).sum().cpu()
        if product > 0:
            square = torch.stack([ours.double().square().sum().cpu() for ours in sides[0]]).sum()
            scales[pair] = ((1 - mu) * float(winner / loser) * square / product).clamp(max=1)
    return scales

"""Training for the worst of several groups of pairs: group distributionally robust optimisation.

The aim is min over the policy of max over groups g of L_g, the mean loss of the group's pairs: a game with weights q
over groups that climb while the policy descends (Sagawa et al. 2020, arXiv 1911.08731; for DPO Ramesh et al. 2024,
arXiv 2405.20304): q_g <- q_g exp(eta L_g), normalised, and the policy's loss is sum_g q_g L_g.

With s_g the group's share of the data, a pair of group g counts q_g / s_g times. The mean over pairs, of any batch, is
then an unbiased estimate of sum_g q_g L_g, so that it adds up over accumulated batches and processes like any mean;
L_g is estimated alike, by the sum over its pairs seen in an optimizer step over s_g times all pairs seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.data.preferences import Feedback
from sysdag.errors import DataError, SerializationError


class GroupWeights:
    """q over the groups of some pairs, which starts at the groups' shares: the first step is that of the plain mean.

    Args:
        pairs: all that are trained on.
        step_size: eta.

    Attributes:
        shares: of the pairs, by group.

    Raises:
        DataError: for a pair without a group, or fewer than two groups.
    """

    def __init__(self, pairs: Sequence[Feedback], step_size: float) -> None:
        counts: Counter[str] = Counter()
        for number, pair in enumerate(pairs):
            if pair.group is None:
                raise DataError(f"group_dro=True: pair {number} has no `group`; every row needs a name or number.")
            counts[pair.group] += 1
        if len(counts) < 2:
            raise DataError(f"group_dro=True needs two groups or more in the column `group`, got {sorted(counts)}.")
        self.shares = {group: counts[group] / len(pairs) for group in sorted(counts)}
        self.step_size = step_size
        self._log_weights = {group: math.log(share) for group, share in self.shares.items()}
        self._sums = torch.zeros(len(counts) + 1, dtype=torch.float64, device="cpu")

    @property
    def weights(self) -> dict[str, float]:
        """q, which sums to 1."""
        top = max(self._log_weights.values())
        total = sum(math.exp(value - top) for value in self._log_weights.values())
        return {group: math.exp(value - top) / total for group, value in self._log_weights.items()}

    def of(self, pairs: Sequence[Feedback], like: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """How often each pair counts, q_g / s_g.

        Raises:
            DataError: for a group that was not among the pairs that are trained on.
        """
        weights = self.weights
        return torch.tensor(
            [weights[group] / self.shares[group] for group in map(self._known, pairs)],
            dtype=like.dtype, device=like.device,
        )  # fmt: skip

    def observe(self, pairs: Sequence[Feedback], losses: Float[Tensor, " P"]) -> None:
        """Notes the losses of a batch for the next `update`."""
        place = {group: number for number, group in enumerate(self.shares)}
        index = torch.tensor([place[self._known(pair)] for pair in pairs], device="cpu")
        self._sums.index_add_(0, index, losses.detach().double())
        self._sums[-1] += len(pairs)

    def update(self, add_up: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """One step of q by the losses noted since the last.

        Args:
            add_up: sums a tensor over processes, each of which has noted those of its own batches.
        """
        *sums, count = add_up(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        if not count:
            return
        for (group, share), total in zip(self.shares.items(), sums, strict=True):
            self._log_weights[group] += self.step_size * total / (share * count)
        top = max(self._log_weights.values())
        self._log_weights = {group: value - top for group, value in self._log_weights.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON."""
        return dict(self._log_weights)

    def load(self, state: Mapping[str, float] | None) -> None:
        """Goes on from a `state`.

        Raises:
            SerializationError: for that of other groups, or none.
        """
        if state is None or state.keys() != self._log_weights.keys():
            raise SerializationError(
                f"group_dro: the checkpoint has weights of the groups {sorted(state or {})}, expected "
                f"{sorted(self._log_weights)}."
            )
        self._log_weights = {group: float(state[group]) for group in self._log_weights}

    def _known(self, pair: Feedback) -> str:
        if pair.group not in self.shares:
            raise DataError(f"group_dro: the group {pair.group!r} is none of the training data's, {list(self.shares)}.")
        return pair.group

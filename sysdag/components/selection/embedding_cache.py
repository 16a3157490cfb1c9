"""Vectors of texts that were encoded before, as long as the weights are what they were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class EmbeddingCache:
    """Keeps the vectors of the texts used last.

    Args:
        size: most texts; 0 keeps none.

    Attributes:
        encoded: how many texts it has had encoded.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._state: Hashable = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self.encoded = 0

    def __call__(
        self, texts: Sequence[str], state: Hashable, encode: Callable[[Sequence[str]], Float[Tensor, "n D"]]
    ) -> Float[Tensor, "n D"]:
        """The vector of each text, without gradient.

        Args:
            texts: all different.
            state: of the weights (see `state_of`); what was kept under another is forgotten.
            encode: makes the vectors that are not there.
        """
        if state != self._state:
            self._kept.clear()
            self._state = state
        missing = [text for text in texts if text not in self._kept]
        found: dict[str, Tensor] = {}
        if missing:
            self.encoded += len(missing)
            found = dict(zip(missing, encode(missing).detach().unbind(), strict=True))
        for text in texts:
            if text in self._kept:
                self._kept.move_to_end(text)
                found[text] = self._kept[text]
        for text in missing if self.size else ():
            self._kept[text] = found[text].clone()
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return torch.stack([found[text] for text in texts])


def state_of(tensors: Iterable[Tensor]) -> tuple[Hashable, ...]:
    """What changes with any of the tensors: sums of their numbers' bits, and how often torch has written to them.

    The first sees also what goes past torch's count, as writing to `.data` does.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    versions = []
    for tensor in tensors:
        own = tensor.detach()
        bits = own.contiguous().view(_INTEGERS[own.element_size()]) if own.is_floating_point() else own
        sums.setdefault(own.device, []).append(bits.sum(dtype=torch.int64))
        versions.append((tensor._version, tensor.dtype, str(tensor.device)))
    return (*versions, *(total for of_device in sums.values() for total in torch.stack(of_device).tolist()))

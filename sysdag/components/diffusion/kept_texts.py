"""What frozen text encoders made of texts, kept on the host: training asks for the same ones again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sysdag.components.footprint import bytes_of

Encoded = tuple[Tensor, ...]
"""Tensors with the texts as first axis."""


@dataclass(eq=False)
class KeptTexts:
    """The tensors of the texts that were asked for last.

    Attributes:
        budget: most bytes of them.
    """

    budget: int
    _rows: OrderedDict[tuple[Hashable, str], Encoded] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def of(
        self,
        texts: Sequence[str],
        maker: Hashable,
        device: torch.device,
        encode: Callable[[Sequence[str]], Encoded],
    ) -> Encoded:
        """What `encode` makes of the texts, on `device`; it is asked for those alone that are not kept, each once.

        Args:
            maker: tells apart what makes other tensors of the same text: another encoder, dtype or limit.
        """
        missing = [text for text in dict.fromkeys(texts) if (maker, text) not in self._rows]
        made = encode(missing) if missing else ()
        found = {text: tuple(tensor[row] for tensor in made) for row, text in enumerate(missing)}
        for text in dict.fromkeys(texts):
            if text not in found:
                self._rows.move_to_end((maker, text))
                found[text] = tuple(tensor.to(device) for tensor in self._rows[maker, text])
        for text in missing:
            self._keep((maker, text), tuple(tensor.detach().cpu() for tensor in found[text]))
        return tuple(torch.stack(column) for column in zip(*(found[text] for text in texts), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def _keep(self, key: tuple[Hashable, str], row: Encoded) -> None:
        self._rows[key] = row
        self._bytes += sum(map(bytes_of, row))
        while self._bytes > self.budget:
            self._bytes -= sum(map(bytes_of, self._rows.popitem(last=False)[1]))


def version_of(model: nn.Module) -> int:
    """A number that grows with each change of its weights in place."""
    return sum(parameter._version for parameter in model.parameters())

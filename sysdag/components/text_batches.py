"""Tokenised texts through an encoder or a classifier, as it reads each of them alone.

Rows are padded on the right, so that positions do not count padding, with the token that the model's config calls
padding: some models find positions, or the last token, by it. A model whose forward takes no mask reads texts of one
length together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Row = Mapping[str, Sequence[int]]
"""One text as its tokenizer gives it: `input_ids` and what is beside them, one number a token."""
Batch = dict[str, Tensor]


def by_text(
    model: Any,
    rows: Sequence[Row],
    read: Callable[[Batch], Tensor],
    *,
    device: torch.device,
    pad: int | None,
    most_tokens: int | None = None,
) -> Tensor:
    """What `read` makes of every row, stacked.

    Args:
        model: its forward says whether rows may be padded.
        read: gets a batch, its `attention_mask` among it where the tokenizer gives one; returns one tensor a row.
        pad: the token that fills rows; None reads each row by itself.
        most_tokens: of a batch, padding included, if that is to be bounded; a longer row is a batch of its own. A
            model that is sharded over processes reads all rows in one.
    """
    if is_sharded(model):
        most_tokens = None  # processes must call it equally often
    takes = inspect.signature(model.forward).parameters
    others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    lengths = [len(row["input_ids"]) for row in rows]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in _groups(lengths, pad is not None, "attention_mask" in takes, most_tokens):
        width = max(lengths[place] for place in group)
        names = [name for name in rows[group[0]] if name in takes or others]
        batch = {
            name: torch.tensor(
                [
                    [*rows[place][name], *[(pad or 0) if name == "input_ids" else 0] * (width - lengths[place])]
                    for place in group
                ],
                device=device,
            )
            for name in names
        }
        for place, value in zip(group, read(batch), strict=True):
            found[place] = value
    return torch.stack(found)


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are spread over processes (DTensor)."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def _groups(lengths: Sequence[int], pads: bool, masks: bool, most_tokens: int | None) -> Iterator[list[int]]:
    """Rows that are read together."""
    if not pads:
        yield from ([place] for place in range(len(lengths)))
        return
    if most_tokens is None and masks:
        yield list(range(len(lengths)))
        return
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        too_many = most_tokens is not None and (len(group) + 1) * lengths[place] > most_tokens
        if group and (too_many or (not masks and lengths[place] != lengths[group[0]])):
            yield group
            group = []
        group.append(place)
    if group:
        yield group

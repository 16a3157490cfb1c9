"""Numbers between host and device: to the host all at once, since each copy waits, to the device without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def beside(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers of the host on the device and in the dtype of another tensor; the host does not wait for the device."""
    return numbers.to(like.device, like.dtype, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, without graphs, in their order; one copy for each device that has some.

    Numbers go through the dtype that torch promotes those of a device to, and come in their own.
    """
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    found = list(tensors)
    for places in by_device.values():
        own = [tensors[place].detach() for place in places]
        numbers = torch.cat([tensor.reshape(-1) for tensor in own]).cpu()
        for place, tensor, part in zip(places, own, numbers.split([t.numel() for t in own]), strict=True):
            found[place] = part.view(tensor.shape).to(tensor.dtype)
    return found

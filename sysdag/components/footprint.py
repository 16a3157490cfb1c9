"""What a model's part in a training step takes of the memory, and models of fake tensors to find it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes.

    Attributes:
        weights: of the model, its adapter included.
        base: of the weights, those of a base that adapters of other components may be on, too.
        trained: of those of them that train.
        optimizer: what AdamW keeps of those.
        reference: of a reference beside it; 0 where that is the adapter switched off.
        graph: what the graph of one micro-batch saves for its backward.
        working: what a step needs beside it for a while: of a language model's head a tile of logits and its weight's
            gradient; of a diffusion model what one layer's backward takes.
        host_cache: most that is kept on the host of what frozen encoders made of prompts, or processors of images; it
            grows with the number of different ones.
    """

    weights: int
    base: int = 0
    trained: int
    optimizer: int
    reference: int
    graph: int
    working: int
    host_cache: int = 0


def make_fake(model: nn.Module) -> None:
    """Replaces tensors of the meta device by fake ones on the device at hand, tied ones by one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = None if parameter is None else made[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def bytes_of(tensor: torch.Tensor) -> int:
    """Of its numbers."""
    return tensor.numel() * tensor.element_size()

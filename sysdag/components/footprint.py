"""The memory of a language model's part in a training step, from its config alone: no weights are loaded.

The model is built of fake tensors, which have shapes and devices and no numbers, and one micro-batch is scored on it;
autograd then says what its graph would save, kernel by kernel as the device would choose them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sysdag import acceleration
from sysdag.components import adapter
from sysdag.components.language_head import TokenScorer
from sysdag.memory import SavedBytes

if TYPE_CHECKING:
    from peft import PeftConfig

_TILE = {"cpu": 8 << 20, "cuda": 192 << 20}  # of logits, in `linear_logprob`; on a GPU with what they are folded into


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes.

    Attributes:
        weights: of the model, its adapter included.
        trained: of those of them that train.
        reference: of a reference beside it; 0 where that is the adapter switched off.
        graph: what the graph of one micro-batch saves for its backward.
        working: what a step needs beside it for a while: of a language model's head a tile of logits and its weight's
            gradient; of a diffusion model what one layer's backward takes.
    """

    weights: int
    trained: int
    reference: int
    graph: int
    working: int


def of_causal_lm(
    config: Any,
    dtype: torch.dtype,
    peft_config: PeftConfig | None,
    *,
    tokens: int,
    labels: int,
    trains: bool,
    checkpoints: bool,
    device: str,
) -> Footprint:
    """A causal language model's.

    Args:
        config: of transformers.
        tokens: of a micro-batch, packed into one row.
        labels: how many of them are scored.
        trains: False for a model that is frozen.
        checkpoints: whether it recomputes its activations (gradient checkpointing).
        device: `cpu` or `cuda`, whose kernels are assumed.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if peft_config is not None:
            adapter.attach(model, peft_config)
    if not trains:
        model.requires_grad_(False)
    model.train()
    if checkpoints and trains:
        acceleration.enable_checkpointing(model, {"use_reentrant": False})
    with FakeTensorMode(), torch.device(device):
        make_fake(model)
        inputs = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
            "attention_mask": torch.zeros(1, 1, tokens, tokens, dtype=dtype),
            "position_ids": torch.zeros(1, tokens, dtype=torch.int64),
        }
        rows = torch.zeros(labels, dtype=torch.int64)
        saved = SavedBytes()
        with saved if trains else contextlib.nullcontext(), torch.set_grad_enabled(trains):
            TokenScorer(model, is_checked=True)(inputs, rows, rows)
        head = model.get_output_embeddings().weight
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = sum(bytes_of(parameter) for parameter in model.parameters())
        return Footprint(
            weights=weights,
            trained=sum(map(bytes_of, trained)),
            reference=weights if trained and peft_config is None else 0,
            graph=saved.total,
            working=_TILE[device] + (bytes_of(head) if head.requires_grad else 0),
        )


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

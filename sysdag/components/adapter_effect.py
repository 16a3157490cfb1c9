"""What an adapter does to its layers, found by running them with it and without."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 8
_IDS = 4096  # of an embedding, at once


def effect(layers: list[Any], name: str) -> float | None:
    """How much the layers' outputs change by the adapter, the largest over the layers; 0 where they are bit-equal.

    Linear layers, convolutions, norms and attention are run on Gaussian inputs, embeddings on all ids; modules and
    tokens that train whole are compared with those they stand for.

    Args:
        layers: all layers of the model that peft has put in.

    Returns:
        The root mean square of the change over that of the output. None for a layer that cannot be run alone (one
        without numbers, on the meta device, or of another shape).
    """
    largest: float | None = 0.0
    inside: set[int] = set()
    for layer in layers:
        if id(layer) in inside or name not in layer._get_available_adapters():
            continue
        if hasattr(layer, "token_adapter"):
            inside.add(id(layer.token_adapter))
        found = _of_layer(layer, name)
        largest = None if found is None or largest is None else max(largest, found)
    return largest


def is_rescaled(layers: list[Any], name: str, config: Any) -> bool:
    """Whether an adapter's layers scale it otherwise than its config says (`set_scale`, diffusers' `set_adapters`).

    A saved adapter, or a copy that is made from its config, would not be scaled so.
    """
    for layer in layers:
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or name not in scaling or not hasattr(layer, "set_scale"):
            continue
        alphas = getattr(layer, "lora_alpha", getattr(layer, "alpha", {}))
        rank = layer.r.get(name, 1)
        root = math.sqrt(rank) if getattr(config, "use_rslora", False) else rank
        if not math.isclose(scaling[name], alphas[name] / root if name in alphas else 1.0, rel_tol=1e-6):
            return True
    return False


def _of_layer(layer: Any, name: str) -> float | None:
    from peft.utils.other import AuxiliaryTrainingWrapper

    tensors = [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return None
    tokens = getattr(layer, "token_adapter", layer)
    with torch.no_grad():
        if hasattr(tokens, "trainable_tokens_delta"):
            return _distance(tokens.trainable_tokens_delta[name], tokens.trainable_tokens_original[name])
        if isinstance(layer, AuxiliaryTrainingWrapper):
            original, trained = layer.original_module.state_dict(), layer.modules_to_save[name].state_dict()
            same = original.keys() == trained.keys()
            return max(_distance(trained[key], original[key]) for key in original) if same else None
        if hasattr(layer, "parameter_name"):  # an adapted tensor of a module, as fused experts have
            delta, weight = layer.get_delta_weight(name), layer.get_param()
            return _distance(weight + delta, weight) if delta.any() else 0.0
        inputs = _inputs(layer)
        if inputs is None:
            return None
        found = 0.0
        for given in inputs:
            with _alone(layer, [name], off=False):
                adapted = layer(*given)
            with _alone(layer, [], off=True):
                plain = layer(*given)
            found = max(found, _distance(*(out[0] if isinstance(out, tuple) else out for out in (adapted, plain))))
        return found


def _distance(one: Tensor, other: Tensor) -> float:
    """The change over the size; infinite where there is none of something, or it is not a number any more."""
    if torch.equal(one, other) or not other.isfinite().all():  # what the base itself has is not the adapter's
        return 0.0
    change, size = (one - other).float().norm(), other.float().norm()
    return float(change / size) if size and change.isfinite() else math.inf


@contextlib.contextmanager
def _alone(layer: Any, active: list[str], *, off: bool) -> Iterator[None]:
    """In eval mode with these adapters active; everything is put back."""
    before, was_off = layer._active_adapter, layer._disable_adapters
    modes = [(module, module.training) for module in layer.modules()]
    layer._active_adapter, layer._disable_adapters = active, off
    layer.eval()
    try:
        yield
    finally:
        layer._active_adapter, layer._disable_adapters = before, was_off
        for module, training in modes:
            module.training = training


def _inputs(layer: Any) -> list[tuple[Tensor, ...]] | None:
    """What the layer can be run on, for each call; None where its shape is not known."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if isinstance(base, nn.Embedding):
        return [(ids.to(base.weight.device),) for ids in torch.arange(base.num_embeddings).split(_IDS)]
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        spans = zip(base.kernel_size, base.dilation, strict=True)
        shape = (2, base.in_channels, *(int(dilation) * (int(size) - 1) + 3 for size, dilation in spans))
    elif isinstance(base, nn.MultiheadAttention):
        shape, weight = (4, 1, base.embed_dim), base.out_proj.weight
    elif hasattr(base, "in_features"):
        shape = (_ROWS, base.in_features)
    elif weight is not None and (weight.ndim == 1 or type(base).__name__ == "Conv1D"):  # of transformers: (in, out)
        shape = (_ROWS, weight.shape[0])
    else:
        return None
    own = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
    like = weight if weight is not None and weight.is_floating_point() else own
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    return [(drawn,) * (3 if isinstance(base, nn.MultiheadAttention) else 1)]

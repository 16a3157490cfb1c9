"""Log-probabilities of tokens from a causal language model's last hidden state, without its logits where that can be.

The model is called as ever, so that hooks on its forward (peft, DDP, FSDP, autocast) run; it is asked for the logits of
the last position alone, and a hook on its decoder takes the hidden states. Whether the logits are a plain linear
layer of those, scaled and softcapped as the config says, is looked up in the model's structure and then checked once,
on the logits of the first batch's last positions.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sysdag.ops import linear_logprob

logger = logging.getLogger(__name__)

Constrain = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearHead:
    """softcap(scale * linear(decoder's last hidden state) + offset) are the logits."""

    decoder: nn.Module
    linear: nn.Linear
    scale: float
    softcap: float | None
    offset: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """What is added to the scaled product."""
        own = None if self.linear.bias is None else self.linear.bias * self.scale
        return own if self.offset is None else self.offset if own is None else own + self.offset

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the weight itself, as `linear_logprob` takes it: hooks of the layer do not run, so that a check tells."""
        logits = functional.linear(hidden, self.linear.weight, self.linear.bias).float() * self.scale
        logits = logits if self.offset is None else logits + self.offset
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TokenScorer:
    """Scores tokens with one model. What its head is gets decided on the first batch.

    Args:
        model: a causal language model of transformers, perhaps inside a PeftModel.
        is_checked: take the head for what the structure says, where there are no numbers to check it with.
    """

    def __init__(self, model: Any, *, is_checked: bool = False) -> None:
        self.model = model
        self._candidates = self._heads()
        self._embedding = output_embedding(model)
        self._hooks = _hooks_of(self._embedding)
        self._checked = is_checked

    def _heads(self) -> list[LinearHead]:
        """What the head may be, likeliest first; empty where only the model's own logits will do."""
        return _candidates(self.model)

    def fits(self, model: Any) -> bool:
        """Whether this was made for the model, and for its output embedding and that one's hooks as they are now."""
        embedding = output_embedding(model)
        return self.model is model and self._embedding is embedding and self._hooks == _hooks_of(embedding)

    def __call__(
        self,
        inputs: Mapping[str, Any],
        rows: Int[Tensor, " M"],
        labels: Int[Tensor, " M"],
        constrain: Constrain | None = None,
    ) -> Float[Tensor, " M"]:
        """Log-probability of each label where it is predicted.

        Args:
            inputs: of the model's forward, `input_ids` (B, L) among them.
            rows: where each label is predicted, as an index into the B * L positions; one may predict several.
            labels: token ids. Best on the host, as `rows`: their layout is then known without a wait for the device.
            constrain: of the logits (M, V) those whose softmax counts; all of the model's logits are made for it.
        """
        output = self._hidden(inputs) if self._candidates and constrain is None else None
        if output is None or output.hidden is None:
            whole = self._forward(inputs).logits.flatten(0, 1)
            logits = whole[rows.to(whole.device)].float()
            logits = logits if constrain is None else constrain(logits)
            return logits.log_softmax(-1).gather(1, labels.to(whole.device)[:, None])[:, 0]
        head = self._candidates[0]
        weight = head.linear.weight
        with torch.autocast(weight.device.type, dtype=output.autocast, enabled=output.autocast is not None):
            return linear_logprob(
                output.hidden.flatten(0, 1).to(weight.dtype), weight, rows, labels,
                bias=head.bias, softcap=head.softcap, logit_scale=head.scale,
            )  # fmt: skip

    @torch.no_grad()
    def typicality(
        self,
        inputs: Mapping[str, Any],
        rows: Int[Tensor, " M"],
        labels: Int[Tensor, " M"],
        constrain: Constrain | None = None,
    ) -> Float[Tensor, " M"]:
        """log p of each label where it is predicted, less log sum_v p(v)^2 there; logits of some rows at a time."""
        rows, labels = (each.to(inputs["input_ids"].device, non_blocking=True) for each in (rows, labels))
        if constrain is not None:
            return typical(constrain(self._forward(inputs).logits.flatten(0, 1)[rows].float()), labels)
        output = self._hidden(inputs) if self._candidates else None
        if output is None or output.hidden is None:
            whole = self._forward(inputs).logits.flatten(0, 1)
            return torch.cat([typical(whole[some].float(), of) for some, of in _chunks(rows, labels, whole.shape[-1])])
        head, hidden = self._candidates[0], output.hidden.flatten(0, 1)
        with torch.autocast(labels.device.type, dtype=output.autocast, enabled=output.autocast is not None):
            return torch.cat(
                [
                    typical(head.logits(hidden[some].to(head.linear.weight.dtype)), of)
                    for some, of in _chunks(rows, labels, head.linear.out_features)
                ]
            )

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**inputs, use_cache=False)

    def _hidden(self, inputs: Mapping[str, Any]) -> _Output | None:
        """What the decoder returns, or None if the model turns out to make its logits in another way."""
        ids = inputs["input_ids"]
        with _captured(self._candidates[0].decoder) as output:
            # A tensor, since some decoders leave out hidden states, too, where it is a number (Gemma 4's shared keys).
            keep = torch.tensor([ids.shape[1] - 1], device=ids.device)
            last = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
        hidden = output.hidden
        if not self._checked:
            if not last.isfinite().all():  # this tells nothing of the head
                return None
            fits = hidden is not None and hidden.shape[:2] == ids.shape and last.shape[:2] == (len(ids), 1)
            if not self._settled(output, last, fits=fits):
                return None
        return output

    def _settled(self, output: _Output, last: Tensor, *, fits: bool) -> bool:
        """Keeps the heads that give the model's logits at the last position; whether there are any."""
        self._candidates = [head for head in self._candidates if fits and _agrees(head, output, last)]
        self._checked = True
        if not self._candidates:
            say_full_logits(
                self.model,
                "its logits are not its output embedding applied to the last hidden state"
                if fits
                else "its decoder does not return the hidden states of all tokens",
            )
        return bool(self._candidates)


_CHUNK = 2**24  # logits that are held at once


def _chunks(rows: Tensor, labels: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK // vocabulary)
    yield from zip(rows.split(size), labels.split(size), strict=True)


def typical(logits: Float[Tensor, "M V"], labels: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """log p_y - log sum p^2 = l_y + logsumexp(l) - logsumexp(2 l)."""
    logits = logits.float()
    return logits.gather(1, labels[:, None])[:, 0] + logits.logsumexp(-1) - (2 * logits).logsumexp(-1)


@dataclass
class _Output:
    hidden: Tensor | None = None
    autocast: torch.dtype | None = None  # in which the decoder ran

    def take(self, hidden: Tensor | None) -> None:
        self.hidden = hidden
        if hidden is not None and torch.is_autocast_enabled(hidden.device.type):
            self.autocast = torch.get_autocast_dtype(hidden.device.type)


@contextlib.contextmanager
def _captured(decoder: nn.Module) -> Iterator[_Output]:
    """What the decoder returns while the context lasts."""
    output = _Output()

    def take(module: nn.Module, arguments: Any, returned: Any) -> None:
        output.take(returned[0] if isinstance(returned, tuple) else getattr(returned, "last_hidden_state", None))

    handle = decoder.register_forward_hook(take)
    try:
        yield output
    finally:
        handle.remove()


@contextlib.contextmanager
def captured_before(linear: nn.Module) -> Iterator[_Output]:
    """What enters the output embedding while the context lasts; it computes the last position alone."""
    output = _Output()

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        output.take(arguments[0])
        return (arguments[0][:, -1:],)

    handle = linear.register_forward_pre_hook(take)
    try:
        yield output
    finally:
        handle.remove()


@torch.no_grad()
def _agrees(head: LinearHead, output: _Output, last: Tensor) -> bool:
    """Whether the head gives the model's own logits at the last position, as near as its dtype allows."""
    hidden, autocast = output.hidden, output.autocast
    assert hidden is not None
    if hidden.shape[-1] != head.linear.in_features:
        return False
    with torch.autocast(hidden.device.type, dtype=autocast, enabled=autocast is not None):
        expected = head.logits(hidden[:, -1:].to(head.linear.weight.dtype))
    half = autocast is not None or head.linear.weight.dtype in (torch.float16, torch.bfloat16)
    tolerance = (2e-2 if half else 1e-4) * float(expected.abs().max())
    return torch.allclose(expected, last.float(), rtol=0, atol=tolerance)


def _candidates(model: Any) -> list[LinearHead]:
    """The heads that the structure and the config allow, likeliest first; they differ in what a scale means."""
    inner, linear = inner_model(model), output_embedding(model)
    decoder = getattr(inner, "base_model", None)
    if type(linear) is not nn.Linear:
        reason = f"its output embedding is a {type(linear).__name__}, not a plain nn.Linear"
    elif decoder is None or decoder is inner:
        reason = "its decoder is not a module of its own"
    elif "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        reason = "its forward cannot leave logits out (logits_to_keep)"
    else:
        config = inner.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return [LinearHead(decoder, linear, scale, softcap) for scale in _scales(config)]
    say_full_logits(model, reason)
    return []


def inner_model(model: Any) -> Any:
    """The model of transformers inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def argument_names(model: Any) -> set[str]:
    """What the language model's own forward takes, under a PEFT, DDP or torch.compile wrapper."""
    if callable(getattr(model, "get_base_model", None)):
        return argument_names(model.get_base_model())
    names = set(inspect.signature(model.forward).parameters)
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    return names if "input_ids" in names or inner is None else argument_names(inner)


def output_embedding(model: Any) -> Any:
    inner = inner_model(model)
    return inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None


def _hooks_of(embedding: Any) -> list[int]:
    """What tells the hooks of a module apart."""
    return [*getattr(embedding, "_forward_pre_hooks", ()), *getattr(embedding, "_forward_hooks", ())]


def _scales(config: Any) -> list[float]:
    """What the product may be multiplied by; Granite divides by `logits_scaling`, HyperCLOVA X multiplies."""
    found = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value not in (0, 1):
            found = [1 / value, value, 1.0] if name == "logits_scaling" else [float(value), 1.0]
    return found


def say_full_logits(model: Any, reason: str) -> None:
    """Warns of a model whose head cannot be applied to some rows alone."""
    logger.warning("%s is scored through its full logits, which takes more memory: %s.", type(model).__name__, reason)

"""Whether two ways of computing a model's logits are the same computation, told apart from the rounding of its dtype.

In bfloat16 another order of the same sums moves a deep model's logits by up to a fifth of their spread, which is what
wrong positions do to a short text. Whether masks and positions are honoured does not depend on the dtype, so a probe
computes in fp32 from the weights as they are: each operation gets its half-precision arguments in fp32, one weight at a
time, so no copy of the model is made. There the rounding is some 1e-5 of the spread. It is measured, as the difference
of two plain computations that are equal but for it, and what is to be tried may differ by a few times as much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sysdag.components.component import evaluating

# Of the logits' spread.
_LEAST = 1e-4
_MOST = 1e-3
_IN_HALF = 0.3  # for kernels that know half precision alone; whole rows of wrong tokens are above
_TIMES = 4
_HALF = (torch.float16, torch.bfloat16)
RAISED = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Expected:
    """The logits that a computation must give.

    Attributes:
        logits: (n, V).
        limit: the largest error that is taken for rounding, as `error` measures it.
        looks_ahead: what differs where more tokens follow; "" for a causal language model.
    """

    logits: Float[Tensor, "n V"]
    limit: float = 0.0
    looks_ahead: str = ""

    def error(self, found: Float[Tensor, "n V"]) -> float:
        """The largest distance of a row, in units of the row's own spread over the vocabulary."""
        spread = self.logits - self.logits.mean(-1, keepdim=True)
        return float(((found.float() - self.logits).norm(dim=-1) / spread.norm(dim=-1).clamp_min(1e-30)).max())

    def complaint(self, compute: Callable[[], Float[Tensor, "n V"]]) -> str:
        """What is wrong with the logits that another computation gives; "" where nothing is."""
        try:
            error = self.error(compute())
        except torch.OutOfMemoryError:
            raise
        except RAISED as raised:
            return f"a probe raised {type(raised).__name__}: {raised!s:.200}"
        return "" if error <= self.limit else f"a probe's logits differed by {error:.2g} of their spread"


@contextlib.contextmanager
def probing(
    model: nn.Module,
    before: Callable[[], Float[Tensor, "n V"]],
    whole: Callable[[], Float[Tensor, "n V"]],
) -> Iterator[Expected | None]:
    """What the model's plain forwards give, and the arithmetic to try other ways in; None where it is not finite.

    In evaluation mode, without gradients; modes and random states are put back. A model whose kernels take half
    precision alone, or whose weights are sharded, is tried in its own dtype.

    Args:
        before: logits from forwards of what stands before each token and nothing more.
        whole: the same from forwards of whole sequences, which tells rounding from looking ahead.
    """
    device = next(model.parameters()).device
    with contextlib.ExitStack() as outside, contextlib.ExitStack() as arithmetic:
        outside.enter_context(torch.no_grad())
        outside.enter_context(torch.compiler.set_stance("force_eager"))  # its shapes come once: none is worth compiling
        outside.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        outside.enter_context(evaluating(model))
        logits = None
        if not _is_sharded(model):
            arithmetic.enter_context(_in_fp32(device.type, is_half=_is_half(model)))
            try:
                logits = before()
            except torch.OutOfMemoryError:
                raise
            except RAISED:
                arithmetic.close()
        least, most = _LEAST, _MOST
        if logits is None:
            logits = before()
            if logits.dtype in _HALF or _is_half(model):
                least = most = _IN_HALF
        if not logits.isfinite().all():
            yield None
            return
        plain = Expected(logits.float(), most)
        found = whole()
        limit = min(most, max(least, _TIMES * plain.error(found)))
        yield Expected(plain.logits, limit, plain.complaint(lambda: found))


def _is_sharded(model: nn.Module) -> bool:
    """Whether other libraries gather its weights by operations of their own, which must stay as they are."""
    return any(hasattr(each, "device_mesh") or hasattr(each, "ds_id") for each in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def _is_half(model: nn.Module) -> bool:
    device = next(model.parameters()).device.type
    return torch.is_autocast_enabled(device) or any(each.dtype in _HALF for each in model.parameters())


@contextlib.contextmanager
def _in_fp32(device_type: str, *, is_half: bool) -> Iterator[None]:
    """Of a model that has nothing in half precision, products alone: what each operation takes is fp32 already."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with _Fp32(device_type) if is_half else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _Fp32(TorchFunctionMode):
    """Every operation on half-precision tensors in fp32, autocast or not."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in (kwargs or {})
        if in_place or name in ("__get__", "__set__"):  # written to, or an attribute
            return function(*args, **(kwargs or {}))
        args, kwargs = _raised(args), _raised(kwargs or {})
        with torch.autocast(self._device_type, enabled=False):
            return function(*args, **kwargs)


def _raised(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _HALF else value
    if type(value) in (list, tuple):
        return type(value)(_raised(each) for each in value)
    return {key: _raised(each) for key, each in value.items()} if type(value) is dict else value


def forwards(model: Any, sequences: Sequence[Sequence[int]]) -> dict[tuple[int, ...], Tensor]:
    """The logits (L, V) of each sequence by plain forwards: those of one length side by side, without padding."""
    device = next(model.parameters()).device
    found: dict[tuple[int, ...], Tensor] = {}
    for length in sorted({len(ids) for ids in sequences}):
        batch = list(dict.fromkeys(tuple(ids) for ids in sequences if len(ids) == length))
        logits = model(input_ids=torch.tensor(batch, device=device), use_cache=False).logits
        found.update(zip(batch, logits, strict=True))
    return found


def token_ids(config: Any, count: int) -> list[int]:
    """Different ordinary tokens of a model, spread over its vocabulary."""
    named = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    special = {each for ids in named for each in (ids if isinstance(ids, list) else [ids])}
    ordinary = [place for place in range(config.vocab_size) if place not in special]
    return [ordinary[len(ordinary) * (2 * place + 1) // (2 * count)] for place in range(count)]

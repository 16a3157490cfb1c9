"""Attention over the pieces of packed rows, merged exactly, by torch's flash kernels on a CPU.

A kernel gives a piece's output and the logarithm L of its softmax's denominator. Of outputs o_1, o_2 for the same query
over different keys, that over all of them is (exp(L_1) o_1 + exp(L_2) o_2) / (exp(L_1) + exp(L_2)). A backward kernel
takes a piece's probabilities from L and the rest from the output and its gradient; given those of all keys, it returns
the piece's part of every gradient. So the keys of a prefix receive the sum over what stands behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from sysdag.components.language.trie_pieces import Kind, Piece

Masks = Callable[[Piece, torch.dtype], Tensor]
_FLASH = 1  # SDPBackend.FLASH_ATTENTION, as torch._fused_sdp_choice gives it


def obstacle(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why the kernels do not take these tensors, or ""."""
    if any(type(each) not in (Tensor, FakeTensor) for each in (query, key, value)):
        return f"its queries are of type {type(query).__name__}"
    if query.device.type != "cpu":
        return f"its kernels on {query.device.type!r} take dense masks alone"
    if not query.dtype == key.dtype == value.dtype:
        return f"its queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype}"
    if query.ndim != 4 or query.shape != key.shape or key.shape != value.shape:
        return f"its queries, keys and values are {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    is_fake = isinstance(query, FakeTensor)  # of which torch gives no choice
    if not is_fake and torch._fused_sdp_choice(query, key, value, is_causal=True) != _FLASH:
        return "no flash kernel takes its heads"
    return ""


def trie_attention(
    query: Float[Tensor, "R H T D"],
    key: Float[Tensor, "R H T D"],
    value: Float[Tensor, "R H T D"],
    pieces: Sequence[Piece],
    masks: Masks,
    *,
    scale: float | None = None,
    groups: Sequence[int] = (),
) -> Float[Tensor, "R H T D"]:
    """What each query gets of the keys that the pieces let it attend to.

    Args:
        query, key, value: in one dtype, on a CPU; see `obstacle`.
        pieces: that have every query and none of its keys twice.
        masks: of a masked piece what is added to its scores.
        scale: of the scores; 1 / sqrt(D) by default.
        groups: how many heads may have the same keys and values, for these to be kept once if they do.
    """
    return _TrieAttention.apply(query, key, value, pieces, masks, scale, groups)


class _TrieAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], masks: Masks,
        scale: float | None, groups: Sequence[int],
    ) -> Tensor:  # fmt: skip
        rows, heads, tokens, size = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty((rows, tokens, heads, size), dtype=exact).transpose(1, 2)
        total = query.new_empty((rows, heads, tokens), dtype=exact)
        for piece in pieces:
            own, own_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _part(query, piece, piece.queries), _part(key, piece, piece.keys), _part(value, piece, piece.keys),
                0.0, piece.kind is Kind.CAUSAL, attn_mask=_mask(piece, masks, query.dtype), scale=scale,
            )  # fmt: skip
            there, there_total = _part(out, piece, piece.queries), _part(total, piece, piece.queries)
            if piece.opens:
                there.copy_(own)
                there_total.copy_(own_total)
                continue
            both = torch.logaddexp(there_total, own_total)
            there.mul_((there_total - both).exp_()[..., None])
            there.addcmul_(own.to(exact), (own_total - both).exp_()[..., None])
            there_total.copy_(both)
        out = out.to(query.dtype)
        ctx.groups = _groups(key, value, groups) if any(ctx.needs_input_grad) else 1
        kept = (key, value) if ctx.groups == 1 else (each[:, :: ctx.groups].contiguous() for each in (key, value))
        ctx.save_for_backward(query, *kept, out, total)
        ctx.pieces, ctx.masks, ctx.scale = pieces, masks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        key, value = (each.repeat_interleave(ctx.groups, 1) if ctx.groups > 1 else each for each in (key, value))
        found = [torch.zeros_like(each, dtype=total.dtype) for each in (query, key, value)]
        for piece in ctx.pieces:
            of_queries = [_part(each, piece, piece.queries) for each in (gradient, query, out, total)]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                of_queries[0], of_queries[1], _part(key, piece, piece.keys), _part(value, piece, piece.keys),
                of_queries[2], of_queries[3], 0.0, piece.kind is Kind.CAUSAL,
                attn_mask=_mask(piece, ctx.masks, query.dtype), scale=ctx.scale,
            )  # fmt: skip
            for whole, part, columns in zip(found, parts, (piece.queries, piece.keys, piece.keys), strict=True):
                _part(whole, piece, columns).add_(part)
        return (*(each.to(query.dtype) for each in found), None, None, None, None)


def _part(tensor: Tensor, piece: Piece, columns: slice) -> Tensor:
    return tensor[piece.row : piece.row + 1, :, columns]


def _mask(piece: Piece, masks: Masks, dtype: torch.dtype) -> Tensor | None:
    return masks(piece, dtype) if piece.kind is Kind.MASKED else None


def _groups(key: Tensor, value: Tensor, groups: Sequence[int]) -> int:
    """The first number of neighbouring heads that have the same keys and values; 1 where none does."""
    for count in groups:
        if count > 1 and key.shape[1] % count == 0 and _repeats(key, count) and _repeats(value, count):
            return count
    return 1


def _repeats(tensor: Tensor, count: int) -> bool:
    if isinstance(tensor, FakeTensor):  # which has no numbers: as models repeat them
        return True
    first = tensor[:, ::count]
    return all(torch.equal(first, tensor[:, place::count]) for place in range(1, count))

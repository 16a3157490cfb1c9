"""The attention mask of packed rows, which knows its pieces and is dense only for whoever reads it.

Models hand it on to `torch.nn.functional.scaled_dot_product_attention`; what that gets of it is computed piece by piece
(`trie_attention`). Everything else that is done with the mask, by eager attention, biases or slices, is done with the
dense tensor, and from then on the mask is nothing but that. So whatever a model does with it stays right, and since it
is an argument, gradient checkpoints that compute a layer anew see what the first forward saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sysdag.components.language import trie_attention
from sysdag.components.language.token_trie import subtrees
from sysdag.components.language.trie_pieces import Piece

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


@dataclass
class Use:
    """What became of a mask and its copies.

    Attributes:
        by_pieces: how many calls of attention were computed by pieces.
        dense_because: why a call got it dense, the first such; "" where none did.
    """

    by_pieces: int = 0
    dense_because: str = ""


@dataclass
class _Content:
    """What masks share that share their memory, as detached ones do."""

    pieces: Sequence[Piece]
    dense: Tensor | None = None
    squares: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict)


class TrieMask(Tensor):
    """What is added to the scores (R, 1, T, T) of packed rows: 0 where a token attends, the dtype's least elsewhere.

    Attributes:
        end: (R, T) of the `TokenTrie`.
        pieces: of its rows; empty once the mask is dense alone.
        groups: how many heads may share their keys and values.
        use: what became of it.

    Args:
        end: of the `TokenTrie`, in host memory as a rule.
        device: of the mask.
    """

    end: Tensor
    groups: Sequence[int]
    use: Use
    _content: _Content

    @staticmethod
    def __new__(
        cls, end: Tensor, pieces: Sequence[Piece], *, dtype: torch.dtype, device: torch.device | None = None,
        groups: Sequence[int] = (), use: Use | None = None,
    ) -> TrieMask:  # fmt: skip
        rows, width = end.shape
        made = Tensor._make_wrapper_subclass(cls, (rows, 1, width, width), dtype=dtype, device=device or end.device)
        made.end, made.groups, made.use, made._content = end, groups, use or Use(), _Content(pieces)
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"TrieMask({tuple(self.shape)}, {self.dtype}, {len(self.pieces)} pieces)"

    @property
    def pieces(self) -> Sequence[Piece]:
        return self._content.pieces

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""
        if self._content.dense is None:
            self._content.dense = dense_mask(self.end, self.dtype, self.device)
        return self._content.dense

    def of_piece(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """(1, 1, n, n) of a masked piece."""
        key = (piece.row, piece.queries.start, piece.queries.stop, dtype)
        squares = self._content.squares
        if key not in squares:
            seen = subtrees(self.end[piece.row, piece.queries], piece.queries.start)
            squares[key] = _added(seen.to(self.device), dtype)[None, None]
        return squares[key]

    def _give_up(self, reason: str) -> Tensor:
        self.use.dense_because = self.use.dense_because or reason
        return self.dense()

    def attention(self, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
        """`scaled_dot_product_attention` under this mask, by pieces where kernels allow."""
        query, key, value = _as_under_autocast(query, key, value)
        if options.get("enable_gqa") and key.ndim == query.ndim == 4 and key.shape[1] < query.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
            options = {**options, "enable_gqa": False}
        reason = self._why_dense(query, key, value, options)
        if reason:
            with torch._C.DisableTorchFunctionSubclass():
                dense = self._give_up(reason)
                return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense, **options)
        self.use.by_pieces += 1
        return trie_attention.trie_attention(
            query, key, value, self.pieces, self.of_piece, scale=options.get("scale"), groups=self.groups
        )

    def _why_dense(self, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> str:
        if not self.pieces:
            return self.use.dense_because or "it has no pieces"
        if options.get("dropout_p"):
            return "its attention drops out"
        if options.get("is_causal"):
            return "its attention adds a causal mask"
        if query.ndim != 4 or (query.shape[0], query.shape[2]) != tuple(self.end.shape):
            return f"its queries are {tuple(query.shape)}"
        return trie_attention.obstacle(query, key, value)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            given = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
            if isinstance(mask := given.pop("attn_mask", None), TrieMask):
                return mask.attention(given.pop("query"), given.pop("key"), given.pop("value"), given)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(mask := args[0], TrieMask):
            if func in _SAME:
                same = mask._like(mask.dtype, mask.device)
                same._content = mask._content
                return same
            if func in _COPIES:
                return mask._copied(**kwargs)
        name = func.overloadpacket.__name__

        def read(mask: TrieMask) -> Tensor:
            found = mask._give_up(f"its mask is read by {name}")
            mask._content.pieces = ()  # what was read may be written to
            return found

        return func(*tree_map_only(TrieMask, read, args), **tree_map_only(TrieMask, read, kwargs))

    def _copied(self, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        dtype, device = dtype or self.dtype, torch.device(device) if device is not None else self.device
        if not self.pieces or not dtype.is_floating_point:
            return self._give_up(f"its mask is made {dtype}").to(device=device, dtype=dtype, copy=True)
        return self._like(dtype, device)

    def _like(self, dtype: torch.dtype, device: torch.device) -> TrieMask:
        return TrieMask(self.end, self.pieces, dtype=dtype, device=device, groups=self.groups, use=self.use)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def dense_mask(end: Int[Tensor, "R T"], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "R 1 T T"]:
    """What a `TrieMask` stands for."""
    return _added(subtrees(end).to(device, non_blocking=True), dtype)[:, None]


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        each.to(dtype) if each.is_floating_point() and each.dtype != torch.float64 else each for each in tensors
    )

"""The arguments of a language model's forward for the rows of a trie: which mask its attention gets.

Chains get the mask of their padding. Tries get a mask of four dimensions and positions: for `sdpa` on a CPU a
`TrieMask`, whose shared prefixes attention computes once and without a mask; for `flex_attention` on a GPU a BlockMask,
which skips what is masked (this has not run on a GPU yet; the function behind the mask is tested against the dense
one); for everything else, and for models under `torch.compile`, a dense tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sysdag.components.language import trie_pieces
from sysdag.components.language.language_head import inner_model
from sysdag.components.language.token_trie import TokenTrie
from sysdag.components.language.trie_mask import TrieMask, dense_mask
from sysdag.components.language.trie_pieces import Piece


def config_of(model: Any) -> Any:
    """The config of a model's language model."""
    return inner_model(model).config.get_text_config(decoder=True)


def implementation(model: Any) -> str | None:
    """Which of transformers' attention functions a model calls."""
    return getattr(config_of(model), "_attn_implementation", None)


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def model_inputs(
    model: Any, trie: TokenTrie, device: torch.device, *, by_pieces: bool = True, call: float | None = None
) -> dict[str, Any]:
    """The arguments of the model's forward for a trie's rows.

    Args:
        model: perhaps inside a PeftModel.
        trie: what its rows hold.
        device: where they go.
        by_pieces: False for a dense mask.
        call: see `trie_pieces.pieces`.
    """
    ids = trie.tokens.to(device, non_blocking=True)
    # A model that would return its routers' logits would also make a loss of them, for which it takes no such mask.
    others = {"output_router_logits": False} if getattr(config_of(model), "output_router_logits", False) else {}
    if trie.is_chains:
        place = torch.arange(ids.shape[1])
        return {
            "input_ids": ids,
            "attention_mask": (place < trie.lengths[:, None]).long().to(device, non_blocking=True),
            **others,
        }
    if implementation(model) == "flex_attention" and device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, width = ids.shape
        mask: Any = create_block_mask(subtree_mask(trie.end.to(device)), rows, None, width, width, device=device)
    else:
        pieces = trie_pieces.pieces(trie, config_of(model).hidden_size, call) if by_pieces else ()
        mask = tries_mask(model, trie.end, pieces, device)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": trie.depth.to(device, non_blocking=True),
        **others,
    }


def tries_mask(
    model: Any, end: Int[Tensor, "R T"], pieces: Sequence[Piece], device: torch.device
) -> Float[Tensor, "R 1 T T"]:
    """The mask of packed rows for a model: by these pieces, where its attention takes that, else dense.

    Args:
        model: perhaps inside a PeftModel.
        end: see `TokenTrie`, in host memory.
        pieces: none for a dense mask.
        device: the model's.
    """
    dtype = inner_model(model).get_input_embeddings().weight.dtype
    if pieces and takes_pieces(model, device):
        return TrieMask(end, pieces, dtype=dtype, device=device, groups=_groups(config_of(model)))
    return dense_mask(end, dtype, device)


def takes_pieces(model: Any, device: torch.device) -> bool:
    """Whether attention may be computed by pieces: in torch's function for it, on a CPU, outside `torch.compile`."""
    return implementation(model) == "sdpa" and device.type == "cpu" and not _is_compiled(model)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _groups(config: Any) -> tuple[int, ...]:
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    return (heads // shared,) if isinstance(heads, int) and isinstance(shared, int) and 0 < shared < heads else ()


def subtree_mask(end: Tensor) -> Any:
    """FlexAttention's mask_mod of `TokenTrie.mask`."""

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[row, key])

    return mask_mod

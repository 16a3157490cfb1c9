"""The memory of an encoder-decoder's part in a training step, from its config alone; see the language models' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sysdag.components import rotary
from sysdag.components.footprint import Footprint, bytes_of, make_fake
from sysdag.components.language import key_value_slabs
from sysdag.components.language.encoder_decoder.generation_rules import GenerationRules
from sysdag.components.language.encoder_decoder.target_scorer import TargetScorer
from sysdag.components.language.footprint import of_model
from sysdag.components.language.model_cache import cache_of

if TYPE_CHECKING:
    from peft import PeftConfig

# Where configs say how many positions there are, by side; those of relative positions have none.
_POSITIONS = {
    True: ("max_decoder_position_embeddings", "max_position_embeddings"),
    False: ("max_encoder_position_embeddings", "max_position_embeddings"),
}


def check_length(owner: str, config: Any, option: str, length: int | None, *, of_decoder: bool) -> None:
    """Refuses more tokens than the encoder or the decoder has fixed frequencies for; see `sysdag.components.rotary`."""
    side = getattr(config, "decoder" if of_decoder else "encoder", config)
    rotary.check_length(owner, side.get_text_config(), option, length)


def positions_of(config: Any, *, of_decoder: bool) -> int | None:
    """How many positions the encoder or the decoder has; None where nothing limits it."""
    side = getattr(config, "decoder" if of_decoder else "encoder", None)
    for each in (config, side):
        for name in _POSITIONS[of_decoder]:
            found = getattr(each, name, None)
            if isinstance(found, int) and found > 0:
                return min(found, rotary.positions_of(each) or found)
    return None


def of_seq2seq(
    config: Any,
    dtype: torch.dtype,
    peft_config: PeftConfig | None,
    *,
    source: int,
    target: int,
    trains: bool,
    checkpoints: bool,
    device: str,
) -> Footprint:
    """An encoder-decoder's.

    Args:
        config: of transformers.
        source, target: tokens of a micro-batch.
        trains: False for a model that is frozen.
        checkpoints: whether it recomputes its activations (gradient checkpointing).
        device: `cpu` or `cuda`, whose kernels are assumed.
    """
    from transformers import AutoModelForSeq2SeqLM

    def score(model: Any) -> torch.Tensor:
        rules = GenerationRules(start=0, ends=(0,), max_new_tokens=target + 1)
        return TargetScorer(model, rules, is_checked=True)([([0] * source, [0] * target)], [None])

    return of_model(
        AutoModelForSeq2SeqLM, config, dtype, peft_config, score, trains=trains, checkpoints=checkpoints, device=device
    )


def of_decoding(config: Any, dtype: torch.dtype, *, rows: int, source: int, target: int, device: str) -> int:
    """Bytes that decoding rows of at most so many tokens side by side takes beside the weights.

    Keys and values of both attentions, those of one layer twice while rows change places; the sources' hidden states;
    and three copies of the logits.
    """
    from transformers import AutoModelForSeq2SeqLM

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype).eval()
    read = 8
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        make_fake(model)
        ids = torch.zeros(1, read, dtype=torch.int64)
        output = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
        cache = cache_of(output)
        sizes = [
            [sum(map(bytes_of, (layer.keys, layer.values))) // read for layer in part.layers]
            for part in (cache.self_attention_cache, cache.cross_attention_cache)
        ]
        hidden = bytes_of(output.encoder_last_hidden_state) // read
        logits = 3 * output.logits.shape[-1] * torch.float32.itemsize
    own, cross = (sum(each) + max(each) for each in sizes)
    return rows * ((target + key_value_slabs.ROOM) * own + source * (cross + 2 * hidden) + logits)

"""Tiny models with random weights of transformers' decoder families, built from their configs alone.

`python tests/decoder_families.py [FAMILY ...]` scores, samples and searches with each family of `AutoModelForCausalLM`
and holds that against its plain forwards; a line a family (minutes for all).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 45
# By the names that configs give them; a family gets those that its config has.
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    n_embd=32,
    d_model=32,
    embedding_dim=32,
    num_hidden_layers=2,
    n_layer=2,
    n_layers=2,
    num_layers=2,
    num_blocks=2,
    encoder_layers=2,
    decoder_layers=2,
    num_attention_heads=4,
    n_head=4,
    n_heads=4,
    num_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    attention_heads=4,
    num_key_value_heads=2,
    multi_query_group_num=2,
    intermediate_size=48,
    ffn_dim=48,
    ffn_hidden_size=48,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    n_inner=48,
    dff=48,
    d_inner=48,
    head_dim=8,
    max_position_embeddings=128,
    n_positions=128,
    n_ctx=128,
    max_seq_len=128,
    context_length=128,
    state_size=4,
    mamba_d_state=4,
    mamba_d_conv=3,
    conv_kernel=3,
    mamba_expand=2,
    expand=2,
    time_step_rank=4,
    mamba_dt_rank=4,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    moe_topk=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    word_embed_proj_dim=32,
    rotary_dim=4,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    activation_dropout=0.0,
    layerdrop=0.0,
    decoder_layerdrop=0.0,
)


def tiny_config(family: str, **options: Any) -> Any:
    """The family's config with few and small layers."""
    kind = CONFIG_MAPPING[family]
    known = set(kind().to_dict())
    small = {name: value for name, value in SMALL.items() if name in known}
    return kind(**(small | OPTIONS.get(family, {}) | options))


def tiny_decoder(family: str, *, seed: int = 0, **options: Any) -> Any:
    """A model of the family in fp32 and evaluation mode, its weights spread so far that its tokens depend on them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **options)).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
    return model.eval()


def plain_log_prob(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Sum of a completion's log-probabilities by one forward of the row alone, without mask, padding or cache."""
    if not completion:
        return 0.0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
    log_probs = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(log_probs.gather(1, torch.tensor(completion)[:, None]).sum())


def left_pad(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, P) padded on the left, and their attention mask."""
    width = max(len(row) for row in rows)
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def greedy(model: Any, prompt: Sequence[int], count: int, end: int = 1) -> list[int]:
    """The likeliest tokens one after the other, each by a forward of everything before it."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != end):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


_MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=4)
_MLA = dict(qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, head_dim=4, num_key_value_heads=4)
_TWO_KINDS = dict(layer_types=["linear_attention", "full_attention"])
# What the names above do not say.
_LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
_ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
OPTIONS: dict[str, dict[str, Any]] = {
    **{family: dict(is_decoder=True) for family in _ENCODERS},
    "axk1": _MLA,
    "axk2": _MLA,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "minicpm3": _MLA,
    "youtu": _MLA,
    "bamba": _MAMBA2 | dict(attn_layer_indices=[1]),
    "granitemoehybrid": _MAMBA2 | dict(layer_types=["mamba", "attention"], shared_intermediate_size=16),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=4),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, use_mamba_kernels=False),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "qwen3_next": _TWO_KINDS | _LINEAR,
    "qwen3_5_text": _TWO_KINDS | _LINEAR,
    "qwen3_5_moe_text": _TWO_KINDS | _LINEAR,
    "roc_bert": dict(
        is_decoder=True, pronunciation_embed_dim=16, shape_embed_dim=16, pronunciation_vocab_size=5, shape_vocab_size=5
    ),
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    "qwen4_exp_text": _LINEAR,
    "falcon_h1": _MAMBA2 | dict(mamba_d_ssm=64),
    "bailing_hybrid": _MLA | dict(num_hidden_layers=2, layer_group_size=2),
    "kimi_linear": _MLA,
    "longcat_flash": _MLA
    | dict(num_layers=2, ffn_hidden_size=48, expert_ffn_hidden_size=16, n_routed_experts=4, zero_expert_num=1),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=32, attention_window_size=8, num_key_value_heads=1),
    "reformer": dict(
        is_decoder=True,
        axial_pos_embds=False,
        attn_layers=["local", "local"],
        attention_head_size=8,
        feed_forward_size=32,
        local_attn_chunk_length=4,
    ),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "gemma4_text": dict(
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        global_head_dim=8,
    ),
    "gemma3n_text": dict(
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        intermediate_size=[48] * 4,
    ),
    "xlm": dict(emb_dim=32, n_words=VOCABULARY),
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=2,
        use_mamba_kernels=False,
    ),
    "zamba2": dict(
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_ngroups=1,
        chunk_size=4,
    ),
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=8, n_groups=1, chunk_size=4
    ),
    "zaya": dict(num_experts_per_tok=1),
    "ernie4_5_moe": dict(moe_k=2),
    "xlstm": dict(num_heads=4, qk_dim_factor=1.0, v_dim_factor=1.0, mode="inference", chunk_size=4),
    "llama4_text": dict(attention_chunk_size=8, interleave_moe_layer_step=2, intermediate_size_mlp=48),
    "mistral": dict(sliding_window=4),
    "deepseek_v4": dict(),
}


def _worst(pairs: Sequence[tuple[float, float]]) -> str:
    error = max(abs(found - wanted) for found, wanted in pairs)
    return "ok" if error < 2e-3 else f"WRONG by {error:.2g} nats"


def report(family: str) -> str:
    """What scoring, sampling and searching with the family come to."""
    from tiny import char_tokenizer

    from sysdag import Draw, SysdagError
    from sysdag.components import CausalLM
    from sysdag.components.language.beam import diverse_beam_search

    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(family)).parameters())
        if size > 4_000_000:
            return f"not built: {size} parameters with the small values that are known"
        model = tiny_decoder(family)
    except Exception as raised:  # noqa: BLE001 (a family whose config needs more than the small values)
        return f"not built: {type(raised).__name__}: {str(raised)[:80]!r}"
    texts = ["ab", "a longer prompt", "z? yes"]
    lm = CausalLM(model, char_tokenizer(), max_new_tokens=6, max_length=64)
    prompts = lm.prompt_ids(texts)

    def score() -> str:
        completions = [[4, 5, 6, 1], [7, 8], [9, 10, 11]]
        found = lm.log_prob(texts, [Draw("", {"token_ids": ids}) for ids in completions]).tolist()
        return _worst([(f, plain_log_prob(model, *each)) for f, *each in zip(found, prompts, completions, strict=True)])

    def sample() -> str:
        draws = lm.sample(texts * 2, generator=torch.Generator().manual_seed(1))
        return _worst(
            [
                (d.log_prob, plain_log_prob(model, p, d.record["token_ids"]))
                for p, d in zip(prompts * 2, draws, strict=True)
            ]
        )

    def search() -> str:
        ids, mask = left_pad(prompts, 0, torch.device("cpu"))
        options = dict(max_new_tokens=6, pad_token_id=0, num_beam_groups=1, diversity_penalty=0.0)
        best, _ = diverse_beam_search(model, ids, mask, num_beams=1, eos_token_id=1, **options)
        for prompt, row in zip(prompts, best, strict=True):
            wanted = greedy(model, prompt, 6)
            if row[0, : len(wanted)].tolist() != wanted:
                return "WRONG tokens"
        found, scores = diverse_beam_search(model, ids, mask, num_beams=4, **options)
        return _worst(
            [
                (6 * float(scores[b, n]), plain_log_prob(model, prompt, found[b, n].tolist()))
                for b, prompt in enumerate(prompts)
                for n in range(4)
            ]
        )

    def told(do: Callable[[], str]) -> str:
        try:
            return do()
        except SysdagError as raised:
            return f"refused ({str(raised)[:70]}...)"

    return f"score {told(score)}, sample {told(sample)}, search {told(search)}"


def main(families: Sequence[str]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.basicConfig(format="    %(message)s", stream=sys.stdout)
    for family in families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        print(f"{family}: {report(family)}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])

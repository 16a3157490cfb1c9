"""GGUF files as llama.cpp's converter writes them of small models, by the package gguf."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest

gguf = pytest.importorskip("gguf", reason="needs the package gguf (the extra `real`)")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def vocabulary(size: int) -> list[str]:
    found = ["<s>", "</s>", "ab", *map(chr, range(97, 123))]
    return found + [f"<{number}>" for number in range(size - len(found))]


def head(path: Path, architecture: str, config: Mapping[str, Any], *, splits: str | None = "llama-bpe") -> Any:
    """A writer with what every model of a decoder has, and a byte-pair vocabulary.

    Args:
        config: `layers`, `positions`, `width`, `inner`, `heads`, `kv`, `epsilon`, `base` and `vocabulary`.
        splits: how the tokenizer splits texts.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(config["layers"])
    writer.add_context_length(config["positions"])
    writer.add_embedding_length(config["width"])
    writer.add_feed_forward_length(config["inner"])
    writer.add_head_count(config["heads"])
    writer.add_head_count_kv(config["kv"])
    is_centred = architecture in ("stablelm", "starcoder2")
    (writer.add_layer_norm_eps if is_centred else writer.add_layer_norm_rms_eps)(config["epsilon"])
    writer.add_rope_freq_base(config["base"])
    size = config["vocabulary"]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    if splits is not None:
        writer.add_tokenizer_pre(splits)
    writer.add_token_list(vocabulary(size))
    writer.add_token_types([3, 3] + [1] * (size - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return writer


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    path: Path,
    model: Any,
    architecture: str = "llama",
    *,
    entries: Callable[[Any], None] = lambda _: None,
    tensors: Mapping[str, numpy.ndarray] | None = None,
    without: str | None = None,
    splits: str | None = "llama-bpe",
) -> None:
    """A Llama or Qwen2 of transformers as a file.

    Args:
        entries: adds more of them, given the writer.
        tensors: more of them.
        without: the name of a projection that is left out.
        splits: as in `head`.
    """
    config, state = model.config, model.state_dict()
    sizes = {
        "layers": config.num_hidden_layers, "positions": config.max_position_embeddings, "width": config.hidden_size,
        "inner": config.intermediate_size, "heads": config.num_attention_heads, "kv": config.num_key_value_heads,
        "epsilon": config.rms_norm_eps, "base": config.rope_parameters["rope_theta"], "vocabulary": config.vocab_size,
    }  # fmt: skip
    writer = head(path, architecture, sizes, splits=splits)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    entries(writer)
    for layer in range(config.num_hidden_layers):
        for own, theirs in NAMES.items():
            for kind in ("weight", "bias"):
                name = f"model.layers.{layer}.{own}.{kind}"
                if name in state and theirs != without:
                    writer.add_tensor(
                        f"blk.{layer}.{theirs}.{kind}", _arranged(state[name].numpy(), own, config, architecture)
                    )
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    finish(writer)


def _arranged(tensor: numpy.ndarray, own: str, config: Any, architecture: str) -> numpy.ndarray:
    """Queries and keys of a Llama, whose halves of a head llama.cpp has in turns."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(own)
    if architecture != "llama" or heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))

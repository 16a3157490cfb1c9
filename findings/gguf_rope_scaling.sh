#!/usr/bin/env bash
# transformers 5.23.0: a GGUF file's scaled rotary frequencies are left out, so that Llama 3.1 and YaRN files are other models.
#
# Guess: from_pretrained(gguf_file=...) takes over how a file scales rotary frequencies: the tensor rope_freqs.weight,
# which llama.cpp's converter writes of Llama 3.1 and later, and the entries rope.scaling.* of YaRN and linear scaling.
# Seen: none of them. The tensor has no parameter and is dropped, the entries are told of at level info; the config says
# rope_type default, and log-probabilities of a short text are off by nats.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import gguf
import numpy
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HEADS, KV, SIZE = 4, 2, 64
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def in_turns(tensor, heads):
    """Queries and keys of a Llama, as llama.cpp has the two halves of a head."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).copy()


def built(kind, config, rope):
    torch.manual_seed(0)
    return kind(config(
        vocab_size=SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.3,
        rope_parameters=rope,
    )).eval()


def written(model, architecture, more):
    writer = gguf.GGUFWriter("model.gguf", architecture)
    writer.add_name("small")
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZE)
    if architecture == "llama":
        writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(SIZE)])
    writer.add_token_types([1] * SIZE)
    writer.add_token_merges([])
    more(writer)
    state = model.state_dict()
    for layer in range(2):
        for own, theirs in NAMES.items():
            for part in ("weight", "bias"):
                if (name := f"model.layers.{layer}.{own}.{part}") not in state:
                    continue
                tensor, heads = state[name].numpy(), {"attn_q": HEADS, "attn_k": KV}.get(theirs)
                tensor = in_turns(tensor, heads) if architecture == "llama" and heads else tensor
                writer.add_tensor(f"blk.{layer}.{theirs}.{part}", tensor)
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def off(model):
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32)
    row = torch.randint(SIZE, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = read(row).logits.log_softmax(-1) - model(row).logits.log_softmax(-1)
    return float(apart.abs().max()), read.config.rope_parameters["rope_type"]


plain = built(LlamaForCausalLM, LlamaConfig, {"rope_type": "default", "rope_theta": 10000.0})
written(plain, "llama", lambda writer: None)
unscaled, _ = off(plain)

llama3 = built(LlamaForCausalLM, LlamaConfig, {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
})  # fmt: skip
factors = 10000.0 ** -(numpy.arange(0, 8, 2) / 8) / llama3.model.rotary_emb.inv_freq.numpy()
written(llama3, "llama", lambda writer: writer.add_tensor("rope_freqs.weight", factors.astype(numpy.float32)))
of_llama3, kind_of_llama3 = off(llama3)


def yarn_entries(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(1024)


yarn = built(Qwen2ForCausalLM, Qwen2Config, {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
})  # fmt: skip
written(yarn, "qwen2", yarn_entries)
of_yarn, kind_of_yarn = off(yarn)

print(f"transformers {transformers.__version__}: log-probabilities off by {unscaled:.1e} unscaled, {of_llama3:.2f} with "
      f"rope_freqs.weight (rope_type {kind_of_llama3}), {of_yarn:.2f} with YaRN (rope_type {kind_of_yarn})")
assert unscaled < 1e-4, "even an unscaled file is read otherwise"
assert of_llama3 > 0.5 and of_yarn > 0.5, "scaled frequencies are taken over now"
PY

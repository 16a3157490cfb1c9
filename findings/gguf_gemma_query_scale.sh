#!/usr/bin/env bash
# transformers 5.23.0: the GGUF file of a Gemma 2 or 3 of 27 B is read with queries scaled as those of the smaller ones.
#
# Guess: the config that is made of a GGUF file of Gemma 2 27B says query_pre_attn_scalar 144, as the published one does
# (4608 / 32; Gemma 3 27B: 5376 / 32 = 168), since the entries name width and heads.
# Seen: 256 for both, the class's default, which is right for all smaller ones: all attention logits of the 27 B models
# are divided by 16 instead of by 12 (12.96). No entry of the format holds the scale; llama.cpp tells these models by
# their number of layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import gguf
import transformers
from transformers import AutoConfig

PUBLISHED = {"gemma2": (46, 4608, 16, 4096, 144), "gemma3": (62, 5376, 16, 1024, 168)}
found = {}
for architecture, (layers, width, kv, window, _) in PUBLISHED.items():
    writer = gguf.GGUFWriter("model.gguf", architecture)
    writer.add_name("27B")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(4 * width)
    writer.add_head_count(32)
    writer.add_head_count_kv(kv)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.0, 0.0])
    writer.add_token_types([1, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found[architecture] = AutoConfig.from_pretrained(".", gguf_file="model.gguf").query_pre_attn_scalar
wanted = {architecture: each[-1] for architecture, each in PUBLISHED.items()}
print(f"transformers {transformers.__version__}: query_pre_attn_scalar {found}, published {wanted}")
assert found == {"gemma2": 256, "gemma3": 256}, "the scale is told by the model's size now"
PY

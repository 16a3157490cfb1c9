#!/usr/bin/env bash
# transformers 5.23.0, BartForCausalLM: with more decoder than encoder layers it cannot decode with its cache.
#
# Guess: a decoder alone has no use for `encoder_layers`.
# Seen: its cache has as many layers as the config's encoder; with fewer of those `generate` raises an IndexError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import BartConfig, BartForCausalLM


def decoded(encoder_layers, decoder_layers):
    sizes = dict(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    config = BartConfig(
        vocab_size=32, max_position_embeddings=32, encoder_layers=encoder_layers, decoder_layers=decoder_layers, **sizes
    )
    torch.manual_seed(0)
    model = BartForCausalLM(config).eval()
    try:
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=None)
        return model.generate(torch.tensor([[3, 4, 5]]), **options).shape[1]
    except IndexError as error:
        return str(error)


equal, fewer = decoded(2, 2), decoded(1, 2)
print(f"transformers {transformers.__version__}: 2 and 2 layers give {equal} tokens, 1 and 2: {fewer}")
assert equal == 7
assert fewer == "list index out of range", "decoders with fewer encoder layers decode now"
PY

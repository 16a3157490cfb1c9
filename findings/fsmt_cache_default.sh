#!/usr/bin/env bash
# transformers 5.23.0, FSMTForConditionalGeneration: with its defaults the decoder looks at the tokens that follow.
#
# Guess: the logits behind a prefix of the decoder's tokens are the same whether more tokens follow or not.
# Seen: they are with use_cache=False. The default is a cache, with which the model makes no causal mask at all, since
# generation feeds it a token at a time; a forward for scores in which use_cache is left out is no likelihood.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import FSMTConfig, FSMTForConditionalGeneration

torch.manual_seed(0)
config = FSMTConfig(
    langs=["en", "de"], src_vocab_size=40, tgt_vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    max_position_embeddings=32,
)
model = FSMTForConditionalGeneration(config).eval()
for parameter in model.parameters():
    if parameter.requires_grad and parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.3)
source, target = torch.tensor([[5, 9, 7]]), torch.tensor([[2, 11, 12, 13]])


@torch.no_grad()
def difference(**options):
    whole = model(input_ids=source, decoder_input_ids=target, **options).logits[0, 1]
    prefix = model(input_ids=source, decoder_input_ids=target[:, :2], **options).logits[0, 1]
    return float((whole - prefix).abs().max() / whole.std())


default, without = difference(), difference(use_cache=False)
print(f"transformers {transformers.__version__}: by default {default:.2f} of the spread, use_cache=False {without:.1e}")
assert without < 1e-4, "without a cache it looks ahead, too"
assert default > 0.01, "it is causal by default now"
PY

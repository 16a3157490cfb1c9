#!/usr/bin/env bash
# transformers 5.23.0: with dynamic rotary scaling a row's logits depend on the longest row beside it, and on earlier calls.
#
# Guess: padded and masked rows do not see each other; a row of 10 tokens, below max_position_embeddings of 16, is turned
# by the unscaled frequencies whatever stands beside it.
# Seen: the frequencies are those of the largest position of the whole call, so a row of 10 beside one of 40 changes; and
# a row of 20 keeps the frequencies of a row of 40 that an earlier call had. Neither is warned of.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.5,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
)
model, fresh = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
fresh.load_state_dict(model.state_dict())
row, long = torch.arange(3, 13)[None], torch.arange(40)[None]
batch, mask = torch.zeros(2, 40, dtype=torch.int64), torch.ones(2, 40, dtype=torch.int64)
batch[0, :10], batch[1], mask[0, 10:] = row[0], long[0], 0
with torch.no_grad():
    alone = model(row).logits
    beside = model(batch, attention_mask=mask).logits[:1, :10]
    twenty = torch.arange(20)[None]
    model(long)
    after, first = model(twenty).logits, fresh(twenty).logits
apart = {"beside a longer row": alone - beside, "after a longer row": after - first}
apart = {what: float(difference.abs().max()) for what, difference in apart.items()}
print(f"transformers {transformers.__version__}: logits of one row change by {apart}")
assert all(each > 1 for each in apart.values()), "a row's logits are its own now"
PY

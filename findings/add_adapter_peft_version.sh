#!/usr/bin/env bash
# transformers 5.24.0 and peft 0.21.2, the newest of both on 28 November 2026: `add_adapter` serves no published peft.
#
# Guess: the newest releases work together.
# Seen: `add_adapter` raises a ValueError that asks for peft 0.22.0 or newer; peft's own `get_peft_model` takes the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import peft
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
try:
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).add_adapter(config)
    said = "nothing"
except ValueError as error:
    said = str(error)
trained = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), config)
count = sum(parameter.requires_grad for parameter in trained.parameters())
print(f"transformers {transformers.__version__}, peft {peft.__version__}: {said}; get_peft_model trains {count} tensors")
assert "please use a version >= 0.22.0" in said, "add_adapter takes this peft now"
assert count == 2
PY

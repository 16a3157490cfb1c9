#!/usr/bin/env bash
# peft 0.21.2, Lily: what a token's layer computes depends on the other tokens and rows of the batch.
#
# Guess: an adapter of a linear layer works on each token by itself, so a row gives the same logits alone and in a batch.
# Seen: the router's probabilities are averaged over all tokens of a call, so logits of a row change with its
# neighbours, and those of a token with the tokens behind it: a language model with it is not causal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def moved(config):
    """How far logits of the first two tokens move when a third follows them, for one adapter."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=32)
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config).double().eval()
    for name, parameter in model.named_parameters():
        if "lily" in name or "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        short = model(input_ids=torch.tensor([[3, 7]])).logits
        longer = model(input_ids=torch.tensor([[3, 7, 11]])).logits[:, :2]
    return float((short - longer).abs().max())


modules = ["q_proj", "v_proj"]
lora, lily = moved(peft.LoraConfig(target_modules=modules)), moved(peft.LilyConfig(target_modules=modules))
print(f"peft {peft.__version__}: LoRA {lora:.1e}, Lily {lily:.1e}, in fp64")
assert lora < 1e-12
assert lily > 1e-6, "Lily is causal now"
PY

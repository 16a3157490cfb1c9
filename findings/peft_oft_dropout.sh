#!/usr/bin/env bash
# peft 0.21.2, OFT: `module_dropout` drops nothing.
#
# Guess: as the dropouts of LoRA and BOFT do, it makes two passes in train mode differ.
# Seen: they are equal to the last bit; the value is kept in the config and its layer is never called.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import peft
import torch

torch.manual_seed(0)


def spread(config, kind):
    """How far two passes in train mode lie apart."""
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)), config).train()
    for name, parameter in model.named_parameters():
        if kind in name:
            torch.nn.init.normal_(parameter, std=0.3)
    given = torch.randn(64, 32)
    with torch.no_grad():
        return float((model(given) - model(given)).abs().max())


lora = spread(peft.LoraConfig(target_modules=["0"], r=4, lora_dropout=0.5), "lora_")
boft = spread(peft.BOFTConfig(target_modules=["0"], boft_block_size=8, boft_dropout=0.5), "boft_")
oft = spread(peft.OFTConfig(target_modules=["0"], oft_block_size=8, module_dropout=0.5), "oft_")
print(f"peft {peft.__version__}: two passes in train mode differ by {lora:.2f} (LoRA), {boft:.2f} (BOFT), {oft} (OFT)")
assert lora > 0.01 and boft > 0.01
assert oft == 0, "OFT drops something now"
PY

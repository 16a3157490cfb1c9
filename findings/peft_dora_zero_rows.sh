#!/usr/bin/env bash
# peft 0.21.2, DoRA: one output row of zeros in a weight makes nan of that output before any training, and of all gradients.
#
# Guess: a new adapter is the identity on any weight; where a row is all zeros (a block that was added with zeroed
# projections, a pruned channel), its magnitude is 0 and the row stays 0.
# Seen: magnitude over length is 0 / 0. Linear layers and convolutions answer nan there, and the gradients of lora_A,
# lora_B and the magnitudes are nan whole, so that the first step destroys the adapter. An embedding with such a row is
# unharmed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import peft
import torch
from torch import nn

torch.manual_seed(0)
cases = {
    "Linear": (nn.Linear(8, 8), torch.randn(3, 8)),
    "Conv2d": (nn.Conv2d(4, 4, 1), torch.randn(1, 4, 2, 2)),
    "Embedding": (nn.Embedding(8, 8), torch.arange(8)),
}
found = {}
for kind, (layer, given) in cases.items():
    with torch.no_grad():
        layer.weight[0] = 0
    model = nn.Sequential()
    model.add_module("layer", layer)
    assert not model(given).isnan().any()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["layer"], use_dora=True, r=2))
    answer = adapted(given)
    answer.nan_to_num().sum().backward()
    spoiled = [p.grad.isnan().any().item() for p in adapted.parameters() if p.grad is not None]
    found[kind] = (bool(answer.isnan().any()), all(spoiled))
print(f"peft {peft.__version__}: nan in (the answer, each gradient) {found}")
wanted = {"Linear": (True, True), "Conv2d": (True, True), "Embedding": (False, False)}
assert found == wanted, "rows of zeros are treated otherwise now"
PY

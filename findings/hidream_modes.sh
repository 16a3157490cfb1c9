#!/usr/bin/env bash
# diffusers 0.42.1, HiDreamImageTransformer2DModel: eval mode gives its experts no gradient, train mode another answer.
#
# Guess: eval() and train() differ in dropout at most, of which it has none: the same answer, and gradients in both.
# Seen: in eval mode the routed experts run without a graph, so that they get no gradient while all else does; in train
# mode the answer is a padded sequence of patches, not the picture that its pipeline hands to the scheduler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import diffusers
import torch
from diffusers import HiDreamImageTransformer2DModel

torch.manual_seed(0)
model = HiDreamImageTransformer2DModel(
    patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
    num_attention_heads=2, caption_channels=[8, 12], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
    axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1],
)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
arguments = dict(
    hidden_states=torch.randn(1, 4, 8, 8), timesteps=torch.tensor([500.0]), encoder_hidden_states_t5=torch.randn(1, 5, 8),
    encoder_hidden_states_llama3=torch.randn(2, 1, 5, 12), pooled_embeds=torch.randn(1, 16), return_dict=False,
)


def run(training):
    model.train(training).zero_grad()
    answer = model(**arguments)[0]
    answer.sum().backward()
    experts = [p.grad is not None for name, p in model.named_parameters() if ".experts." in name]
    others = [p.grad is not None for name, p in model.named_parameters() if ".experts." not in name]
    return tuple(answer.shape), sum(experts), sum(others)


evaluated, trained = run(False), run(True)
print(f"diffusers {diffusers.__version__}: eval {evaluated}, train {trained} (shape, experts with a gradient, others)")
assert evaluated[1] == 0 < evaluated[2], "the experts get gradients in eval mode now"
assert trained[1] > 0, "the experts get none in train mode either"
assert evaluated[0] != trained[0], "both modes answer alike now"
PY

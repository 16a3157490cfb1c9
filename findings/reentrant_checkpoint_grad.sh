#!/usr/bin/env bash
# torch 2.13.0: torch.autograd.grad leaves out parameters inside a checkpoint with reentrance, and says nothing.
#
# Guess: it raises, as documented: checkpoints with use_reentrant=True do not go with torch.autograd.grad.
# Seen: it raises where the checkpoint lies between the output and one of the inputs that are asked for. A parameter
# inside lies behind nothing that the graph shows, so with allow_unused=True its gradient is None, as if it had no part
# in the output; that of a layer behind the checkpoint comes, so nothing looks amiss. backward() reaches both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
inside, behind = nn.Linear(4, 4), nn.Linear(4, 1)
weights = [inside.weight, behind.weight]
rows = torch.randn(3, 4, requires_grad=True)


def output(reentrant):
    return behind(checkpoint(inside, rows, use_reentrant=reentrant)).sum()


wanted = torch.autograd.grad(output(False), weights, allow_unused=True)
found = torch.autograd.grad(output(True), weights, allow_unused=True)
print(f"torch {torch.__version__}: gradients {[g is not None for g in wanted]} without reentrance,",
      f"{[g is not None for g in found]} with it")
try:
    torch.autograd.grad(output(True), [rows])
    raised = False
except RuntimeError as error:
    raised = True
    print("by the checkpoint's input:", str(error).split(".")[0])
output(True).backward()
assert all(torch.allclose(weight.grad, gradient) for weight, gradient in zip(weights, wanted)), "backward() differs"
assert raised, "the checkpoint's input no longer raises"
assert found[0] is None and found[1] is not None, "the layer inside has its gradient, or none comes"
PY

#!/usr/bin/env bash
# torch 2.13.0: forward-mode derivatives through a custom operator with register_autograd are lost, and nothing is raised.
#
# Guess: an operator that has only a backward formula refuses forward mode, as an autograd.Function without `jvp` does.
# Seen: the dual tensor comes out without a tangent, and torch.func.jvp gives 0 for a derivative of 6.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.autograd import forward_ad


@torch.library.custom_op("findings::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
x, one = torch.tensor([3.0]), torch.ones(1)
with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(square(forward_ad.make_dual(x, one))).tangent
_, pushed = torch.func.jvp(square, (x,), (one,))
_, plain = torch.func.jvp(lambda x: x * x, (x,), (one,))
print(f"torch {torch.__version__}: tangent of a dual {dual}, jvp {pushed.item()}, of the same written plainly {plain.item()}")
assert dual is None and pushed.item() == 0 and plain.item() == 6, "the tangent is carried, or refused, now"
PY

import os

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)
settings.register_profile("sysdag", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sysdag")

# Modules of pure tensor functions: their shape annotations are checked on every call that a test makes.
_TENSOR_MODULES = [
    "objective", "decoding", "beam", "ops.preference_loss", "ops.diverse_beam_step",
    *(f"components.{n}" for n in ("forward_process", "reverse_process", "images")),
]  # fmt: skip
install_import_hook([f"sysdag.{name}" for name in _TENSOR_MODULES], "beartype.beartype")

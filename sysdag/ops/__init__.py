"""The tensor operations that training spends its time in; `use_backend` forces the backend that serves them.

Imported at once, unlike the components: an op and its file have one name, and a file that is imported later would put
itself in the op's place. Kernels, Triton and the extension load on first use.
"""

from sysdag.ops._dispatch import BackendError, resolve, use_backend
from sysdag.ops.diffusion_error import diffusion_error
from sysdag.ops.diverse_beam_step import diverse_beam_step
from sysdag.ops.linear_logprob import linear_logprob
from sysdag.ops.preference_loss import preference_loss
from sysdag.ops.token_logprob import token_logprob

__all__ = [
    "BackendError", "diffusion_error", "diverse_beam_step", "linear_logprob", "preference_loss", "resolve",
    "token_logprob", "use_backend",
]  # fmt: skip

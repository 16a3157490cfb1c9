"""Which backend serves an op: chosen from the tensors' device and what is installed, or forced.

Backends are `reference` (plain torch, always there), `cpp` (the extension's CPU kernels), `triton` (CUDA, or the
interpreter) and `cuda` (the extension's CUDA kernels). `SYSDAG_BACKEND=name` or `with use_backend(name):` forces one; a
forced backend that cannot serve raises, it is never replaced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sysdag.errors import SysdagError

Backend = Literal["reference", "cpp", "triton", "cuda"]

logger = logging.getLogger(__name__)
# Each op's backends for fp32 tensors, fastest first; for other dtypes and options an op may have fewer.
IMPLEMENTATIONS: dict[str, tuple[Backend, ...]] = {
    "linear_logprob": ("cpp", "triton"),
    "token_logprob": ("cpp", "triton"),
    "preference_loss": ("cpp", "triton"),
    "diverse_beam_step": ("cpp", "cuda", "triton"),
    "diffusion_error": ("cpp", "triton"),
}
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None)))
_forced: ContextVar[Backend | None] = ContextVar("sysdag_backend", default=None)


class BackendError(SysdagError, RuntimeError):
    """A forced backend cannot serve the op on these tensors."""


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Forces a backend for every op called inside.

    Raises:
        BackendError: for an unknown name.
    """
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def _checked(name: str) -> Backend:
    if name not in get_args(Backend):
        raise BackendError(f"Unknown backend {name!r}; the backends are {list(get_args(Backend))}.")
    return name  # type: ignore[return-value]


def forced_backend() -> Backend | None:
    """The backend that the context or `SYSDAG_BACKEND` asks for, if any."""
    named = _forced.get()
    if named is None and os.environ.get("SYSDAG_BACKEND"):
        named = _checked(os.environ["SYSDAG_BACKEND"])
    return named


def resolve(op: str, device: torch.device, preference: Sequence[Backend]) -> Backend:
    """The backend for one call of an op.

    Args:
        op: its name, for errors.
        device: of its tensors.
        preference: the backends that implement the op for these arguments, fastest first; `reference` serves always.

    Raises:
        BackendError: if the forced backend does not implement the op for these arguments, or is not available there.
    """
    return _chosen(op, device, tuple(preference), forced_backend())


@functools.cache
def _chosen(op: str, device: torch.device, preference: tuple[Backend, ...], forced: Backend | None) -> Backend:
    if forced is not None:
        if forced != "reference" and forced not in preference:
            raise BackendError(
                f"{op}: backend {forced!r} does not implement it for these arguments; {list(preference)} do."
            )
        reason = why_unavailable(forced, device.type)
        if reason:
            raise BackendError(f"{op}: backend {forced!r} cannot serve tensors on {device}: {reason}.")
        return forced
    for name in preference:
        interpreted = name == "triton" and device.type != "cuda"  # for tests and debugging: only where it is asked for
        if not interpreted and why_unavailable(name, device.type) is None:
            return name
    return "reference"


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether a call needs no more than autograd: ordinary tensors that nothing traces, intercepts or transforms.

    Such a call goes through an `autograd.Function` straight to its backend. All others go through the registered
    operator, the one node that torch.compile, fake tensors, dispatch modes, torch.func and tensor subclasses see.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return False
    return _ORDINARY.issuperset(map(type, tensors))


def derives_eagerly(grad: Tensor, *tensors: Tensor | None) -> bool:
    """`runs_eagerly` for a backward, whose result nobody differentiates and whose gradient is one, no batch of them."""
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):  # create_graph, is_grads_batched
        return False
    return runs_eagerly(grad, *tensors)


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """For calls of a registered operator, which would lose them.

    Raises:
        NotImplementedError: a tensor carries a forward-mode tangent.
    """
    if torch.compiler.is_compiling():
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{op} has no forward-mode derivative; differentiate in reverse mode.")


@functools.cache
def why_unavailable(backend: Backend, device_type: str) -> str | None:
    """Why a backend cannot serve tensors of a type of device; None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if device_type == "cuda" or interpreted else "it needs CUDA tensors, or TRITON_INTERPRET=1"
    wanted = "cpu" if backend == "cpp" else "cuda"
    if device_type != wanted:
        return f"it needs {wanted.upper()} tensors"
    if not extension_loaded():
        return "the extension sysdag._C is not built (make build)"
    name = "cuda_built" if backend == "cuda" else "cpu_built"
    return None if hasattr(torch.ops.sysdag_C, name) else f"the extension was built without {wanted.upper()} kernels"


def why_absent(backend: Backend) -> str | None:
    """Why a backend can serve no tensors on this machine; None where it serves those of some device.

    The interpreter counts: Triton's kernels then serve wherever they are forced.
    """
    reason = why_unavailable(backend, "cpu")
    if reason is None or backend == "cpp":
        return reason
    reason = why_unavailable(backend, "cuda")
    if reason is None and not torch.cuda.is_available():
        return "torch finds no GPU"
    return reason


@functools.cache
def extension_raises() -> bool:
    """Whether an error inside the extension reaches Python; with torch 2.11 it ends the process (2.12: not tried)."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@functools.cache
def extension_loaded() -> bool:
    """Loads `sysdag/_C*.so` if it is there; says once in the log if it is there and does not load."""
    folder = Path(__file__).resolve().parent.parent
    for file in sorted(folder.glob("_C*.so")):
        try:
            torch.ops.load_library(str(file))
        except OSError as error:
            logger.warning("%s does not load, plain torch is used instead: %s", file.name, error)
        else:
            return True
    return False

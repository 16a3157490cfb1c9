"""`sysdag env`: versions, devices, and what serves each operation."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysdag.versions import installed_versions

if TYPE_CHECKING:
    import torch


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, devices, and the backends that serve each operation here.

    A report of a problem should come with what this prints.
    """
    found = environment()
    typer.echo(json.dumps(found, indent=2) if as_json else described(found))


def environment() -> dict[str, Any]:
    """What `sysdag env` prints.

    Returns:
        `versions` by package (None: not installed); `devices`, a name for each device; `forced_backend`
        (`SYSDAG_BACKEND`, or None); `absent`, by backend that can serve nothing here, why; `ops`, by op: its backends
        `here`, by kind of device which is `chosen` for fp32 tensors, and `errors` where what is forced cannot serve;
        `losses`, which of them the kernels of `preference_loss` serve and which are plain torch everywhere.
    """
    import torch

    from sysdag.ops import _dispatch

    absent = {
        backend: reason
        for backend in ("cpp", "triton", "cuda")
        if (reason := _dispatch.why_absent(backend)) is not None  # type: ignore[arg-type]
    }
    devices = _devices()
    kinds = [torch.device(kind) for kind in dict.fromkeys(name.split(":")[0] for name in devices)]
    return {
        "versions": installed_versions(),
        "devices": devices,
        "forced_backend": os.environ.get("SYSDAG_BACKEND") or None,
        "absent": absent,
        "losses": _losses(),
        "ops": {op: _served(op, kinds, absent) for op in _dispatch.IMPLEMENTATIONS},
    }


def _served(op: str, devices: Sequence[torch.device], absent: Collection[str]) -> dict[str, Any]:
    from sysdag.ops import _dispatch

    backends = _dispatch.IMPLEMENTATIONS[op]
    chosen: dict[str, str] = {}
    errors: dict[str, str] = {}
    for device in devices:
        try:
            chosen[device.type] = _dispatch.resolve(op, device, backends)
        except _dispatch.BackendError as error:
            errors[device.type] = str(error)
    here = [*(backend for backend in backends if backend not in absent), "reference"]
    return {"here": here, "chosen": chosen, "errors": errors}


def _losses() -> dict[str, list[str]]:
    from sysdag.objectives.losses import LOSSES
    from sysdag.ops.preference_loss import LOSS_TYPES

    return {"kernels": list(LOSS_TYPES), "plain": [name for name in LOSSES if name not in LOSS_TYPES]}


def _devices() -> dict[str, str]:
    import torch

    instructions = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found[f"cuda:{index}"] = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def described(found: dict[str, Any]) -> str:
    """The same as text."""
    lines = [f"{package:13} {version or 'not installed'}" for package, version in found["versions"].items()]
    lines += ["", *(f"{device:13} {what}" for device, what in found["devices"].items())]
    lines += ["", f"SYSDAG_BACKEND: {found['forced_backend'] or 'not set'}"]
    lines += [f"no {backend} backend: {reason}" for backend, reason in found["absent"].items()]
    lines.append("")
    for op, served in found["ops"].items():
        chosen = ", ".join(f"{name} on {device}" for device, name in served["chosen"].items())
        lines.append(f"{op:18} {chosen or 'none'} (here: {', '.join(served['here'])})")
        lines += [f"{'':18} {error}" for error in served["errors"].values()]
        if op == "preference_loss":
            lines.append(f"{'':18} serves {', '.join(found['losses']['kernels'])}; in plain torch everywhere: "
                         f"{', '.join(found['losses']['plain'])}, and your own")  # fmt: skip
    return "\n".join(lines)

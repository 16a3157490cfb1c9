"""The backends that each test of an op runs on.

Without a GPU, Triton's kernels run in its interpreter. That is decided when triton is imported, so the variable is set
here, before any test module is; a process that compiles kernels for real starts without it (see test_aot.py).
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "triton was imported before tests/ops/conftest.py; set TRITON_INTERPRET=1"
    os.environ["TRITON_INTERPRET"] = "1"

from interpreter import quicken

from sysdag.ops._dispatch import Backend, use_backend, why_unavailable

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    quicken()


ROOT = Path(__file__).resolve().parents[2]


class Served(NamedTuple):
    """A backend that is forced while the test runs, and where its tensors live."""

    name: Backend
    device: torch.device

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs: slow, and wrong in bf16."""
        return self.name == "triton" and self.device.type == "cpu"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those that the backend can be tested with; an op may implement fewer."""
        every = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
        return every[:-1] if self.interpreted else every


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend in turn; a test names others with `parametrize("backend", [...], indirect=True)`."""
    name: Backend = request.param
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    served = Served(name, torch.device("cuda" if on_gpu else "cpu"))
    reason = why_unavailable(name, served.device.type)
    if reason:
        pytest.skip(f"{name}: {reason}")
    with use_backend(name):
        yield served


_EACH_BACKEND = """
import json, os, traceback
import torch
from sysdag.ops._dispatch import why_unavailable
{code}
found = {{}}
for backend in ("reference", "cpp"):
    torch._dynamo.reset()
    if why_unavailable(backend, "cpu") is None:
        found[backend], os.environ["SYSDAG_BACKEND"] = None, backend
        try:
            check()
        except Exception:
            found[backend] = traceback.format_exc()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled_backends(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What the `check` of the module's `COMPILED` came to on each backend: nothing, or its error.

    All in one process of its own, without shape checks.
    """
    code = _EACH_BACKEND.format(code=request.module.COMPILED)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])

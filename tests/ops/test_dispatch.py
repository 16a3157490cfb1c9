import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sysdag.errors import SysdagError
from sysdag.ops import _dispatch
from sysdag.ops._dispatch import BackendError, forced_backend, resolve, use_backend, why_unavailable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def available(monkeypatch):
    """Pretends that exactly some backends can serve, on any device."""

    def pretend(*names):
        reason = lambda name, device_type: None if name in (*names, "reference") else "it is not here"
        monkeypatch.setattr(_dispatch, "why_unavailable", reason)
        _dispatch._chosen.cache_clear()

    monkeypatch.delenv("SYSDAG_BACKEND", raising=False)
    yield pretend
    _dispatch._chosen.cache_clear()


def test_the_first_available_of_the_preferences_serves(available):
    available("triton", "cuda")
    assert resolve("op", CUDA, ["cuda", "triton"]) == "cuda"
    assert resolve("op", CUDA, ["cpp", "triton", "cuda"]) == "triton"


def test_without_an_available_one_plain_torch_serves(available):
    available()
    assert resolve("op", CUDA, ["cuda", "triton"]) == "reference"
    assert resolve("op", CPU, []) == "reference"


def test_the_interpreter_serves_only_where_it_is_forced(available):
    available("triton")
    assert resolve("op", CPU, ["cpp", "triton"]) == "reference"
    with use_backend("triton"):
        assert resolve("op", CPU, ["cpp", "triton"]) == "triton"


def test_a_forced_backend_wins_and_ends_with_its_block(available):
    available("cpp", "triton")
    with use_backend("triton"):
        assert resolve("op", CPU, ["cpp", "triton"]) == "triton"
        with use_backend("reference"):
            assert resolve("op", CPU, ["cpp", "triton"]) == "reference"
        assert forced_backend() == "triton"
    assert forced_backend() is None
    assert resolve("op", CPU, ["cpp", "triton"]) == "cpp"


def test_a_forced_backend_ends_with_its_block_on_an_error(available):
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        1 / 0
    assert forced_backend() is None


def test_the_environment_forces_a_backend_and_the_context_outranks_it(available, monkeypatch):
    available("cpp", "triton")
    monkeypatch.setenv("SYSDAG_BACKEND", "triton")
    assert resolve("op", CPU, ["cpp", "triton"]) == "triton"
    with use_backend("cpp"):
        assert resolve("op", CPU, ["cpp", "triton"]) == "cpp"
    monkeypatch.setenv("SYSDAG_BACKEND", "")
    assert forced_backend() is None


def test_a_forced_backend_that_does_not_implement_the_op_is_an_error(available):
    available("cpp", "cuda")
    message = r"token_logprob: backend 'cuda' does not implement it for these arguments; \['cpp', 'triton'\] do"
    with use_backend("cuda"), pytest.raises(BackendError, match=message):
        resolve("token_logprob", CPU, ["cpp", "triton"])


def test_a_forced_backend_that_is_not_available_is_an_error(available):
    available("triton")
    with use_backend("cpp"), pytest.raises(BackendError, match="backend 'cpp' cannot serve tensors on cpu: it is not"):
        resolve("op", CPU, ["cpp", "triton"])


def test_unknown_names(monkeypatch):
    message = r"Unknown backend 'cude'; the backends are \['reference', 'cpp', 'triton', 'cuda'\]"
    with pytest.raises(BackendError, match=message), use_backend("cude"):
        pass
    monkeypatch.setenv("SYSDAG_BACKEND", "cude")
    with pytest.raises(BackendError, match=message):
        forced_backend()


def test_errors_are_sysdags():
    assert issubclass(BackendError, SysdagError)
    assert issubclass(BackendError, RuntimeError)


def test_reasons_name_the_device():
    assert why_unavailable("reference", "cpu") is why_unavailable("reference", "cuda") is None
    assert why_unavailable("cpp", "cuda") == "it needs CPU tensors"
    assert why_unavailable("cuda", "cpu") == "it needs CUDA tensors"


def fresh(code: str) -> str:
    """The last line that a new interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={}, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    asked = why_unavailable.__wrapped__  # as a new process asks it first
    for given in (None, "0"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if given is not None:
            monkeypatch.setenv("TRITON_INTERPRET", given)
        assert asked("triton", "cpu") == "it needs CUDA tensors, or TRITON_INTERPRET=1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert asked("triton", "cpu") is None


def test_an_extension_that_does_not_load_is_logged_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "ops").mkdir()
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    monkeypatch.setattr(_dispatch, "__file__", str(tmp_path / "ops" / "_dispatch.py"))
    loaded = _dispatch.extension_loaded.__wrapped__
    with caplog.at_level("WARNING"):
        assert loaded() is False
    assert len(caplog.records) == 1
    assert "_C.abi3.so does not load, plain torch is used instead" in caplog.text


def test_without_an_extension_nothing_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_dispatch, "__file__", str(tmp_path / "ops" / "_dispatch.py"))
    assert _dispatch.extension_loaded.__wrapped__() is False
    assert not caplog.records


def test_reasons_when_the_extension_is_not_built(monkeypatch):
    monkeypatch.setattr(_dispatch, "extension_loaded", lambda: False)
    assert "sysdag._C is not built" in _dispatch.why_unavailable.__wrapped__("cpp", "cpu")


def test_the_package_exports_functions_and_loads_no_kernel():
    """An op and its file have one name; the op must win, whichever is imported first."""
    code = """
import sys
import sysdag.ops.token_logprob
from sysdag.ops import *
from sysdag.ops import token_logprob, diffusion_error
assert callable(token_logprob) and callable(diffusion_error)
print([name for name in ("triton", "transformers") if name in sys.modules])
"""
    assert fresh(code) == "[]"

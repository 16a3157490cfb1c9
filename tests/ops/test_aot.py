"""Every GPU kernel compiles for the GPUs that are promised, within their registers and shared memory; no GPU needed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import aot_compile
import nvcc_compile
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

triton_ops = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
cuda_sources = sorted((ROOT / "csrc").glob("*.cu"))


@pytest.fixture(scope="module")
def compiled(request):
    """What became of the ops and GPUs that are tested in this run, by one process."""
    items = [item for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())]
    tests = [item.callspec.params for item in items if hasattr(item, "callspec")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    how = "--fresh" if request.config.getoption("release") else "--prove"
    command = [sys.executable, aot_compile.__file__, how]
    command += [f"{test['op']}:{test['arch']}" for test in tests]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("op", triton_ops)
def test_triton_kernels_compile(compiled, op, arch):
    kernels = compiled[f"{op}:{arch}"]
    assert isinstance(kernels, list), kernels[-4000:]
    assert kernels, f"kernels/{op}.py lists no AOT cases"
    missing = [kernel["kernel"] for kernel in kernels if kernel["key"] not in aot_compile.recorded()]
    if missing:
        warnings.warn(f"compiled, not recorded: {missing}; `python tests/ops/aot_compile.py --record`", stacklevel=1)
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel
        half = any(re.match(r"(\*|tensordesc<)(bf16|fp16)", kind) for kind in kernel["arguments"].values())
        if half and kernel["has_dot"]:
            assert kernel["has_wgmma"] == (arch == 90), kernel
            assert kernel["has_tcgen05"] == (arch == 100), kernel
        assert kernel["has_tma"] == any(kind.startswith("tensordesc") for kind in kernel["arguments"].values()), kernel


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_is_recorded_is_what_compiling_gives(compiled, request):
    """One kernel for each architecture; all of them before a release."""
    record = aot_compile.recorded()
    if request.config.getoption("release"):
        made = [kernel for name, kernels in compiled.items() if name != "proofs" for kernel in kernels]
        pairs = [(aot_compile.usage_of(kernel), record.get(kernel["key"])) for kernel in made]
    else:
        pairs = [(proof["compiled"], proof["recorded"]) for proof in compiled["proofs"].values()]
    pairs = [(now, then) for now, then in pairs if then is not None]
    if not pairs:
        pytest.skip("nothing is recorded of these kernels and this Triton")
    for now, then in pairs:
        assert now == then


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_gpu_that_the_fused_head_serves_has_its_configurations():
    from sysdag.kernels.linear_logprob_fused import CONFIGS, aot_cases

    from sysdag.ops._head_fused import CAPABILITIES

    assert tuple(CONFIGS) == CAPABILITIES
    assert [len(aot_cases(10 * major)) for major in CAPABILITIES] == [5, 5]


def test_every_kernel_of_a_file_is_compiled():
    """A kernel that `aot_cases` forgets is never seen by the compiler on machines without a GPU."""
    for op in triton_ops:
        text = (ROOT / "kernels" / f"{op}.py").read_text()
        defined = re.findall(r"^@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)", text, re.MULTILINE)
        body = text.split("def aot_cases", 1)[-1]
        used = [name for name in defined if re.search(rf"\b{name}\b", body)]
        helpers = [name for name in defined if len(re.findall(rf"\b{name}\(", text)) > 1]
        assert set(defined) == set(used) | set(helpers), f"kernels/{op}.py: aot_cases leaves some of {defined} out"


@pytest.mark.skipif(nvcc_compile.NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", cuda_sources, ids=lambda path: path.name)
def test_cuda_sources_compile_without_spills(source, request):
    record = {} if request.config.getoption("release") else nvcc_compile.recorded()
    usage = record.get(nvcc_compile.key_of(source)) or nvcc_compile.compiled(source)
    assert usage, "ptxas reported no kernel"
    assert all(stores == loads == 0 for _, stores, loads in usage), usage


@pytest.mark.release("compiles what is recorded")
@pytest.mark.skipif(nvcc_compile.NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", cuda_sources, ids=lambda path: path.name)
def test_what_is_recorded_of_nvcc_is_what_it_gives(source):
    usage = nvcc_compile.recorded().get(nvcc_compile.key_of(source))
    if usage is None:
        pytest.skip("nothing is recorded of this nvcc and torch")
    assert usage == nvcc_compile.compiled(source)


def test_compiles_with_the_torch_of_this_environment():
    """The stable ABI's macro names the oldest torch that the binary serves; ours must not be older."""
    version = re.search(r'STABLE_ABI = "0x(\w{2})(\w{2})', (ROOT / "setup.py").read_text())
    assert version
    assert tuple(int(part, 16) for part in version.groups()) <= tuple(map(int, torch.__version__.split(".")[:2]))

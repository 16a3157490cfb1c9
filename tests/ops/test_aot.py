"""Every GPU kernel compiles for the GPUs that are promised, within their registers and shared memory; no GPU needed."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NVCC = shutil.which("nvcc")

triton_ops = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
cuda_sources = sorted((ROOT / "csrc").glob("*.cu"))


@pytest.fixture(scope="module")
def compiled(request):
    """What became of the ops and GPUs that are tested in this run, by one process."""
    tests = [item.callspec.params for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot_compile.py"))]
    command += [f"{test['op']}:{test['arch']}" for test in tests]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("op", triton_ops)
def test_triton_kernels_compile(compiled, op, arch):
    kernels = compiled[f"{op}:{arch}"]
    assert isinstance(kernels, list), kernels[-4000:]
    assert kernels, f"kernels/{op}.py lists no AOT cases"
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel
        half = any(re.match(r"(\*|tensordesc<)(bf16|fp16)", kind) for kind in kernel["arguments"].values())
        if half and kernel["has_dot"]:
            assert kernel["has_wgmma"] == (arch == 90), kernel
            assert kernel["has_tcgen05"] == (arch == 100), kernel
        assert kernel["has_tma"] == any(kind.startswith("tensordesc") for kind in kernel["arguments"].values()), kernel


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


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", cuda_sources, ids=lambda path: path.name)
def test_cuda_sources_compile_without_spills(source, tmp_path):
    from torch.utils.cpp_extension import include_paths

    setup = (ROOT / "setup.py").read_text()
    abi = re.search(r'STABLE_ABI = "(\w+)"', setup)
    architectures = re.search(r"CUDA_ARCHITECTURES = \(([^)]*)\)", setup)
    macros = re.search(r"CUDA_MACROS = \(([^)]*)\)", setup)
    assert abi
    assert architectures
    assert macros
    command = [NVCC, "-c", str(source), "-o", str(tmp_path / "object.o"), "-O3", "-std=c++17", "-Xptxas", "-v"]
    command += ["-Xcompiler", "-fPIC", f"-DTORCH_TARGET_VERSION={abi[1]}"]
    command += [f"-D{name}" for name in re.findall(r'"(\w+)"', macros[1])]
    command += [f"-I{folder}" for folder in [*include_paths(), ROOT / "csrc"]]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in re.findall(r'"(\w+)"', architectures[1])]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert usage, f"ptxas reported no kernel:\n{run.stderr[-4000:]}"
    assert all(int(stores) == int(loads) == 0 for _, stores, loads in usage), run.stderr[-4000:]


def test_compiles_with_the_torch_of_this_environment():
    """The stable ABI's macro names the oldest torch that the binary serves; ours must not be older."""
    version = re.search(r'STABLE_ABI = "0x(\w{2})(\w{2})', (ROOT / "setup.py").read_text())
    assert version
    assert tuple(int(part, 16) for part in version.groups()) <= tuple(map(int, torch.__version__.split(".")[:2]))

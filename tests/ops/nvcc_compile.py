"""What nvcc makes of the CUDA sources: `python nvcc_compile.py` writes nvcc_record.json anew.

The record has, under a hash of all that decides it (the source and csrc's headers, nvcc's flags and version, torch's
version), each kernel's stack frame, spill stores and spill loads in bytes, for every GPU that setup.py names.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("nvcc_record.json")
NVCC = shutil.which("nvcc")

Usage = list[list[int]]


def flags() -> list[str]:
    """Those of setup.py, and what makes ptxas tell."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    abi = re.search(r'STABLE_ABI = "(\w+)"', setup)
    architectures = re.search(r"CUDA_ARCHITECTURES = \(([^)]*)\)", setup)
    macros = re.search(r"CUDA_MACROS = \(([^)]*)\)", setup)
    assert abi
    assert architectures
    assert macros
    found = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Xcompiler", "-fPIC", f"-DTORCH_TARGET_VERSION={abi[1]}"]
    found += [f"-D{name}" for name in re.findall(r'"(\w+)"', macros[1])]
    found += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in re.findall(r'"(\w+)"', architectures[1])]
    return found


@functools.cache
def version() -> str:
    return subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout


def key_of(source: Path) -> str:
    """Changes with whatever may change what compiling gives."""
    texts = [path.read_text(encoding="utf-8") for path in [source, *sorted(source.parent.glob("*.h"))]]
    return hashlib.sha256(repr([*texts, flags(), version(), torch.__version__]).encode()).hexdigest()[:32]


def compiled(source: Path) -> Usage:
    """Stack frame, spill stores and spill loads of each kernel for each GPU.

    Raises:
        RuntimeError: with nvcc's own words, if it does not compile.
    """
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{folder}" for folder in [*include_paths(), source.parent]]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(NVCC), "-c", str(source), "-o", f"{folder}/object.o", *flags(), *includes]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-4000:])
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    return [[int(number) for number in numbers] for numbers in re.findall(pattern, run.stderr)]


def recorded() -> dict[str, Usage]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


if __name__ == "__main__":
    record = {key_of(source): compiled(source) for source in sorted((ROOT / "csrc").glob("*.cu"))}
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")

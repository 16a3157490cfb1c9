"""What pyproject.toml cannot say: the package map, and the extension `sysdag._C`.

`kernels/` is the package `sysdag.kernels` (see sysdag/kernels.py). The extension is built where torch can be imported,
which is so with `--no-build-isolation`; without it the package works all the same, on plain torch. It uses torch's
stable ABI alone, so one binary serves torch 2.11 and newer. CUDA sources are added where torch has CUDA and nvcc is
found.
"""

import importlib.util
from pathlib import Path

from setuptools import find_packages, setup

STABLE_ABI = "0x020b000000000000"  # torch 2.11
CUDA_ARCHITECTURES = ("80", "90a", "100")
CUDA_MACROS = ("SYSDAG_WITH_CUDA", "USE_CUDA")  # ours; torch's, for the current stream


def extension() -> dict:
    """`ext_modules` and `cmdclass`, or nothing where torch is absent."""
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    if importlib.util.find_spec("torch") is None or not sources:
        return {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    define = [("TORCH_TARGET_VERSION", STABLE_ABI)]
    flags = {"cxx": ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]}
    kind = CppExtension
    if torch.version.cuda and CUDA_HOME:
        kind = CUDAExtension
        sources += sorted(str(path) for path in Path("csrc").glob("*.cu"))
        define += [(name, None) for name in CUDA_MACROS]
        flags["nvcc"] = ["-O3", "-std=c++17"]
        flags["nvcc"] += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
    built = kind(
        "sysdag._C", sources, define_macros=define, extra_compile_args=flags, py_limited_api=True, include_dirs=["csrc"]
    )
    return {
        "ext_modules": [built],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(
    packages=[*find_packages(include=["sysdag", "sysdag.*"]), "sysdag.kernels"],
    package_dir={"sysdag": "sysdag", "sysdag.kernels": "kernels"},
    package_data={
        "sysdag": ["py.typed"],
        "sysdag.labelling": ["*.sql", "page/*"],
        "sysdag.reporting": ["templates/*"],
    },
    **extension(),
)

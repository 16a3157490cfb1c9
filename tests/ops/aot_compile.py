"""Compiles Triton kernels without a GPU: `python aot_compile.py OP:ARCH ...` prints a JSON object.

To each OP:ARCH belongs the list of its kernels, or the text of the error that compiling them ended in. A process of its
own, because Triton's interpreter and its compiler exclude each other; one for all ops, because starting one takes
longer than compiling most kernels.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any


def compile_kernel(kernel: Any, arguments: dict[str, Any], options: dict[str, int], arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind.split(":")[0] if isinstance(kind, str) else "constexpr" for name, kind in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in arguments.items()
        if isinstance(kind, str) and kind.endswith(":16")
    }
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    return {
        "kernel": kernel.__name__,
        "arguments": {name: str(value) for name, value in arguments.items()},
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": compiled.metadata.shared,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "has_wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
        "has_tcgen05": "tcgen05.mma" in compiled.asm["ptx"],
        "has_tma": "cp.async.bulk.tensor" in compiled.asm["ptx"],
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What ptxas gave the one kernel of a cubin: REG, STACK, SHARED and LOCAL, as cuobjdump lists them."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


def compile_op(op: str, arch: int) -> list[dict[str, Any]] | str:
    try:
        return [compile_kernel(*case, arch) for case in importlib.import_module(f"sysdag.kernels.{op}").aot_cases(arch)]
    except Exception:  # noqa: BLE001 - of whatever kind, it is the test's to tell, and the other ops go on
        return traceback.format_exc()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    asked = [name.split(":") for name in sys.argv[1:]]
    print(json.dumps({f"{op}:{arch}": compile_op(op, int(arch)) for op, arch in asked}))

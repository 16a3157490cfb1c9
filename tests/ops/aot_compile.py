"""Compiles Triton kernels without a GPU: `python aot_compile.py OP:ARCH ...` prints a JSON object.

To each OP:ARCH belongs the list of its kernels, or the text of the error that compiling them ended in. A process of its
own, because Triton's interpreter and its compiler exclude each other; one for all ops, because starting one takes
longer than compiling most kernels.

What a kernel became is looked up in aot_record.json under a hash of all that decides it: the source of the kernel and
of what it calls, its arguments and options, Triton's version, ptxas's, and this file. What is not there is compiled.
`--record` compiles all that is missing and writes the record anew; `--fresh` compiles everything, whatever is recorded.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("aot_record.json")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ARCHITECTURES = (80, 90, 100)


def target_of(arch: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


def key_of(kernel: Any, arguments: dict[str, Any], options: dict[str, int], arch: int) -> str:
    """Changes with whatever may change what compiling gives."""
    import triton
    from triton.compiler import make_backend

    reading = [inspect.getsource(function) for function in (compile_kernel, resource_usage)]
    compiler = [triton.__version__, make_backend(target_of(arch)).hash()]
    parts = [kernel.cache_key, arguments, options, *compiler, *reading]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def compile_kernel(kernel: Any, arguments: dict[str, Any], options: dict[str, int], arch: int) -> dict[str, Any]:
    import triton
    from triton.compiler import ASTSource

    types = {name: kind.split(":")[0] if isinstance(kind, str) else "constexpr" for name, kind in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in arguments.items()
        if isinstance(kind, str) and kind.endswith(":16")
    }
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=target_of(arch), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    return {
        "kernel": kernel.__name__,
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


def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def write_record(record: dict[str, dict[str, Any]]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(record[key])}" for key in sorted(record)]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def compile_op(op: str, arch: int, record: dict[str, dict[str, Any]]) -> list[dict[str, Any]] | str:
    """Its kernels, each with its arguments and its key, and whether it came from the record."""
    found = []
    try:
        for case in importlib.import_module(f"sysdag.kernels.{op}").aot_cases(arch):
            key = key_of(*case, arch)
            usage = record.get(key)
            shown = {name: str(value) for name, value in case[1].items()}
            made = {"key": key, "is_recorded": usage is not None, "arguments": shown}
            found.append(made | (compile_kernel(*case, arch) if usage is None else usage))
    except Exception:  # noqa: BLE001 - of whatever kind, it is the test's to tell, and the other ops go on
        return traceback.format_exc()
    return found


def usage_of(kernel: dict[str, Any]) -> dict[str, Any]:
    """What the record holds of a kernel that `compile_op` found."""
    return {name: value for name, value in kernel.items() if name not in ("key", "is_recorded", "arguments")}


def proof_of(key: str, op: str, arch: int) -> dict[str, Any]:
    """What compiling the case of that key gives now."""
    cases = importlib.import_module(f"sysdag.kernels.{op}").aot_cases(arch)
    (case,) = (case for case in cases if key_of(*case, arch) == key)
    return compile_kernel(*case, arch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("asked", nargs="*", metavar="OP:ARCH", help="default: all")
    parser.add_argument("--record", action="store_true", help="write the record of all")
    parser.add_argument("--fresh", action="store_true", help="compile also what is recorded")
    parser.add_argument("--prove", action="store_true", help="compile one recorded kernel of each architecture anew")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    every = [f"{path.stem}:{arch}" for path in sorted(KERNELS.glob("*.py")) for arch in ARCHITECTURES]
    record = {} if options.fresh else recorded()
    asked = every if options.record else options.asked or every
    found: dict[str, Any] = {name: compile_op(name.split(":")[0], int(name.split(":")[1]), record) for name in asked}
    if options.record:
        failed = {name: kernels for name, kernels in found.items() if isinstance(kernels, str)}
        if failed:
            raise SystemExit("\n".join(f"{name}\n{text}" for name, text in failed.items()))
        write_record({kernel["key"]: usage_of(kernel) for kernels in found.values() for kernel in kernels})
        raise SystemExit(0)
    if options.prove:
        # The first by its key: no case in particular, and another one after any change.
        proofs: dict[int, tuple[str, str]] = {}
        for name, kernels in found.items():
            op, arch = name.split(":")
            for kernel in kernels if isinstance(kernels, list) else ():
                if kernel["is_recorded"] and (int(arch) not in proofs or kernel["key"] < proofs[int(arch)][0]):
                    proofs[int(arch)] = kernel["key"], op
        found["proofs"] = {
            key: {"recorded": record[key], "compiled": proof_of(key, op, arch)} for arch, (key, op) in proofs.items()
        }
    print(json.dumps(found))

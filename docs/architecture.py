"""The packages of sysdag as their imports show them.

`ROOMS` is the order from the bottom up, which tests/test_architecture.py holds: a package imports from those before it,
never from those after it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sysdag"

# From the bottom up, each with what it is for.
ROOMS = {
    "errors": "what sysdag raises on purpose: every error names node, row or option and what to do",
    "versions": "the versions that a run was made with",
    "files": "what lies on a disk, and how it gets there whole",
    "graph": "the language: variables, arrows, plates, loops; the plan. No torch",
    "traces": "what a run leaves behind: draws, traces, and rows in files. No torch",
    "kernels": "Triton kernels, one file an op",
    "ops": "tensor operations, one file an op: reference in torch, autograd, the choice of the backend",
    "components": "what a node draws from: the protocol, adapters, and what models share",
    "components.discrete": "one of finitely many values, and what has no likelihood",
    "components.language": "language models: prompts, decoding, packed scoring",
    "components.diffusion": "diffusion and flow matching: conditioning, noise, images, pipelines",
    "saving": "a system as a folder that its models' own libraries read",
    "execution": "running a plan, here or on Ray; its likelihood",
    "data": "preference rows, checked, as pairs",
    "objectives": "what is optimised: candidates, comparisons, losses, their options",
    "engine": "one step: score, differentiate, replay; its memory",
    "training": "the trainer around the engine: config, references, checkpoints, record",
    "evaluation": "judging runs, comparing systems, statistics",
    "labelling": "people's preferences, on a page that the machine serves to itself",
    "reporting": "one HTML file about a training",
    "theory": "Theorem 1 on systems that can be enumerated",
    "commands": "the commands of `sysdag`, one file each",
    "cli": "the `sysdag` program",
}


@dataclass(frozen=True)
class Import:
    """One module of sysdag importing another, by their full names.

    Attributes:
        scope: the enclosing functions and classes, joined by dots; "" at module level.
    """

    importer: str
    imported: str
    scope: str


def room_of(module: str) -> str:
    """The package that a module of sysdag is in: the longest of `ROOMS` that its name begins with.

    Raises:
        KeyError: for a module that is in none.
    """
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if (room := ".".join(parts[:length])) in ROOMS:
            return room
    raise KeyError(module)


def modules() -> dict[str, Path]:
    """Every module that is no `__init__`, by its full name; Triton's kernels under the name they are imported by."""
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py" and path != PACKAGE / "kernels.py"
    }
    return found | {f"sysdag.kernels.{path.stem}": path for path in sorted((ROOT / "kernels").glob("*.py"))}


def imports() -> list[Import]:
    """Every import of sysdag by itself, those inside functions too; those under `if TYPE_CHECKING` are left out.

    So is `sysdag` itself: its `__init__` has nothing but the version and the names that packages hand on.
    """
    known = set(modules())
    return [found for name, path in modules().items() for found in _imports_of(name, path, known)]


def _imports_of(importer: str, path: Path, known: set[str]) -> Iterator[Import]:
    def visit(node: ast.AST, scope: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("sysdag."):
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield Import(importer, whole if whole in known else child.module or "", scope)
            if isinstance(child, ast.Import):
                yield from (Import(importer, a.name, scope) for a in child.names if a.name.startswith("sysdag."))
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            yield from visit(child, f"{scope}.{child.name}".strip(".") if named else scope)

    return visit(ast.parse(path.read_text(encoding="utf-8")), "")

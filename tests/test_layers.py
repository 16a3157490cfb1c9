"""The architecture: imports point down, importing sysdag is cheap, and the folder `kernels/` hides nobody's package."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sysdag"

# From the bottom up; a module may import those before it.
LAYERS = [
    "errors", "versions", "statistics", "atomic", "graph", "build", "render", "plan", "outline", "encoding", "trace",
    "arrow", "trace_parquet", "row_format", "readers", "pairs",
    "source", "memory", "acceleration", "component", "residence", "hub", "system_schema",
    "component_folder", "serialization", "run_files", "model_card", "publish",
    "decoding", "kernels", "ops", "beam_decoder", "beam", "components", "execute", "running", "ray_pools", "ray_engine",
    "trace_file", "likelihood", "candidates",
    "strategies", "estimate", "candidate_cache", "objective", "options", "config", "theory",
    "trl_prompts", "row_paths", "data", "inputs", "validation",
    "comparison",
    "distributed", "micro_batch", "finite", "scoring", "precompute", "engine", "references", "replay",
    "resume", "run_record", "checkpoint", "trainer", "loading", "config_file", "train_options", "training",
    "verdicts", "judges", "judge_prompt", "endpoint", "endpoint_judge", "ranking", "evaluation", "evaluation_runs",
    "labelling", "reporting",
    "commands", "cli",
]  # fmt: skip
# A user reaches everything from a System or a Plan: these methods import upwards when they are called.
FACADES = {
    ("graph", "System.__init__"), ("graph", "System.from_parts"), ("graph", "System.compile"),
    ("graph", "System.push_to_hub"), ("graph", "System.save_pretrained"), ("graph", "System.from_pretrained"),
    ("graph", "System.load"),
    ("plan", "Plan.sample"), ("plan", "Plan.log_probs"), ("plan", "Plan.estimate"),
    ("running", "engine_of"), ("trace", "Trace.save"), ("trace", "Trace.load"),
}  # fmt: skip
TORCH_FREE = ["errors", "atomic", "graph", "build", "render", "plan", "outline", "encoding", "trace", "arrow",
              "trace_parquet", "row_format", "readers", "pairs", "source", "serialization", "execute", "running",
              "ray_engine", "reporting.read", "reporting.html", "reporting.text"]  # fmt: skip


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    """(layer, name of the enclosing function or '') of every import of sysdag outside `if TYPE_CHECKING`."""

    def visit(node, scope):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("sysdag"):
                parts = child.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in child.names]
                yield from ((name, scope) for name in names)
            if isinstance(child, ast.Import):
                yield from ((a.name.split(".")[1], scope) for a in child.names if a.name.startswith("sysdag."))
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            yield from visit(child, f"{scope}.{child.name}".strip(".") if named else scope)

    return list(visit(tree, ""))


def modules():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("__init__.py", "kernels.py")]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = layer_of(path)
    assert own in LAYERS, f"say in LAYERS where {own} stands"
    for target, scope in imports(ast.parse(path.read_text())):
        if (own, scope) in FACADES or target == own:
            continue
        allowed = LAYERS[: LAYERS.index(own)]
        lazily_named = own in ("component_folder",) and target == "components" and scope
        assert target in allowed or lazily_named, f"{own} ({scope or 'module'}) imports {target}, which is above it"


def test_components_do_not_import_each_other_in_circles():
    graph = {}
    for path in (PACKAGE / "components").glob("*.py"):
        if path.name != "__init__.py":
            found = ast.walk(ast.parse(path.read_text()))
            graph[path.stem] = {
                n.module.split(".")[2]
                for n in found
                if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("sysdag.components.")
            }
    import networkx

    assert networkx.is_directed_acyclic_graph(networkx.DiGraph(graph))


def run(code, cwd=ROOT):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_importing_sysdag_is_fast_and_loads_no_heavy_library(tmp_path):
    heavy = "('torch', 'transformers', 'diffusers')"
    code = f"import sys, sysdag; sysdag.System, sysdag.node; print([m for m in {heavy} if m in sys.modules])"
    times = []
    for _ in range(3):
        start = _seconds_of_children()
        assert run(code, tmp_path).strip() == "[]"
        times.append(_seconds_of_children() - start)
    assert min(times) < 0.3


def _seconds_of_children() -> float:
    """Processor time of all processes that were waited for: what others do on the machine does not count."""
    used = os.times()
    return used.children_user + used.children_system


def test_the_graph_and_its_files_need_no_torch():
    for name in TORCH_FREE:
        assert run(f"import sys, sysdag.{name}; print('torch' in sys.modules)").strip() == "False", name


def test_every_public_name_can_be_imported():
    import sysdag
    import sysdag.components

    for package in (sysdag, sysdag.components):
        for name in package.__all__:
            assert getattr(package, name).__name__.lower().endswith(name.lower())
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing


@pytest.mark.skipif(not any(importlib.metadata.distributions(name="kernels")), reason="needs Hugging Face's kernels")
def test_hugging_faces_kernels_package_is_not_shadowed():
    """From the root of the checkout, where a folder of the same name lies."""
    code = """
import kernels, pathlib
assert "site-packages" in kernels.__file__, kernels.__file__
from transformers import Trainer
from diffusers import UNet2DModel
UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
import sysdag.kernels
assert [pathlib.Path(p) for p in sysdag.kernels.__path__] == [pathlib.Path("kernels").resolve()]
print("fine")
"""
    assert run(code).strip() == "fine"
    assert not (ROOT / "kernels" / "__init__.py").exists()

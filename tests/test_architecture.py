"""The architecture: imports point down, importing sysdag is cheap, and the folder `kernels/` hides nobody's package."""

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "docs"))
import architecture  # noqa: E402
from architecture import PACKAGE, ROOMS, Import, imports, modules, room_of  # noqa: E402

# A user reaches everything from a System or a Plan: these methods import upwards when they are called.
FACADES = {
    ("sysdag.graph.system", "System.save_pretrained"), ("sysdag.graph.system", "System.push_to_hub"),
    ("sysdag.graph.system", "System.from_pretrained"), ("sysdag.graph.system", "System.load"),
    ("sysdag.graph.system", "System.fresh"), ("sysdag.graph.plan", "Plan.sample"),
    ("sysdag.graph.plan", "Plan.log_probs"), ("sysdag.graph.plan", "Plan.estimate"),
}  # fmt: skip
LEAVES = {"components.discrete", "components.language", "components.diffusion"}
TORCH_FREE = [
    "errors", "files.atomic", "files.encoding", "files.arrow", "files.config_file", "graph", "graph.system",
    "graph.build", "graph.loops", "graph.switches", "graph.plan", "graph.render", "graph.outline", "graph.source",
    "traces",
    "traces.trace", "traces.trace_parquet", "traces.row_format", "traces.readers", "traces.pairs",
    "saving.serialization", "execution.execute", "execution.batches", "execution.running", "execution.ray_engine",
    "components", "reporting.read", "reporting.html", "reporting.text",
]  # fmt: skip
PUBLIC = sorted(
    f"sysdag.{path.parent.relative_to(PACKAGE)}".replace("/", ".").removesuffix("..")
    for path in PACKAGE.rglob("__init__.py")
    if "__all__" in path.read_text()
)


def climbs(found: Import) -> bool:
    """Whether an import goes to a package above the importer's own."""
    order = list(ROOMS)
    return order.index(room_of(found.imported)) > order.index(room_of(found.importer))


@pytest.fixture(scope="module")
def every_import():
    return imports()


def test_every_module_has_a_room_and_every_room_a_module():
    assert {room_of(name) for name in modules()} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py", "cli.py", "errors.py", "kernels.py", "theory.py", "versions.py"
    }  # fmt: skip
    for name in modules():
        *_, package, module = name.split(".")
        assert package != module, f"{name} bears the name of its package"


def test_imports_point_down(every_import):
    upwards = {(found.importer, found.scope) for found in every_import if climbs(found)}
    assert upwards - FACADES == set()
    assert FACADES - upwards == set(), "a façade that no longer imports upwards"


def test_modules_import_modules_and_not_the_names_that_a_package_hands_on(every_import):
    """A package's names are for users; between modules they would hide which file an import comes from."""
    handed_on = [found for found in every_import if found.imported in PUBLIC and found.imported != "sysdag.ops"]
    assert [found for found in handed_on if found.importer != "sysdag.saving.component_folder"] == []


def test_leaves_do_not_import_each_other(every_import):
    for found in every_import:
        ends = {room_of(found.importer), room_of(found.imported)}
        assert len(ends) == 1 or not ends <= LEAVES, found


def test_no_circle_inside_a_package(every_import):
    graph = networkx.DiGraph()
    graph.add_edges_from(
        (found.importer, found.imported) for found in every_import if room_of(found.importer) == room_of(found.imported)
    )
    assert not list(networkx.simple_cycles(graph))


def test_the_reader_of_imports_sees_every_form(tmp_path):
    """Broken code would make the tests above pass on anything."""
    text = """
from typing import TYPE_CHECKING
import sysdag.files.atomic
from sysdag.files import atomic
from sysdag.files.atomic import current
if TYPE_CHECKING:
    from sysdag.training.trainer import SysDPOTrainer
class A:
    async def f(self):
        if True:
            from sysdag.engine import step
"""
    (tmp_path / "module.py").write_text(text)
    found = [
        (i.imported, i.scope) for i in architecture._imports_of("sysdag.x", tmp_path / "module.py", set(modules()))
    ]
    assert found == [("sysdag.files.atomic", "")] * 3 + [("sysdag.engine.step", "A.f")]
    assert climbs(Import("sysdag.files.atomic", "sysdag.graph.plan", ""))
    assert not climbs(Import("sysdag.graph.plan", "sysdag.files.atomic", ""))


def test_the_picture_and_the_table_are_those_of_the_code():
    """Of the picture what can be read off it: the rooms floor by floor, and the arrows."""
    graph = architecture.arrows()
    drawn = architecture.PICTURE.read_text(encoding="utf-8")
    again = "run: python docs/architecture.py"
    assert sorted(re.findall(r'id="arrow:(.+?):(.+?)"', drawn)) == sorted(graph.edges), again
    stops = [stop for floor in reversed(architecture.ordered(graph)) for stop in floor]
    assert re.findall(r'id="room:(.+?)"', drawn) == [stop for stop in stops if isinstance(stop, str)], again
    page = architecture.PAGE.read_text(encoding="utf-8")
    assert architecture.written(page) == page, again


def test_arrows_say_what_the_imports_say(every_import):
    """Whatever a room imports is reached by arrows, each of which is an import that no path of others says."""
    graph = architecture.arrows()
    pairs = {(room_of(found.importer), room_of(found.imported)) for found in every_import if not climbs(found)}
    pairs = {(importer, imported) for importer, imported in pairs if importer != imported}
    assert set(graph.edges) <= pairs
    assert all(networkx.has_path(graph, *pair) for pair in pairs)
    for edge in list(graph.edges):
        graph.remove_edge(*edge)
        assert not networkx.has_path(graph, *edge)
        graph.add_edge(*edge)
    height = {room: at for at, floor in enumerate(architecture.floors(graph)) for room in floor}
    assert set(height) == set(ROOMS)
    assert all(height[importer] > height[imported] for importer, imported in graph.edges)


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
    """One process: a module that loads torch is named, those after it are not asked."""
    code = f"""
import importlib, sys
for name in {TORCH_FREE}:
    importlib.import_module("sysdag." + name)
    assert "torch" not in sys.modules, name
"""
    run(code)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_those_that_type_checkers_and_users_find(name):
    """`__all__`, the imports under TYPE_CHECKING, and what `__getattr__` finds are the same objects."""
    package = importlib.import_module(name)
    assert package.__all__ == sorted(package.__all__)
    if name == "sysdag.ops":  # imported at once
        return
    (guarded,) = [n for n in ast.parse(Path(package.__file__).read_text()).body if isinstance(n, ast.If)]
    sources = {alias.name: each.module for each in guarded.body for alias in each.names}
    assert sorted(sources) == package.__all__
    for public, module in sources.items():
        assert getattr(package, public) is getattr(importlib.import_module(module), public)
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

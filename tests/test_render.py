"""A plan as a table, Mermaid, DOT, networkx and a picture."""

import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from PIL import Image
from strategies import blueprints
from systems import Fake, critic, draft, node_of, question, rewrite, words

from sysdag.graph import render
from sysdag.graph.loops import loop
from sysdag.graph.system import System
from sysdag.graph.variables import Input


@pytest.fixture
def plan():
    """An input, a deterministic split, a plate, and an output that reads a deterministic value too."""
    x = Input("x")
    split, caption, end = node_of("split", "x"), node_of("caption", "split", Fake("llm")), node_of("end", "caption x")
    return System(x >> split, split.each() >> caption >> end, x >> end, outputs=["caption"]).compile()


@pytest.fixture
def looped():
    return System(
        question >> draft,
        (question & draft) >> critic,
        draft >> rewrite >> words,
        loop(critic >> rewrite, carry={"draft": rewrite}, times=2),
        outputs=["words", "critic"],
    ).compile()


def test_table(plan):
    assert str(plan).splitlines() == [
        "inputs: x; outputs are marked *",
        "level  node       parents       component        model  likelihood  value lives",
        "0      split      x             (deterministic)  -      -           0 to 1",
        "1      caption *  split.each()  Fake(llm)        0      exact       1 to 2",
        "2      end        caption, x    (deterministic)  -      -           2 to 2",
    ]


def test_table_numbers_shared_models(looped):
    model = {row.split()[1]: row.split("Fake(")[1].split()[1] for row in str(looped).splitlines() if "Fake(" in row}
    assert model == {"draft": "0", "critic[0]": "1", "rewrite[0]": "1", "critic[1]": "1", "rewrite[1]": "1"}


def test_table_keeps_to_one_line_a_node():
    class Verbose(Fake):
        def __repr__(self) -> str:
            return "Model(\n    layers=2,\n    width=3\n)"

    table = str(System(node_of("a", "", Verbose())).compile())
    assert "Model( layers=2, width=3 )" in table
    assert table.startswith("inputs: none;")
    assert len(table.splitlines()) == 3


def test_mermaid(plan):
    assert plan.to_mermaid() == (
        "flowchart TD\n"
        '    n0(["x"])\n'
        '    n1[/"split"/]\n'
        '    n2["caption<br/>Fake"]\n'
        '    n3[/"end"/]\n'
        "    n2 --> n3\n"
        '    n1 -. "each" .-> n2\n'
        "    n0 --> n3\n"
        "    n0 --> n1\n"
        "    classDef output stroke-width:3px\n"
        "    class n2 output"
    )


def test_mermaid_of_several_outputs(looped):
    lines = looped.to_mermaid().splitlines()
    key = {line.split('"')[1].partition("<")[0]: line.split("[")[0].strip("( ") for line in lines if '"' in line}
    assert lines[-1] == f"    class {key['words']},{key['critic[1]']} output"


def test_dot(plan):
    assert plan.to_dot() == (
        "digraph system {\n"
        '    "x" [shape=ellipse, penwidth=1, label="x"];\n'
        '    "split" [shape=parallelogram, penwidth=1, label="split"];\n'
        '    "caption" [shape=box, penwidth=3, label="caption\\nFake"];\n'
        '    "end" [shape=parallelogram, penwidth=1, label="end"];\n'
        '    "caption" -> "end";\n'
        '    "split" -> "caption" [style=dashed, label="each"];\n'
        '    "x" -> "end";\n'
        '    "x" -> "split";\n'
        "}"
    )


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_dot_is_read_by_graphviz(looped):
    subprocess.run(["dot", "-Tsvg"], input=looped.to_dot(), text=True, check=True, capture_output=True)


def test_networkx(plan):
    graph = plan.to_networkx()
    assert dict(graph.nodes(data=True)) == {
        "x": {"kind": "input", "output": False},
        "split": {"kind": "deterministic", "output": False},
        "caption": {"kind": "random", "output": True},
        "end": {"kind": "deterministic", "output": False},
    }
    assert graph.edges["split", "caption"] == {"parameter": "split", "each": True}
    assert graph.edges["x", "end"] == {"parameter": "x", "each": False}


@settings(max_examples=100, deadline=None)
@given(blueprints())
def test_pictures_hold_every_node_and_arrow(blueprint):
    plan = blueprint.system().compile()
    graph = plan.to_networkx()
    assert {(u, v, data["each"]) for u, v, data in graph.edges(data=True)} == {
        (edge.parent, edge.child, edge.each) for edge in plan.system.edges
    }
    assert set(graph) == {*blueprint.inputs, *blueprint.parents}
    everything = len(graph) + len(plan.system.edges)
    assert len(plan.to_mermaid().splitlines()) == 1 + everything + 2
    assert len(plan.to_dot().splitlines()) == 2 + everything
    assert len(str(plan).splitlines()) == 2 + len(plan.order)


def test_draw_writes_a_png_and_leaves_the_backend_alone(looped, tmp_path):
    import matplotlib

    before = matplotlib.rcParams._get("backend")
    render.draw(looped, tmp_path / "plan.png")
    assert matplotlib.rcParams._get("backend") == before
    with Image.open(tmp_path / "plan.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        low, high = image.convert("L").getextrema()
        assert (low, high) != (high, high)


def test_draw_takes_the_format_from_the_name(plan, tmp_path):
    render.draw(plan, str(tmp_path / "plan.svg"))
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


def test_plans_need_neither_torch_nor_matplotlib():
    code = (
        "import sys, sysdag.saving.serialization\n"
        "from sysdag import Input, System, node\n"
        "plan = System(Input('x') >> node(name='a')(lambda x: x)).compile()\n"
        "str(plan), plan.to_mermaid(), plan.to_dot(), plan.to_networkx()\n"
        "print(sorted({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"

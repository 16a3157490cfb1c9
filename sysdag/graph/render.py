"""A plan for people: a text table, Mermaid, Graphviz DOT, networkx, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx

    from sysdag.graph.plan import Plan
    from sysdag.graph.variables import Edge


def to_table(plan: Plan) -> str:
    """One line a node, in topological order, after a line of inputs."""
    alive = {name: f"{start} to {end}" for name, start, end in plan.lifetimes}
    model_of = {name: str(number) for number, names in enumerate(plan.models) for name in names}
    rows = [("level", "node", "parents", "component", "model", "likelihood", "value lives")]
    for level, names in enumerate(plan.levels):
        for name in names:
            node = plan.system[name]
            parents = ", ".join(f"{e.parent}{'.each()' if e.each else ''}" for e in plan.arguments(name)) or "-"
            if made := plan.switch(name):
                parents = f"{' or '.join(dict.fromkeys(case.end for case in made.cases))} by {made.router}"
            parents += "".join(f", if {made.router} is {made.title(at)}" for made, at in plan.switches_over(name))
            # A component's own repr may span lines; the table keeps to one a node.
            component = " ".join(repr(node.component).split()) if node.is_random else f"({_kind(plan, name)})"
            marked = name + (" *" if name in plan.system.outputs else "")
            model, likelihood = model_of.get(name, "-"), node.likelihood or "-"
            rows.append((str(level), marked, parents, component, model, likelihood, alive[name]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    inputs = ", ".join(i.name for i in plan.system.inputs) or "none"
    return "\n".join([f"inputs: {inputs}; outputs are marked *", *lines])


def to_networkx(plan: Plan) -> networkx.DiGraph:
    """Nodes carry `kind` (`input`, `random`, `deterministic`, `switch`) and `output`; edges `parameter` and `each`.

    An edge into a branch of a switch carries in `when` the values of the router that choose it.
    """
    import networkx

    graph = networkx.DiGraph()
    for given in plan.system.inputs:
        graph.add_node(given.name, kind="input", output=False)
    for name in plan.order:
        graph.add_node(name, kind=_kind(plan, name), output=name in plan.system.outputs)
    for edge in plan.system.edges:  # of two between the same nodes the one that passes a value comes last
        graph.add_edge(edge.parent, edge.child, parameter=edge.parameter, each=edge.each)
        if not edge.parameter and (when := _when(plan, edge)):
            graph.edges[edge.parent, edge.child]["when"] = when
    return graph


def _kind(plan: Plan, name: str) -> str:
    if plan.system[name].is_random:
        return "random"
    return "deterministic" if plan.switch(name) is None else "switch"


def _when(plan: Plan, edge: Edge) -> str:
    """What a switch's arrow from its router says of the branch that begins there; "" for any other."""
    return "; ".join(
        made.title(places) for made, places in plan.switches_over(edge.child) if made.router == edge.parent
    )


def _drawn(plan: Plan) -> list[tuple[str, str, str]]:
    """The arrows of a picture: parent, child, and what stands beside it. A switch has none from its router."""
    found: dict[tuple[str, str], list[str]] = {}
    for edge in plan.system.edges:
        made = plan.switch(edge.child)
        if made is not None and edge.parent == made.router and edge.parent not in [case.end for case in made.cases]:
            continue
        beside = found.setdefault((edge.parent, edge.child), [])
        beside += ["each"] if edge.each else [] if edge.parameter else [_when(plan, edge)]
    return [(parent, child, ", ".join(filter(None, beside))) for (parent, child), beside in found.items()]


def to_mermaid(plan: Plan) -> str:
    """Inputs are rounded, random nodes boxes, deterministic ones slanted, switches diamonds.

    Plates have a dotted arrow, and so have branches, with the router's value that chooses them.
    """
    key = _keys(plan)
    brackets = {
        "input": ("([", "])"), "random": ("[", "]"), "deterministic": ("[/", "/]"), "switch": ("{", "}"),
    }  # fmt: skip
    lines = ["flowchart TD"]
    for name, data in to_networkx(plan).nodes(data=True):
        left, right = brackets[data["kind"]]
        lines.append(f'    {key[name]}{left}"{_label(plan, name, "<br/>")}"{right}')
    for parent, child, beside in _drawn(plan):
        arrow = f'-. "{_escaped(beside)}" .->' if beside else "-->"
        lines.append(f"    {key[parent]} {arrow} {key[child]}")
    outputs = ",".join(key[name] for name in plan.system.outputs)
    return "\n".join([*lines, "    classDef output stroke-width:3px", f"    class {outputs} output"])


def to_dot(plan: Plan) -> str:
    """The same picture for Graphviz."""
    shapes = {"input": "ellipse", "random": "box", "deterministic": "parallelogram", "switch": "diamond"}
    lines = ["digraph system {"]
    for name, data in to_networkx(plan).nodes(data=True):
        width = 3 if data["output"] else 1
        label = _label(plan, name, "\\n")
        lines.append(f'    "{name}" [shape={shapes[data["kind"]]}, penwidth={width}, label="{label}"];')
    for parent, child, beside in _drawn(plan):
        style = f' [style=dashed, label="{_escaped(beside)}"]' if beside else ""
        lines.append(f'    "{parent}" -> "{child}"{style};')
    return "\n".join([*lines, "}"])


def draw(plan: Plan, path: str | Path) -> None:
    """Writes the graph as a picture; the file's ending chooses the format (needs matplotlib)."""
    from matplotlib.figure import Figure  # not pyplot: a figure of our own leaves the user's backend alone

    rows = [[given.name for given in plan.system.inputs], *plan.levels]
    columns = max(len(names) for names in rows)
    figure = Figure(figsize=(2.2 * columns + 1.5, 1.3 * len(rows)), dpi=150)
    axes = figure.subplots()
    axes.set(xlim=(-columns / 2 - 0.3, columns / 2 + 0.3), ylim=(0.5 - len(rows), 0.5))
    axes.set_axis_off()
    kinds = to_networkx(plan).nodes
    colours = {"input": "#dce9f7", "random": "#fbe3c8", "deterministic": "#eeeeee", "switch": "#e3f1dd"}
    place = {name: (at - (len(names) - 1) / 2, -row) for row, names in enumerate(rows) for at, name in enumerate(names)}
    boxes = {}
    for name, position in place.items():
        box = {
            "boxstyle": "round,pad=0.6" if kinds[name]["kind"] == "input" else "square,pad=0.6",
            "facecolor": colours[kinds[name]["kind"]],
            "edgecolor": "#333333",
            "linewidth": 2.5 if kinds[name]["output"] else 1.0,
        }
        boxes[name] = axes.text(*position, _label(plan, name, "\n"), ha="center", va="center", fontsize=9, bbox=box)
    figure.draw_without_rendering()  # gives the boxes their sizes: an arrow goes from the edge of one to the next
    to_data = axes.transData.inverted()
    patches = {name: text.get_bbox_patch() for name, text in boxes.items()}
    height = {name: patch.get_window_extent().transformed(to_data).height for name, patch in patches.items() if patch}
    for parent, child, beside in _drawn(plan):
        (x, y), (child_x, child_y) = place[parent], place[child]
        start, end = y - height[parent] / 2, child_y + height[child] / 2
        # Past other levels in a bow, since a straight line may run through the boxes between.
        bend = 0 if y - child_y <= 1 else -0.5 if x > child_x else 0.5
        arrow = {
            "arrowstyle": "-|>",
            "color": "#555555",
            "linestyle": "--" if beside else "-",
            "connectionstyle": f"arc3,rad={bend}",
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axes.annotate("", xy=(child_x, end), xytext=(x, start), arrowprops=arrow)
        if beside:
            axes.text((x + child_x) / 2, (start + end) / 2, f"  {beside}", ha="left", va="center", fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def _escaped(text: str) -> str:
    """Text inside the quotes of Mermaid and DOT."""
    return text.replace("\\", "/").replace('"', "'").replace("\n", " ")


def _label(plan: Plan, name: str, newline: str) -> str:
    component = next((node.component for node in plan.system.nodes if node.name == name), None)
    if component is None:
        return name
    base = _base_of(plan, name)
    return f"{name}{newline}{type(component).__name__}" + ("" if base is None else f"{newline}on the model of {base}")


def _base_of(plan: Plan, name: str) -> str | None:
    """The first node of another component whose base this node's is on; None for the first itself."""
    group = next((names for names in plan.models if name in names), (name,))
    own = plan.system[name].component
    return None if plan.system[group[0]].component is own else group[0]


def _keys(plan: Plan) -> dict[str, str]:
    names = [*(i.name for i in plan.system.inputs), *plan.order]
    return {name: f"n{number}" for number, name in enumerate(names)}

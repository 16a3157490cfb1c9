"""Systems on disk: the topology, the components' folders, and every way in which loading is refused."""

import copy
import errno
import functools
import importlib
import json
import re
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import systems
import torch
from hypothesis import given, settings
from strategies import blueprints
from systems import Fake, critic, draft, node_of, question, rewrite, words

from sysdag.components.component import Component
from sysdag.errors import SerializationError
from sysdag.graph.loops import loop
from sysdag.graph.source import source_hash
from sysdag.graph.system import System
from sysdag.graph.variables import Input, node
from sysdag.saving.serialization import (
    component_keys,
    load_weights,
    read_system,
    save_system,
    system_from_dict,
    system_to_dict,
)


class Stored(Component):
    """A component whose weights are a line of text."""

    likelihood = "exact"

    def __init__(self, weights: str | None = None, **options) -> None:
        self.weights, self.options = weights, options

    def sample(self, inputs, *, generator=None):
        raise NotImplementedError

    def observe(self, values):
        raise NotImplementedError

    def save_pretrained(self, folder):
        if self.weights == "fail":
            raise OSError("disk full")
        if self.weights is not None:
            (folder / "weights.txt").write_text(self.weights)
        return self.options

    @classmethod
    def from_pretrained(cls, folder, options):
        file = folder / "weights.txt"
        return cls(file.read_text() if file.exists() else None, **options)


class Unrelated:
    pass


first, tied = Stored("first", scale=2, mode="fast"), Stored("tied")


@node(first)
def plan(question):
    return f"Plan: {question}"


@node(tied)
def check(plan, question):
    return f"Check: {plan} {question}"


@node(tied)
def revise(plan, check):
    return f"Revise: {plan} {check}"


@node
def lines(revise) -> list[str]:
    return revise.splitlines()


@pytest.fixture
def system():
    return System(
        question >> plan,
        (plan & question) >> check,
        plan >> revise >> lines,
        loop(check >> revise, carry={"plan": revise}, times=2),
        outputs=["lines", "revise"],
    )


def refused(*parts: str):
    return pytest.raises(SerializationError, match=".*".join(re.escape(part) for part in parts))


def edited(folder: Path, change) -> Path:
    data = json.loads((folder / "system.json").read_text())
    change(data)
    (folder / "system.json").write_text(json.dumps(data))
    return folder


def row_of(data, base_name):
    return next(row for row in data["nodes"] if row["base_name"] == base_name)


def test_topology():
    body = (question & draft) >> critic >> rewrite, draft >> rewrite
    system = System(question >> draft, rewrite >> words, loop(*body, carry={"draft": rewrite}, times=1))
    data = system_to_dict(system)
    assert data == {
        "format_version": 1,
        "inputs": [{"name": "question", "value_type": "str"}],
        "nodes": [
            {
                "base_name": made.base_name,
                "visit": visit,
                "function": f"systems:{made.base_name}",
                "source_sha256": source_hash(made.function),
                "component": component,
            }
            for made, visit, component in [
                (critic, 0, "critic"),
                (draft, None, "draft"),
                (rewrite, 0, "critic"),
                (words, None, None),
            ]
        ],
        "edges": [
            {"parent": parent, "child": child, "parameter": parent.partition("[")[0], "each": False}
            for parent, child in [
                ("critic[0]", "rewrite[0]"),
                ("draft", "critic[0]"),
                ("draft", "rewrite[0]"),
                ("question", "critic[0]"),
                ("question", "draft"),
                ("rewrite[0]", "words"),
            ]
        ],
        "outputs": ["words"],
    }
    assert len({row["source_sha256"] for row in data["nodes"]}) == 4
    components = {"critic": systems.shared, "draft": draft.component}
    assert system_from_dict(json.loads(json.dumps(data)), components=components) == system


@settings(max_examples=100, deadline=None)
@given(blueprints())
def test_topology_round_trip(blueprint):
    system = blueprint.system()
    data = json.loads(json.dumps(system_to_dict(system)))
    functions = {n.base_name: n.function for n in system.nodes}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = system_from_dict(data, functions=functions, components=component_keys(system))
    assert parsed == system
    assert parsed.compile() == system.compile()


@pytest.mark.parametrize("kind", [str, int, float, list, dict, bool, None])
def test_value_types_of_builtins_are_kept(kind):
    a = node_of("a", "x")
    system = System(Input("x", kind) >> a)
    assert system_from_dict(system_to_dict(system), functions={"a": a}).inputs[0].value_type is kind


def test_other_value_types_are_dropped():
    a = node_of("a", "x y")
    system = System((Input("x", list[str]) & Input("y", bytes)) >> a)
    assert [row["value_type"] for row in system_to_dict(system)["inputs"]] == [None, None]


def test_keys_of_components():
    one, two = Fake("one"), Fake("two")
    parts = [node_of("b", "x", one), node_of("a", "x", two), node_of("c", "x", one), node_of("B", "x", Fake("three"))]
    system = System(Input("x") >> parts)
    assert {key: component.label for key, component in component_keys(system).items()} == {
        "B": "three",
        "a": "two",
        "b-2": "one",  # a folder `b` would be the folder `B` where names are not told apart by case
    }
    looped = System(loop(Input("x") >> parts[0], carry={"x": parts[0]}, times=2)).with_components({"b[1]": two})
    assert component_keys(looped) == {"b": one, "b-2": two}


def test_save_and_load(system, tmp_path):
    system.save_pretrained(str(tmp_path / "deep" / "out"))
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["check", "plan", "system.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    text = (folder / "system.json").read_text()
    assert "Plan:" not in text  # no code in it
    kind = {"class": "test_serialization:Stored", "source_sha256": source_hash(Stored)}
    assert json.loads(text)["components"] == {
        "check": {**kind, "folder": "check", "options": {}},
        "plan": {**kind, "folder": "plan", "options": {"scale": 2, "mode": "fast"}},
    }
    loaded = System.from_pretrained(folder)
    assert loaded.edges == system.edges
    assert loaded.outputs == system.outputs
    assert loaded.inputs == system.inputs
    assert [(n.name, n.function) for n in loaded.nodes] == [(n.name, n.function) for n in system.nodes]
    assert loaded["plan"].component.options == {"scale": 2, "mode": "fast"}
    assert loaded["plan"].component.weights == "first"
    visits = {id(loaded[name].component) for name in ("check[0]", "check[1]", "revise[0]", "revise[1]")}
    assert len(visits) == 1
    assert str(loaded.compile()).count("Stored") == str(system.compile()).count("Stored")


class Pickled(Stored):
    """One that writes its weights in a format of its own."""

    def save_pretrained(self, folder):
        (folder / "weights.pt").write_bytes(str(self.weights).encode())
        return {}

    @classmethod
    def from_pretrained(cls, folder, options):
        return cls((folder / "weights.pt").read_text())

    module = property(lambda self: torch.nn.Linear(1, 1))

    def load_weights(self, folder):
        self.weights = (folder / "weights.pt").read_text()


def test_a_class_of_the_users_own_may_keep_weights_in_any_format(system, tmp_path):
    other = system.with_components({"plan": Pickled("mine")})
    other.save_pretrained(tmp_path)
    assert System.from_pretrained(tmp_path)["plan"].component.weights == "mine"
    fresh = system.with_components({"plan": Pickled("other"), **dict.fromkeys(
        ("check[0]", "check[1]", "revise[0]", "revise[1]"), Pickled("x"))})  # fmt: skip
    fresh.save_pretrained(tmp_path / "all")
    fresh["plan"].component.weights = "changed"
    load_weights(fresh, tmp_path / "all")
    assert fresh["plan"].component.weights == "other"


def test_load_into_the_system_at_hand(system, tmp_path):
    save_system(system, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = system.load(tmp_path)
    assert [n.function for n in loaded.nodes] == [n.function for n in system.nodes]
    assert loaded["plan"].component is not first
    assert loaded["plan"].component.weights == "first"


def test_a_component_without_weights_needs_no_folder(tmp_path):
    system = System(question >> node_of("a", "question", Stored(level=3)))
    save_system(system, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["system.json"]
    assert system.load(tmp_path)["a"].component.options == {"level": 3}


def test_saving_again_replaces_weights_and_leaves_the_rest(system, tmp_path):
    save_system(system, tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "plan" / "stale.txt").write_text("old")
    save_system(system.with_components({"plan": Stored("second")}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check", "plan", "system.json", "trainer_state.json"]
    assert [path.name for path in (tmp_path / "plan").iterdir()] == ["weights.txt"]
    assert System.from_pretrained(tmp_path)["plan"].component.weights == "second"


def test_a_save_that_fails_changes_nothing(system, tmp_path):
    save_system(system, tmp_path / "old")
    before = (tmp_path / "old" / "system.json").read_text()
    failing = system.with_components({"plan": Stored("fail"), "check[0]": Stored("new"), "revise[0]": Stored("new")})
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            save_system(failing, tmp_path / folder)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "old" / "system.json").read_text() == before
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["check", "plan", "system.json"]
    assert System.from_pretrained(tmp_path / "old")["check[0]"].component.weights == "tied"


@pytest.mark.parametrize("number", range(1, 7))
def test_a_save_that_is_interrupted_leaves_the_old_system_or_the_new(number, system, tmp_path, monkeypatch):
    """At every move of a file or folder: before the first, the old one counts, then the new one."""
    save_system(system, tmp_path)
    other = system.with_components({name: Stored("new") for name in ("plan", "check[0]", "revise[0]")})
    moved = []

    def interrupted(source, target):
        if len(moved) == number - 1:
            raise KeyboardInterrupt
        moved.append(original(source, target))

    original = importlib.import_module("os").replace
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_system(other, tmp_path)
    monkeypatch.undo()
    before = sorted(tmp_path.rglob("*"))
    loaded = System.from_pretrained(tmp_path)
    weights = {name: loaded[name].component.weights for name in ("plan", "check[0]")}
    expected = {"plan": "first", "check[0]": "tied"} if number == 1 else {"plan": "new", "check[0]": "new"}
    assert weights == expected
    assert sorted(tmp_path.rglob("*")) == before  # a reader moves nothing, the next writer does
    save_system(loaded, tmp_path)
    assert not list(tmp_path.glob(".sav*"))
    assert System.from_pretrained(tmp_path)["plan"].component.weights == expected["plan"]


def test_a_folder_that_no_system_owns_is_not_replaced(system, tmp_path):
    (tmp_path / "plan").mkdir()
    with refused(f"Node 'plan': {tmp_path / 'plan'} exists and belongs to no system saved in {tmp_path}; saving would"):
        save_system(system, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    (tmp_path / "plan").rmdir()
    save_system(system, tmp_path)
    save_system(system.with_components({"plan": Stored()}), tmp_path)  # it has no weights any more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check", "system.json"]


def test_a_full_disk_is_told_with_what_is_needed_and_free(system, tmp_path, monkeypatch):
    save_system(system, tmp_path)

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with refused(f"The system could not be written to {tmp_path}: No space left on device. It needs up to 0.0 KiB, and",
                 "MiB are free on that disk", "What the folder held before is as it was."):  # fmt: skip
        save_system(system, tmp_path)
    monkeypatch.undo()
    assert System.from_pretrained(tmp_path)["plan"].component.weights == "first"


def test_weights_of_another_class_or_without_their_folder_are_refused(system, tmp_path):
    save_system(system, tmp_path)
    with refused(f"Node 'check': its weights cannot be loaded from {tmp_path / 'check'} (PlanError: "):
        load_weights(system, tmp_path)
    edited(tmp_path, lambda data: data["components"]["plan"].update({"class": "CausalLM"}))
    with refused(
        "holds another system: the component of node 'plan' is a CausalLM, expected test_serialization:Stored"
    ):
        load_weights(system, tmp_path)
    save_system(system, tmp_path)
    (tmp_path / "check" / "weights.txt").unlink()
    (tmp_path / "check").rmdir()
    with refused(f"Node 'check': the folder {tmp_path / 'check'} of its weights is missing."):
        load_weights(system, tmp_path)


def test_saving_to_a_file(system, tmp_path):
    (tmp_path / "file").touch()
    with refused("file is a file; a system is saved to a folder."):
        save_system(system, tmp_path / "file")


def test_components_that_cannot_be_saved(tmp_path):
    class Local(Stored):
        pass

    def saved_with(component):
        save_system(System(question >> node_of("a", "question", component)), tmp_path / "out")

    with refused("Node 'a': Fake(m) cannot be saved; its class must be a subclass of sysdag.Component."):
        saved_with(Fake())
    with refused("Node 'a': its component's class", "Local cannot be found again; move it to the top level"):
        saved_with(Local())
    with refused("Node 'a': ", "returned options that are not JSON"):
        saved_with(Stored("w", device=object()))
    with refused("Node 'a': ", "returned options that are not JSON"):
        saved_with(Stored("w", scale=float("nan")))
    assert not (tmp_path / "out").exists()


def test_missing_file_and_folder(system, tmp_path):
    with refused(f"{tmp_path / 'no' / 'system.json'} does not exist"):
        System.from_pretrained(tmp_path / "no")
    save_system(system, tmp_path)
    (tmp_path / "check" / "weights.txt").unlink()
    (tmp_path / "check").rmdir()
    with refused(f"{tmp_path / 'system.json'}: The folder {tmp_path / 'check'} of the component 'check' is missing."):
        System.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe\xff"])
def test_malformed_json(content, tmp_path):
    (tmp_path / "system.json").write_bytes(content)
    with refused(f"{tmp_path / 'system.json'} is not valid JSON: "):
        System.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "3", "null"])
def test_json_of_something_else(content, tmp_path):
    (tmp_path / "system.json").write_text(content)
    with refused("system.json: This is no saved system: it has no 'format_version'."):
        System.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"nodes":', '"outputs": [], "nodes":', "'outputs' stands there a second time."),
        ('"parent": "plan"', '"parent": "plan", "parent": "lines"', "'parent' stands there a second time."),
        ('"scale": 2', '"scale": NaN', "is not valid JSON: NaN is no number."),
        ('"scale": 2', '"scale": ' + "[" * 150 + "]" * 150, "is nested more than 100 deep."),
        ('"scale": 2', '"scale": ' + "[" * 100_000, "is nested more than 100 deep."),
        ('"scale": 2', '"scale": ' + "9" * 5000, "is not valid JSON: Exceeds the limit (4300 digits)"),
    ],
)
def test_json_that_is_read_in_two_ways_or_too_deep(old, new, message, system, tmp_path):
    save_system(system, tmp_path)
    file = tmp_path / "system.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with refused(f"{file}", message):
        System.from_pretrained(tmp_path)


CHANGES = {
    "version": (
        lambda data: data.update(format_version=2),
        "format_version is 2, and this version of sysdag reads 1; use the sysdag that wrote it.",
    ),
    "no nodes": (lambda data: data.pop("nodes"), "'nodes' must be a list, got None."),
    "nodes": (lambda data: data.update(nodes={}), "'nodes' must be a list, got {}."),
    "node": (lambda data: data["nodes"].append(3), "nodes[6] must have 'base_name', of type str, got 3."),
    "visit": (lambda data: data["nodes"][0].update(visit="a"), "nodes[0] must have 'visit', of type int or null"),
    "edge": (lambda data: data["edges"][0].pop("each"), "edges[0] must have 'each', of type bool"),
    "unknown part": (lambda data: data.update(code="x"), "'code' is no part of a saved system."),
    "unknown field": (
        lambda data: data["nodes"][0].update(code="x"),
        "nodes[0] has 'code', which no saved system has there.",
    ),
    "visit that is no number": (
        lambda data: data["nodes"][0].update(visit=True),
        "nodes[0] must have 'visit', of type int or null",
    ),
    "version that is no number": (lambda data: data.update(format_version=True), "format_version is True, and this"),
    "outputs": (lambda data: data.update(outputs=[3]), "'outputs' must be names, got [3]."),
    "components": (lambda data: data.pop("components"), "'components' must be a dict, got None."),
    "component": (
        lambda data: data["components"].pop("plan"),
        "Node 'plan' is drawn by the component 'plan', but the components are ['check'].",
    ),
    "value type": (
        lambda data: data["inputs"][0].update(value_type="set"),
        "Input 'question': unknown value_type 'set'; known are ['bool',",
    ),
    "cycle": (
        lambda data: data["edges"].append({"parent": "lines", "child": "plan", "parameter": "lines", "each": False}),
        "The saved graph and its node functions form no system. The system has a cycle",
    ),
    "name": (
        lambda data: row_of(data, "lines").update(base_name='li"nes'),
        "The saved graph and its node functions form no system. Node name must be a Python identifier",
    ),
    "folder elsewhere": (
        lambda data: data["components"]["plan"].update(folder="../plan"),
        "components['plan'] must be in a folder of that name, got '../plan'.",
    ),
    "key elsewhere": (
        lambda data: data["components"].update({"../plan": data["components"]["plan"] | {"folder": "../plan"}}),
        "components['../plan'] must be in a folder of that name, got '../plan'.",
    ),
    "class of sysdag": (
        lambda data: data["components"]["plan"].update({"class": "CausalML"}),
        "Component 'plan': sysdag has no class 'CausalML'; it has ['BiEncoder', 'Categorical', 'CausalLM',",
    ),
    "no component of sysdag": (
        lambda data: data["components"]["plan"].update({"class": "BiEncoder"}),
        "Component 'plan': BiEncoder is no subclass of sysdag.Component.",
    ),
    "class nowhere": (
        lambda data: data["components"]["plan"].update({"class": "test_serialization:Missing"}),
        "Component 'plan': its class test_serialization:Missing cannot be imported (AttributeError",
    ),
    "class of another kind": (
        lambda data: data["components"]["plan"].update({"class": "test_serialization:Unrelated"}),
        "Component 'plan': test_serialization:Unrelated is no subclass of sysdag.Component.",
    ),
    "no class": (
        lambda data: data["components"]["plan"].update({"class": "os:system"}),
        "Component 'plan': os:system is no subclass of sysdag.Component.",
    ),
    "options": (
        lambda data: data["components"]["plan"].pop("options"),
        "components['plan'] must have 'options', of type dict, got",
    ),
    "local function": (
        lambda data: row_of(data, "plan").update(function=None),
        "Node 'plan': its function was not at the top level of a module. Build the system from the function you want "
        "and call system.load(folder) on it.",
    ),
    "function of a script": (
        lambda data: row_of(data, "plan").update(function="__main__:plan"),
        "Node 'plan': its function __main__:plan was defined in a script or notebook. Build the system from",
    ),
    "module nowhere": (
        lambda data: row_of(data, "plan").update(function="nowhere_at_all:plan"),
        "Node 'plan': its function nowhere_at_all:plan cannot be imported (ModuleNotFoundError",
    ),
    "function nowhere": (
        lambda data: row_of(data, "plan").update(function="test_serialization:plane"),
        "Node 'plan': its function test_serialization:plane cannot be imported (AttributeError",
    ),
    "function changed": (
        lambda data: row_of(data, "plan").update(source_sha256="0" * 64),
        "Node 'plan': its function test_serialization:plan changed since the system was saved. Build the system",
    ),
    "function without a hash": (
        lambda data: row_of(data, "plan").update(source_sha256=None),
        "Node 'plan': its function test_serialization:plan had no source to compare with when the system was saved.",
    ),
    "function that is no node": (
        lambda data: row_of(data, "plan").update(
            function="textwrap:indent", source_sha256=source_hash(textwrap.indent)
        ),
        "Node 'plan': its function textwrap:indent is not declared as a node (@node) by its module.",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_loading_refuses(kind, system, tmp_path):
    change, message = CHANGES[kind]
    save_system(system, tmp_path)
    edited(tmp_path, change)
    with refused(f"{tmp_path / 'system.json'}: {message}"):
        System.from_pretrained(tmp_path)


def test_the_functions_at_hand_are_vouched_for(system, tmp_path):
    save_system(system, tmp_path)
    edited(tmp_path, lambda data: row_of(data, "plan").update(source_sha256="0" * 64, function="__main__:plan"))
    message = "Node 'plan': its function is not the one that the system was saved with; the one given is used."
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        loaded = system.load(tmp_path)
    assert len(caught) == 1
    assert loaded["plan"].function is plan.function
    with pytest.warns(UserWarning, match="Node 'plan'"):  # the others are imported
        assert read_system(tmp_path, {"plan": plan})["plan"].function is plan.function


def test_one_warning_for_all_visits(system, tmp_path):
    def check(plan, question):
        return "another"

    save_system(system, tmp_path)
    with pytest.warns(UserWarning, match="Node 'check'") as caught:
        loaded = read_system(tmp_path, {"check": check})
    assert len(caught) == 1
    assert loaded["check[0]"].function is loaded["check[1]"].function is check


def test_functions_that_the_saved_system_lacks(system, tmp_path):
    save_system(system, tmp_path)
    with refused("The saved system has no node 'plann'; its nodes are ['check', 'lines', 'plan', 'revise']."):
        read_system(tmp_path, {"plann": plan.function})


def test_a_function_given_that_does_not_fit(system, tmp_path):
    save_system(system, tmp_path)
    with (
        pytest.warns(UserWarning, match="Node 'plan'"),
        refused("form no system. Node 'plan' has the parent 'question', but its function takes ['query']."),
    ):
        read_system(tmp_path, {"plan": lambda query: query})


MODULE = """
import functools
from sysdag.graph import Input, System, node
from test_serialization import Stored

def loud(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapped

@node(Stored({weights!r}))
@loud
def speak(x):
    return {text!r}

def aside(x):
    return x

renamed = node(name="other")(aside)
system = System(Input("x") >> [speak, renamed])
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes and imports anew a module of nodes."""
    monkeypatch.syspath_prepend(tmp_path)

    def imported(**fields):
        (tmp_path / "user_module.py").write_text(MODULE.format(**({"weights": "w", "text": "hello"} | fields)))
        sys.modules.pop("user_module", None)
        importlib.invalidate_caches()
        return importlib.import_module("user_module")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield imported
    sys.modules.pop("user_module", None)


def test_a_change_of_the_function_is_seen_and_one_of_its_component_is_not(module, tmp_path):
    save_system(module().system, tmp_path / "out")
    loaded = System.from_pretrained(tmp_path / "out")
    assert loaded["other"].function is sys.modules["user_module"].aside
    module(weights="another component in the decorator")
    assert System.from_pretrained(tmp_path / "out")["speak"].component.weights == "w"
    module(text="goodbye")
    with refused("Node 'speak': its function user_module:speak changed since the system was saved."):
        System.from_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="Node 'speak'"):
        loaded = sys.modules["user_module"].system.load(tmp_path / "out")
    assert loaded["speak"](x="") == "goodbye"


def test_a_module_that_fails_to_import_is_named(module, tmp_path):
    save_system(module().system, tmp_path / "out")
    with (tmp_path / "user_module.py").open("a") as file:
        file.write("raise RuntimeError('no licence')\n")
    sys.modules.pop("user_module")
    importlib.invalidate_caches()
    with refused("its function user_module:", "cannot be imported (RuntimeError: no licence)"):
        System.from_pretrained(tmp_path / "out")


def test_source_hash():
    def one(x):
        return x

    again = copy.copy(one)
    assert source_hash(one) == source_hash(again) == source_hash(functools.wraps(one)(lambda x: 0))
    assert source_hash(one) != source_hash(plan.function)
    assert source_hash(max) is None
    assert source_hash(functools.partial(one, 1)) is None
    hashes = {source_hash(function) for function in (lambda x: 0, lambda x: 0)}  # a lambda has its whole statement
    assert len(hashes) == 1
    assert None not in hashes

"""What a saved system names is compared before it is imported: a module that is not the saved one never runs."""

import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
from strategies import blueprints  # noqa: F401 - the folder of tests is on the path

from sysdag.errors import SerializationError
from sysdag.graph.module_source import definitions, module_source
from sysdag.graph.source import _hash, source_hash
from sysdag.graph.system import System

MARK = "from pathlib import Path; Path({mark!r}).write_text('run')\n"
MODULE = """
from sysdag import Component, Input, System, node
from sysdag.components import Opaque

class Plain(Component):
    likelihood = "exact"
    def sample(self, inputs, *, generator=None): raise NotImplementedError
    def observe(self, values): raise NotImplementedError
    def save_pretrained(self, folder): return {}
    @classmethod
    def from_pretrained(cls, folder, options): return cls()

def ask(x):
    return x

@node(Plain())
def speak(x):
    return "hello"

@node(Opaque(ask))
def look_up(x):
    return x

system = System(Input("x") >> [speak, look_up])
"""


class Folder:
    """A saved system whose functions, class and hook are in `kept_module`, and a module `probe` that marks its run."""

    def __init__(self, place: Path) -> None:
        self.place, self.mark = place, place / "mark"
        self.write("kept_module", MODULE)
        self.write("probe", MARK.format(mark=str(self.mark)) + MODULE)
        importlib.import_module("kept_module").system.save_pretrained(place / "saved")
        self.forget()

    def write(self, name, text):
        (self.place / f"{name}.py").write_text(text)

    def forget(self):
        for name in ("kept_module", "probe", "package", "package.inner"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()

    def edit(self, change):
        file = self.place / "saved/system.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    def refused(self, message):
        with pytest.raises(SerializationError, match=re.escape(message)):
            System.from_pretrained(self.place / "saved")
        assert not self.mark.exists()
        assert "probe" not in sys.modules


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = Folder(tmp_path)
    yield made
    made.forget()


def speak_row(data):
    return next(row for row in data["nodes"] if row["base_name"] == "speak")


def test_what_was_saved_loads(folder):
    loaded = System.from_pretrained(folder.place / "saved")
    module = sys.modules["kept_module"]
    assert loaded["speak"].function is module.speak.function
    assert type(loaded["speak"].component) is module.Plain
    assert loaded["look_up"].component.function is module.ask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: speak_row(data).update(function="probe:listen"), "probe defines no listen"),
        (lambda data: speak_row(data).update(function="probe:speak", source_sha256="0" * 64), "probe:speak changed"),
        (lambda data: speak_row(data).update(function="probe:speak", source_sha256=None), "had no source to compare"),
        (lambda data: data["components"]["speak"].update({"class": "probe:Thing"}), "probe defines no Thing"),
        (lambda data: data["components"]["speak"].update({"class": "probe:Plain", "source_sha256": "0"}),
         "Component 'speak': its class probe:Plain changed since the system was saved. Import that module first"),
        (lambda data: data["components"]["speak"].update({"class": "probe:Plain", "source_sha256": None}),
         "Component 'speak': its class probe:Plain had no source"),
        (lambda data: (data["components"]["speak"].update({"class": "probe:Plain"}),
                       data["components"]["speak"].pop("source_sha256")), "its class probe:Plain had no source"),
        (lambda data: data["components"]["look_up"]["options"]["function"].update(path="probe:other"),
         "probe defines no other"),
        (lambda data: data["components"]["look_up"]["options"]["function"].update(path="probe:ask", source_sha256="0"),
         "Component 'look_up': function=probe:ask changed since"),
        (lambda data: data["components"]["look_up"]["options"]["function"].update(path="probe:ask", source_sha256=None),
         "function=probe:ask had no source"),
        (lambda data: data["components"]["look_up"]["options"].update(function="probe:ask"),
         "Opaque: function must be of type dict, got 'probe:ask'"),
    ],
)  # fmt: skip
def test_a_module_that_is_not_the_saved_one_does_not_run(change, message, folder):
    folder.edit(change)
    folder.refused(message)


def test_a_module_that_changed_does_not_run(folder):
    folder.write("kept_module", MARK.format(mark=str(folder.mark)) + MODULE.replace("hello", "goodbye"))
    folder.refused("Node 'speak': its function kept_module:speak changed since the system was saved.")
    assert "kept_module" not in sys.modules


def test_a_class_that_changed_is_taken_where_its_module_is_imported_already(folder):
    folder.write("kept_module", MODULE.replace("return cls()", "return cls() "))
    importlib.import_module("kept_module")
    assert System.from_pretrained(folder.place / "saved")["speak"].component is not None


def test_neither_does_the_package_around_it(folder):
    package = folder.place / "package"
    package.mkdir()
    (package / "__init__.py").write_text(MARK.format(mark=str(folder.mark)))
    (package / "inner.py").write_text(MODULE)
    folder.edit(lambda data: speak_row(data).update(function="package.inner:speak", source_sha256="0"))
    folder.refused("package.inner:speak changed since the system was saved")
    folder.edit(lambda data: speak_row(data).update(function="package.outer:speak"))
    folder.refused(
        "package.outer:speak cannot be imported (ModuleNotFoundError: No module named 'package.outer'; run from"
    )
    assert "package" not in sys.modules


def test_functions_that_are_given_leave_the_named_module_alone(folder):
    """Of a component that its folder cannot build, too, for which the node's module is looked into."""
    system = importlib.import_module("kept_module").system
    folder.edit(lambda data: speak_row(data).update(function="probe:speak"))
    assert system.load(folder.place / "saved")["speak"].function is system["speak"].function
    assert not folder.mark.exists()


SOURCE = '''
import functools

def plain(x):
    """A text."""
    return x
    # the last line of it

if True:
    def nested(x): return x
else:
    def nested(x): return 2 * x

class Outer:
    """With a method."""
    async def method(self):
        def plain(x):
            return "not the one at the top"
        return plain

@functools.cache
@functools.lru_cache(
    maxsize=None
)
def decorated(
    x,
):
    return x

@functools.total_ordering
class Ordered:
    def __lt__(self, other): return True
'''  # fmt: skip


@pytest.mark.parametrize("qualname", ["plain", "nested", "Outer.method", "Outer", "decorated", "Ordered"])
def test_a_source_that_is_found_without_importing_is_that_of_the_object(qualname, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "sourced.py").write_text(SOURCE.replace("\n", "\r\n"), newline="")
    found = definitions(module_source("sourced"), qualname)
    assert "sourced" not in sys.modules
    module = importlib.import_module("sourced")
    try:
        found_object = module
        for part in qualname.split("."):
            found_object = getattr(found_object, part)
        assert source_hash(found_object) in [_hash(each) for each in found]
        assert len(found) == (2 if qualname == "nested" else 1)
    finally:
        del sys.modules["sourced"]


def test_modules_without_a_source():
    assert module_source("sysdag.graph.plan").startswith('"""')
    assert module_source("itertools") is None
    for name in ("nowhere_at_all", "sysdag.nowhere", "sysdag.graph.plan.inner", "", "..", "sysdag..graph", "a b"):
        with pytest.raises(ModuleNotFoundError):
            module_source(name)
    with pytest.raises(SyntaxError):
        definitions("def f(:", "f")
    assert definitions(textwrap.dedent("x = lambda: 0\n"), "x") == []

"""A system or a function by what a command line calls it: each mistake says what is there, and what to give."""

import os
import re
import subprocess
import sys

import pytest

from sysdag.components import CausalLM
from sysdag.errors import LoadingError, PlanError, SerializationError
from sysdag.saving.loading import load_function, load_system

SYSTEM = """
from sysdag import Input, System, node
question = Input("question")
@node
def shout(question):
    return question.upper()
system = System(question >> shout)
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def refused(spec, message, load=load_system):
    with pytest.raises(LoadingError, match=f"^{re.escape(message)}$"):
        load(spec)


def test_a_file_with_one_system_needs_no_name(files):
    (files / "lone.py").write_text(SYSTEM)
    assert load_system("lone.py") is load_system("lone.py:system") is load_system(f"{files}/lone.py:system")


def test_a_saved_system_finds_its_functions_in_the_working_folder(files):
    (files / "kept.py").write_text(SYSTEM)
    load_system("kept.py").save_pretrained("saved")
    sys.modules.pop("kept")
    sys.path.remove(str(files))
    assert load_system(str(files / "saved")).compile().order == ("shout",)
    refused(f"{files}/saved:system", f"{files}/saved is a saved system, which is one by itself; give {files}/saved "
            "without :system.")  # fmt: skip


def test_what_lies_beside_a_saved_system_is_imported_only_when_asked_for(files, monkeypatch):
    (files / "elsewhere").mkdir()
    (files / "kept.py").write_text(SYSTEM)
    load_system("kept.py").save_pretrained("saved")
    sys.modules.pop("kept")
    sys.path.remove(str(files))
    monkeypatch.chdir("elsewhere")
    with pytest.raises(SerializationError, match=r"No module named 'kept'; run from .* or with PYTHONPATH=FOLDER"):
        load_system(str(files / "saved"))
    assert str(files) not in sys.path
    done = subprocess.run(
        [sys.executable, "-m", "sysdag.cli", "plan", str(files / "saved")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(files), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "shout" in done.stdout


def test_what_is_no_system(files):
    (files / "bare.py").write_text("x = 1\n")
    (files / "full.py").write_text(SYSTEM)
    refused("bare.py", "bare.py has no system; make one in it: system = System(...).")
    refused("bare.py:system", "bare.py has no 'system'; it has no system, so make one: system = System(...).")
    refused("full.py:sistem", "full.py has no 'sistem'; its systems are ['system'].")
    refused("full.py:question", "full.py has 'question', which is no System but an Input; its systems are ['system'].")
    refused("bare.py:x", "bare.py has 'x', an int that cannot be called; its functions are [].", load_function)


def test_a_place_that_is_none(files):
    (files / "apart.py").write_text(SYSTEM)
    (files / "rows.jsonl").write_text("{}\n")
    (files / "folder").mkdir()
    expected = "SYSTEM.py:name, package.module:name or a saved system's folder"
    refused("", f"'' names no file, module or folder; give {expected}.")
    refused(":system", f"':system' names no file, module or folder; give {expected}.")
    refused("rows.jsonl:system", f"rows.jsonl is no Python file, whose name ends in .py; give {expected}.")
    refused("folder", f"folder is no saved system: it has no system.json. Give {expected}.")
    refused("apart:system", "There is no module apart, but a file: give apart.py:system.")


def test_a_model_folder_that_is_damaged_is_told_with_its_component(files):
    (files / "damaged").mkdir()
    (files / "damaged/config.json").write_text("{")
    with pytest.raises(PlanError, match=r"damaged/config\.json is not valid JSON"):
        CausalLM("damaged", max_new_tokens=4)
    (files / "damaged/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OSError, match=r"^CausalLM\('damaged'\): its tokenizer cannot be loaded\. "):
        _ = CausalLM("damaged", max_new_tokens=4).tokenizer


def test_a_module_that_raises_or_ends_is_named_with_its_line(files):
    (files / "raising.py").write_text("import sys\n\n1 / 0\n")
    (files / "ending.py").write_text("import sys\nsys.exit('no key')\n")
    (files / "broken.py").write_text("def f(:\n")
    path = files / "raising.py"
    refused("raising.py", f"raising.py: ZeroDivisionError while it was imported ({path}, line 3): division by zero")
    refused("ending.py", f"ending.py: SystemExit while it was imported ({files / 'ending.py'}, line 2): no key")
    refused("broken.py", "broken.py: SyntaxError while it was imported: invalid syntax (broken.py, line 1)")

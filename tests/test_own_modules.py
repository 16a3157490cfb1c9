"""Components whose weights are modules of the user's own: trained, saved, and loaded again by every way there is."""

import importlib
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from sysdag import PlanError, SerializationError, SysDPOConfig, SysDPOTrainer, System
from sysdag.cli import app

MODULE = '''
import copy

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sysdag import Input, System, node
from sysdag.components import Categorical
from sysdag.components.discrete.values import Discrete

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner, self.head = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, features):
        return self.head(self.inner(features).tanh())

class Lookup(Discrete):
    """A component of the user's own, which is not told how to build its net from a folder."""

    def __init__(self, net):
        self.values, self.net = ("p", "q"), net

    @property
    def module(self):
        return self.net

    def logits(self, inputs):
        return self.net(torch.tensor(inputs, dtype=torch.float32))

    def reference(self):
        frozen = copy.copy(self)
        frozen.net = copy.deepcopy(self.net).requires_grad_(False)
        return frozen

    def save_pretrained(self, folder):
        save_file(self.net.state_dict(), folder / "net.safetensors")
        return {}

    def load_weights(self, folder):
        self.net.load_state_dict(load_file(folder / "net.safetensors"))

def features(text):
    return [float(len(text)), float(text.count("a")), 1.0]

question = Input("question", str)

@node(Categorical(["code", "chat"], Net()))
def route(question):
    return features(question)

@node(Lookup(Net()))
def answer(question, route):
    return features(question + route)

system = System(question >> route, (question & route) >> answer)
'''
JUDGE = "def score(run):\n    return float(run['answer'] == 'p')\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "own_nets.py").write_text(MODULE)
    (tmp_path / "own_judge.py").write_text(JUDGE)
    (tmp_path / "inputs.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in ["a", "bb", "aaa"]))
    yield tmp_path
    for name in ("own_nets", "own_judge"):
        sys.modules.pop(name, None)


def imported():
    """The module as a new process would see it: its nets have other weights than those of any other import."""
    sys.modules.pop("own_nets", None)
    importlib.invalidate_caches()
    with pytest.MonkeyPatch.context() as patch:  # what was compiled is told apart by seconds and length alone
        patch.setattr(sys, "dont_write_bytecode", True)
        import own_nets

    return own_nets


def trained(folder):
    """A system, trained and saved, and the weights it was saved with."""
    system = imported().system
    row = {"question": "ab", "chosen": "p", "rejected": "q", "chosen_intermediates": {"route": "code"},
           "rejected_intermediates": {"route": "chat"}}  # fmt: skip
    args = SysDPOConfig(
        output_dir=str(folder), max_steps=2, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = SysDPOTrainer(system, args, train_dataset=[row])
    trainer.train()
    trainer.save_model()
    return weights_of(system)


def weights_of(system):
    return {
        f"{n.name}.{name}": tensor.detach().clone()
        for n in system.nodes
        for name, tensor in n.component.module.state_dict().items()
    }


def assert_same(system, expected):
    found = weights_of(system)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_it_is_loaded_by_the_modules_that_declare_it(place):
    expected = trained(place / "aligned")
    module = imported()
    with pytest.raises(AssertionError):  # the module's own nets start anew
        assert_same(module.system, expected)
    assert_same(System.from_pretrained("aligned"), expected)
    assert_same(module.system.load("aligned"), expected)
    with pytest.raises(AssertionError):  # nor does loading change them
        assert_same(module.system, expected)


def test_commands_run_it(place):
    trained(place / "aligned")
    for arguments in (
        ["sample", "aligned", "inputs.jsonl", "--output", "traces.jsonl"],
        ["eval", "aligned", "inputs.jsonl", "--against", "own_nets.py:system", "--by", "own_judge.py:score"],
    ):
        imported()
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert len((place / "traces.jsonl").read_text().splitlines()) == 3


def test_a_declaration_that_is_missing_or_other_is_named(place):
    trained(place / "aligned")
    source = (place / "own_nets.py").read_text()
    for changed, message in (
        (source.replace('@node(Categorical(["code", "chat"], Net()))', "@node"),
         "Component 'route'.*declares no Categorical.*system.load"),
        (source.replace('["code", "chat"]', '["chat", "code"]'), "Component 'route'.*other options"),
        (source.replace("width=4", "width=5"), "Component '(route|answer)'.*cannot take the saved weights"),
        (source.replace("@node(Lookup(Net()))", "@node(Categorical(['p', 'q'], Net()))"),
         "Component 'answer'.*declares no Lookup"),
    ):  # fmt: skip
        assert changed != source
        (place / "own_nets.py").write_text(changed)
        imported()
        with pytest.raises(SerializationError, match=message):
            System.from_pretrained("aligned")


def test_no_module_of_the_folders_choosing_is_taken(place):
    """A node function of another module does not lend its neighbours' components."""
    trained(place / "aligned")
    file = place / "aligned" / "system.json"
    data = json.loads(file.read_text())
    data["components"]["route"]["class"] = "os:system"
    file.write_text(json.dumps(data))
    with pytest.raises(SerializationError, match="no subclass of sysdag.Component"):
        System.from_pretrained("aligned")


def test_what_was_given_as_an_object_has_no_untrained_self(place):
    with pytest.raises(PlanError, match="Node 'answer': .*given as an object.*with_components"):
        imported().system.fresh()

"""Candidate strategies of one's own: one public method, named in a configuration by import path."""

import sys
from dataclasses import dataclass

import pytest

from sysdag import Input, PlanError, System, node
from sysdag.components import Tabular
from sysdag.objectives import Candidates, CandidateStrategy, MonteCarlo
from sysdag.objectives.strategy_options import strategy_from, strategy_options

X = Input("x")


@node(Tabular({"a": {"p": 0.6, "q": 0.4}, "b": {"p": 0.5, "q": 0.5}}))
def latent(x):
    return x


@node(Tabular({"p": {"yes": 1.0, "no": 0.0}, "q": {"yes": 0.5, "no": 0.5}}))
def output(latent):
    return latent


PLAN = System(X >> latent >> output).compile()
CODE = '''
from dataclasses import dataclass
from sysdag.objectives import Candidates, CandidateStrategy

@dataclass(frozen=True, kw_only=True)
class First(CandidateStrategy):
    """The first k values, in their order."""

    start: int = 0
    label: str = "none"

    def paths(self, plan, rows, latents, generator):
        prompt = [row for row in range(len(rows)) for _ in range(self.num_candidates)]
        cells = {}
        for name in latents:
            component = plan.system[name].component
            values = component.values[self.start : self.start + self.num_candidates]
            cells[name] = component.observe([value for _ in range(len(rows)) for value in values])
        return Candidates(rows.select(prompt).updated(cells), tuple(prompt))

class Empty(CandidateStrategy):
    pass

def function():
    pass
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_strategy.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own_strategy.py"
    sys.modules.pop("own_strategy", None)


@pytest.mark.parametrize("place", ["own_strategy", "FILE"])
def test_a_strategy_by_its_import_path(module, place):
    path = f"{module if place == 'FILE' else place}:First"
    strategy = strategy_from({"strategy": path, "num_candidates": 2, "label": "mine"})
    drawn = strategy.draw(PLAN, {"x": ["a", "b"]})
    assert drawn.prompt == (0, 0, 1, 1)
    assert drawn.trace["latent"] == ["p", "q", "p", "q"]
    saved = {"strategy": "own_strategy:First", "num_candidates": 2, "start": 0, "label": "mine"}
    assert strategy_options(strategy) == saved
    assert strategy_from(saved) == strategy
    assert strategy_from(strategy_options(MonteCarlo())) == MonteCarlo()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("own_strategy:Nothing", "candidates: own_strategy has no 'Nothing'; its functions are .*First"),
        ("own_strategy:function", "own_strategy:function is no subclass of sysdag.objectives.CandidateStrategy"),
        ("own_strategy:Empty", r"own_strategy:Empty does not implement \['paths'\]"),
        ("no_such_module:First", "no_such_module"),
        ("beem", "unknown strategy 'beem'.*or a class of yours as package.module:Class"),
        ({"strategy": "own_strategy:First", "start": "1"}, "start of own_strategy:First must be an integer, got '1'"),
        ({"strategy": "own_strategy:First", "label": 1}, "label of own_strategy:First must be a str, got 1"),
        ({"strategy": "own_strategy:First", "labell": "x"}, r"no option 'labell' \(did you mean 'label'\?\)"),
    ],
)
def test_what_names_no_strategy_is_refused(module, options, message):
    with pytest.raises(PlanError, match=message):
        strategy_from(options)


@dataclass(frozen=True, kw_only=True)
class Returns(CandidateStrategy):
    """What a careless strategy might return, by name."""

    what: str

    def paths(self, plan, rows, latents, generator):
        prompt = (0, 0, 1, 1)
        drawn = rows.select(prompt).updated({"latent": plan.system["latent"].component.observe(["p", "q"] * 2)})
        return {
            "a list": list(prompt),
            "no latent": Candidates(rows.select(prompt), prompt),
            "too few": Candidates(drawn, prompt[:3]),
            "unordered": Candidates(drawn, (0, 1, 0, 1)),
            "one without": Candidates(drawn, (0, 0, 0, 0)),
            "one too many": Candidates(drawn, (0, 0, 1, 2)),
        }[self.what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a list", "Returns.paths must return Candidates, got list"),
        ("no latent", r"returned no cells of the latents \['latent'\]"),
        ("too few", "one prompt for each of its 4 rows, ascending; got 3"),
        ("unordered", "got 4 in another order"),
        ("one without", "prompts 0 to 1; prompt 1 has none"),
        ("one too many", "prompts 0 to 1; prompt 2 is none of them"),
    ],
)
def test_what_a_strategy_returns_is_checked(what, message):
    with pytest.raises(PlanError, match=message):
        Returns(what=what).draw(PLAN, {"x": ["a", "b"]})


def test_options_without_a_default_are_asked_for():
    with pytest.raises(PlanError, match=r"needs the options \['what'\], which have no default"):
        strategy_from(f"{__name__}:Returns")

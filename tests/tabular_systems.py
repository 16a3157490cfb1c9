"""Random systems of tables and classifiers, and an enumeration of their joint that shares no code with sysdag."""

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from sysdag.components import Categorical, Tabular
from sysdag.graph.system import System
from sysdag.graph.variables import Input, Node, node

VALUES = "uvwyz"


@dataclass(frozen=True, eq=False)
class Variable:
    """One node: a table from the tuple of its parents' values to probabilities, or a list made of one parent's value.

    `lists` maps the parent's value to a list of keys; a node whose only parent is such a list runs once an element.
    """

    name: str
    parents: tuple[str, ...]
    table: Mapping[tuple, Mapping[str, float]] | None = None
    lists: Mapping[str, tuple[str, ...]] | None = None
    each: bool = False


@dataclass(frozen=True, eq=False)
class TabularSystem:
    variables: tuple[Variable, ...]
    linear: frozenset[str] = frozenset()

    def outcomes(self, x: str) -> Iterator[tuple[dict[str, object], float]]:
        """Every outcome of the random variables with its probability, by nested enumeration."""

        def extend(values: dict[str, object], probability: float, rest: tuple[Variable, ...]):
            if not rest:
                yield {name: value for name, value in values.items() if name in self.random}, probability
                return
            variable = rest[0]
            if variable.lists is not None:
                yield from extend(
                    {**values, variable.name: list(variable.lists[values[variable.parents[0]]])}, probability, rest[1:]
                )
            elif variable.each:
                rows = [variable.table[(element,)] for element in values[variable.parents[0]]]
                for drawn in itertools.product(*rows):
                    p = math.prod(row[value] for row, value in zip(rows, drawn, strict=True))
                    yield from extend({**values, variable.name: list(drawn)}, probability * p, rest[1:])
            else:
                for value, p in variable.table[tuple(values[parent] for parent in variable.parents)].items():
                    yield from extend({**values, variable.name: value}, probability * p, rest[1:])

        return extend({"x": x}, 1.0, self.variables)

    @property
    def random(self) -> list[str]:
        return [variable.name for variable in self.variables if variable.table is not None]

    def system(self, outputs: list[str] | None = None) -> System:
        made: dict[str, Input | Node] = {"x": Input("x")}
        parts = []
        for variable in self.variables:
            made[variable.name] = self._node(variable)
            parts.append(made[variable.name])
            for parent in variable.parents:
                source = made[parent].each() if variable.each else made[parent]
                parts.append(source >> made[variable.name])
        return System(*parts, outputs=outputs)

    def _node(self, variable: Variable) -> Node:
        def key(**values):
            if variable.lists is not None:
                return list(variable.lists[values[variable.parents[0]]])
            row = tuple(values[parent] for parent in variable.parents)
            return one_hot[row] if variable.name in self.linear else row

        if variable.table is not None:
            keys = list(variable.table)
            one_hot = {row: [float(i == j) for j in range(len(keys))] for i, row in enumerate(keys)}
        key.__signature__ = inspect.Signature(
            [inspect.Parameter(parent, inspect.Parameter.KEYWORD_ONLY) for parent in variable.parents]
        )
        if variable.table is None:
            return node(name=variable.name)(key)
        if variable.name not in self.linear:
            return node(Tabular(variable.table), name=variable.name)(key)
        classifier = torch.nn.Linear(len(keys), len(variable.table[keys[0]]), bias=False, dtype=torch.float64)
        with torch.no_grad():
            classifier.weight.copy_(
                torch.tensor([list(variable.table[k].values()) for k in keys], dtype=torch.float64).log().T
            )
        return node(Categorical(list(variable.table[keys[0]]), classifier), name=variable.name)(key)


@st.composite
def probabilities(draw: st.DrawFn, values: str) -> dict[str, float]:
    weights = [draw(st.floats(0.05, 1.0)) for _ in values]
    return {value: weight / math.fsum(weights) for value, weight in zip(values, weights, strict=True)}


@st.composite
def tabular_systems(draw: st.DrawFn, max_nodes: int = 5, plates: bool = True) -> TabularSystem:
    """Chains, forks, joins and skips of up to `max_nodes` nodes and 3 values (5 in the smallest), some with plates."""
    count = draw(st.integers(1, max_nodes))
    most_values = 5 if count <= 2 else 3
    variables: list[Variable] = []
    ranges: dict[str, str] = {"x": "ab"}
    linear = set()
    for number in range(count):
        name = f"n{number}"
        values = VALUES[: draw(st.integers(2, most_values))]
        parents = tuple(draw(st.lists(st.sampled_from(sorted(ranges)), unique=True, min_size=1, max_size=2)))
        if plates and draw(st.integers(0, 4)) == 0:
            lengths = st.lists(st.sampled_from("cd"), max_size=2).map(tuple)
            variables.append(
                Variable(f"list{number}", parents[:1], lists={v: draw(lengths) for v in ranges[parents[0]]})
            )
            table = {(element,): draw(probabilities(values)) for element in "cd"}
            variables.append(Variable(name, (f"list{number}",), table, each=True))
            continue
        rows = itertools.product(*(ranges[parent] for parent in parents))
        variables.append(Variable(name, parents, {row: draw(probabilities(values)) for row in rows}))
        ranges[name] = values
        if draw(st.booleans()):
            linear.add(name)
    return TabularSystem(tuple(variables), frozenset(linear))

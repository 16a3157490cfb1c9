"""Small systems with switches, and their joints by hand; at the top level of a module, as processes of their own need
them."""

import itertools

from sysdag import Input, System, node, switch
from sysdag.components import Tabular

ROUTES = {"a": {"math": 0.7, "code": 0.3}, "b": {"math": 0.2, "code": 0.8}}
SOLUTIONS = {"a": {"u": 0.6, "v": 0.4}, "b": {"u": 0.1, "v": 0.9}}
OUTLINES = {"a": {"o": 0.25, "p": 0.75}, "b": {"o": 0.5, "p": 0.5}}
CODES = {("a", "o"): {"u": 0.3, "v": 0.7}, ("a", "p"): {"u": 0.9, "v": 0.1}, ("b", "o"): {"u": 0.45, "v": 0.55}}
CODES[("b", "p")] = {"u": 0.05, "v": 0.95}
REPORTS = {
    ("a", "u"): {"s": 0.2, "t": 0.8}, ("a", "v"): {"s": 0.55, "t": 0.45}, ("b", "u"): {"s": 0.35, "t": 0.65},
    ("b", "v"): {"s": 0.7, "t": 0.3},
}  # fmt: skip


def outcomes(x: str):
    """Every run of `routed` for an input, with its probability: values by node, those that do not run left out."""
    for route, p in ROUTES[x].items():
        if route == "math":
            for solution, q in SOLUTIONS[x].items():
                yield {"route": route, "solve": solution, "solution": solution}, p * q
        else:
            for (outline, q), z in itertools.product(OUTLINES[x].items(), "uv"):
                yield {"route": route, "outline": outline, "write": z, "solution": z}, p * q * CODES[x, outline][z]


def reported_outcomes(x: str):
    """Every run of `reported`, likewise."""
    for values, p in outcomes(x):
        for report, q in REPORTS[x, values["solution"]].items():
            yield {**values, "report": report}, p * q


class Counting(Tabular):
    """Counts the inputs that it draws for or scores."""

    calls = 0

    def sample(self, inputs, *, generator=None):
        self.calls += len(inputs)
        return super().sample(inputs, generator=generator)

    def log_prob(self, inputs, draws):
        self.calls += len(inputs)
        return super().log_prob(inputs, draws)


def build(*, behind: bool = False) -> System:
    """x -> route; math: solve; code: outline -> write; and, if asked for, a report behind."""
    x = Input("x", str)
    route = node(Tabular(ROUTES), name="route")(same)
    solve = node(Counting(SOLUTIONS), name="solve")(same)
    outline = node(Counting(OUTLINES), name="outline")(same)
    write = node(Counting(CODES), name="write")(both)
    solution = switch(route, {"math": solve, "code": outline >> write}, name="solution")
    arrows = [x >> [route, solve, outline, write]]
    if not behind:
        return System(*arrows, solution)
    report = node(Tabular(REPORTS), name="report")(of_solution)
    return System(*arrows, (x & solution) >> report)


def same(x):
    return x


def both(x, outline):
    return x, outline


def of_solution(x, solution):
    return x, solution

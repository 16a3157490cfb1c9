"""A plan: what a system's graph implies for running and training it. No torch here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sysdag.errors import PlanError
from sysdag.graph import render
from sysdag.graph.variables import Edge, Node, natural_key

if TYPE_CHECKING:
    import networkx

    from sysdag.graph.switches import Branching
    from sysdag.graph.system import System
    from sysdag.traces.trace import Trace

Objective = Literal["direct", "sampling"]


@dataclass(frozen=True, repr=False)
class Plan:
    """The order and the bookkeeping of one system.

    Attributes:
        system: the system.
        levels: names of nodes by level: those of one level depend on earlier levels only, and can run side by side.
        branches: maximal chains of nodes; inside one, each node is the only child of the one before and has no other
            node as parent. Two branches of which neither descends from the other run independently.
        lifetimes: for each input and node, the level that produces its value (-1 for inputs) and the last level that
            reads it; outputs live to the last level. A switch and the begins of its branches read its router.
        components: the names of the nodes that each distinct component serves.
    """

    system: System
    levels: tuple[tuple[str, ...], ...]
    branches: tuple[tuple[str, ...], ...]
    lifetimes: tuple[tuple[str, int, int], ...]
    components: tuple[tuple[str, ...], ...]

    @property
    def order(self) -> tuple[str, ...]:
        """Node names in topological order."""
        return tuple(name for level in self.levels for name in level)

    @property
    def random_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that have a component, in topological order: the factors of the joint."""
        return tuple(name for name in self.order if self.system[name].is_random)

    def parents(self, name: str) -> tuple[Edge, ...]:
        """The arrows into a node, those of switches among them."""
        return tuple(edge for edge in self.system.edges if edge.child == name)

    def arguments(self, name: str) -> tuple[Edge, ...]:
        """The arrows that a node's function is called with the values of."""
        return tuple(edge for edge in self.parents(name) if edge.parameter)

    def switch(self, name: str) -> Branching | None:
        """The switch whose value the node has; None for any other node."""
        return next((made for made in self.system.switches if made.name == name), None)

    def switches_over(self, name: str) -> tuple[tuple[Branching, frozenset[int]], ...]:
        """What decides whether a node runs: each switch with the places of its cases in which it does; all must agree.

        None for a node that always runs.
        """
        return tuple((made, places) for made in self.system.switches if (places := made.places(name)))

    @property
    def results(self) -> tuple[str, ...]:
        """The nodes whose values are the outputs: of a switch the last ones of its branches, in topological order."""
        found = {end for output in self.system.outputs for end in self.ends_of(output)}
        return tuple(name for name in self.order if name in found)

    def ends_of(self, name: str) -> tuple[str, ...]:
        """The nodes whose value a node may have: of a switch the last ones of its branches, else itself."""
        made = self.switch(name)
        if made is None:
            return (name,)
        return tuple(dict.fromkeys(end for case in made.cases for end in self.ends_of(case.end)))

    def is_plate(self, name: str) -> bool:
        """Whether the node runs once for every element of a list."""
        return any(edge.each for edge in self.parents(name))

    def ancestors(self, name: str) -> frozenset[str]:
        """Names of every input and node that the node depends on."""
        found: set[str] = set()
        frontier = [name]
        while frontier:
            for edge in self.parents(frontier.pop()):
                if edge.parent not in found:
                    found.add(edge.parent)
                    frontier.append(edge.parent)
        return frozenset(found)

    def latents(self, objective: Objective) -> tuple[str, ...]:
        """Random nodes whose values the objective does not observe and has to draw: none for Direct; for Sampling those
        that an output depends on and that are no output. (What no output depends on integrates to one.)"""
        self._known(objective)
        if objective == "direct":
            return ()
        needed = frozenset().union(*(self.ancestors(output) for output in self.system.outputs))
        return tuple(name for name in self.random_nodes if name in needed and name not in self.results)

    def observed(self, objective: Objective) -> tuple[str, ...]:
        """Random nodes whose values the preference data must hold: all for Direct, the outputs for Sampling.

        Of a switch the nodes whose value is its own; in one run those of the branch that it takes.
        """
        self._known(objective)
        return tuple(name for name in self.random_nodes if objective == "direct" or name in self.results)

    def varying(self, objective: Objective) -> frozenset[str]:
        """Names of the nodes whose values differ between the candidates of one run.

        These are the latents, and the deterministic nodes below one. A latent without a likelihood cannot be one of
        several candidates: where nothing above it varies, all candidates share a single draw, and its factor cancels
        against the reference. Outputs are observed, hence never vary, and neither does what is reached through them.
        """
        latents = self.latents(objective)
        found: set[str] = set()
        for name in self.order:
            if self.system[name].is_random:
                varies = name in latents and (self.system[name].likelihood != "none" or self._below(name, found))
            else:
                varies = self._below(name, found) and not (name in self.system.outputs and self.switch(name))
            if varies:
                found.add(name)
        return frozenset(found)

    def factors(self, objective: Objective) -> tuple[str, ...]:
        """Random nodes whose likelihood enters the objective; a factor without a likelihood cancels against the
        reference (it is not trained), so it is left out."""
        self.check(objective)
        enters = {*self.latents(objective), *self.observed(objective)}
        return tuple(name for name in self.random_nodes if name in enters and self.system[name].likelihood != "none")

    def check(self, objective: Objective) -> None:
        """Whether every component's likelihood can serve the objective.

        Direct compares each factor with its own reference, so a factor without a likelihood cancels and one with a
        bound enters with its per-draw estimate. Sampling sums over candidates *inside* a logarithm: every factor that
        differs between candidates must be exact. A factor differs if its node or a parent of it varies (`varying`);
        the others leave the sum, where a bound is as good as in Direct and a missing likelihood cancels. Winner and
        loser share their candidates, so no latent may depend on an output, whose value they do not share.

        Raises:
            PlanError: naming the node, its likelihood and the reason.
        """
        self._known(objective)
        if not any(self.system[name].likelihood in ("exact", "bound") for name in self.random_nodes):
            raise PlanError("No node of the system has a likelihood; there is nothing to align.")
        if objective == "direct":
            return
        for name in self.results:
            if not self.system[name].is_random:
                branch = "" if name in self.system.outputs else "as a branch's last node, "
                raise PlanError(
                    f"objective='sampling' scores the outputs, but {name!r} is deterministic and has no likelihood. "
                    + (
                        f"It is one {branch}use objective='direct'."
                        if branch
                        else "Name the random node it is computed from: System(..., outputs=[...])."
                    )
                )
        self._check_results()
        latents, varying = self.latents(objective), self.varying(objective)
        for name in (*latents, *self.observed(objective)):
            self._check_factor(name, name in latents, self._below(name, varying))
        if not any(self.system[name].likelihood == "exact" for name in latents):
            raise PlanError(
                f"objective='sampling' needs an unobserved random node with an exact likelihood, and the system has "
                f"none above its outputs {list(self.system.outputs)}; use objective='direct'."
            )

    def _check_results(self) -> None:
        """Refuses the last node of a branch that another branch, or the router, has for an unobserved value."""
        for made in self.system.switches:
            ends = {case.end for case in made.cases} & {*self.results}
            for name in sorted(ends, key=natural_key):
                runs = made.places(name) or frozenset(range(len(made.cases)))
                if runs != {place for place, case in enumerate(made.cases) if case.end == name}:
                    raise PlanError(
                        f"Node {name!r} is the value of one branch of the switch {made.name!r}, and runs where another "
                        "is taken, so with objective='sampling' it would be observed in some candidates and drawn in "
                        "others. Give the branches nodes of their own (they may share a component), or use "
                        "objective='direct'."
                    )

    def _check_factor(self, name: str, latent: bool, below: bool) -> None:
        kind, component = self.system[name].likelihood, self.system[name].component
        above = sorted(self.ancestors(name) & {*self.system.outputs, *self.results}, key=natural_key)
        if latent and above:
            raise PlanError(
                f"Node {name!r} is not observed and depends on the output {above[0]!r}, whose value differs between "
                f"winner and loser, while objective='sampling' gives both the same candidates. Add {name!r} to the "
                "outputs, or use objective='direct'."
            )
        if kind == "none" and below:
            raise PlanError(
                f"Node {name!r} ({component!r}) has no likelihood (`none`), but objective='sampling' needs it: a "
                "parent differs between candidates, so its factor does too and does not cancel. Use "
                "objective='direct', or a deterministic @node if it always gives the same value for the same parents."
            )
        if kind == "bound" and (latent or below):
            raise PlanError(
                f"Node {name!r} ({component!r}) has only a per-timestep bound (`bound`), which must not be summed over "
                "candidates as objective='sampling' would. Use objective='direct'."
            )

    def _below(self, name: str, names: Collection[str]) -> bool:
        return any(edge.parent in names for edge in self.parents(name))

    @staticmethod
    def _known(objective: str) -> None:
        if objective not in ("direct", "sampling"):
            raise PlanError(f"objective must be 'direct' or 'sampling', got {objective!r}.")

    @property
    def models(self) -> tuple[tuple[str, ...], ...]:
        """Random nodes by the model that they run: as `components`, those with adapters on one base together."""
        found: dict[Any, list[str]] = {}
        for names in self.components:
            component = self.system[names[0]].component
            key = getattr(component, "base_key", None)
            found.setdefault(("component", id(component)) if key is None else ("base", key), []).extend(names)
        return tuple(map(tuple, found.values()))

    def sample(self, inputs: Mapping[str, Sequence[Any]], *, seed: int | None = None) -> Trace:
        """Runs the system; see `sysdag.execution.execute.sample`."""
        from sysdag.execution.execute import sample

        return sample(self, inputs, seed=seed)

    def log_probs(self, trace: Trace):
        """Log-likelihood of a trace by node; see `sysdag.execution.likelihood.log_probs`."""
        from sysdag.execution.likelihood import log_probs

        return log_probs(self, trace)

    def estimate(self, lengths: Mapping[str, Sequence[int]], **options: Any) -> Any:
        """Memory that a training needs, without loading weights; see `sysdag.engine.memory_estimate.estimate`."""
        from sysdag.engine.memory_estimate import estimate

        return estimate(self, lengths, **options)

    def to_networkx(self) -> networkx.DiGraph:
        """The graph as a `networkx.DiGraph`; nodes carry `kind`, edges `parameter` and `each`."""
        return render.to_networkx(self)

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart."""
        return render.to_mermaid(self)

    def to_dot(self) -> str:
        """The graph in Graphviz's DOT language."""
        return render.to_dot(self)

    def __str__(self) -> str:
        return render.to_table(self)

    def __repr__(self) -> str:
        return f"Plan({' | '.join(', '.join(level) for level in self.levels)})"


def compile_system(system: System) -> Plan:
    """The plan of a system: the same whatever the order in which its arrows were declared."""
    import networkx

    names = {n.name for n in system.nodes}
    graph = networkx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from((edge.parent, edge.child) for edge in system.edges if edge.parent in names)
    levels = tuple(tuple(sorted(generation, key=natural_key)) for generation in networkx.topological_generations(graph))
    level_of = {given.name: -1 for given in system.inputs}
    level_of |= {name: depth for depth, level in enumerate(levels) for name in level}
    last = len(levels) - 1
    last_read = {name: at for name, at in level_of.items()}
    for edge in system.edges:
        last_read[edge.parent] = max(last_read[edge.parent], level_of[edge.child])
    for name in system.outputs:
        last_read[name] = last
    return Plan(
        system=system,
        levels=levels,
        branches=_branches(levels, graph),
        lifetimes=tuple((name, level_of[name], last_read[name]) for name in sorted(level_of, key=natural_key)),
        components=_components(levels, system),
    )


def _branches(levels: Sequence[Sequence[str]], graph: networkx.DiGraph) -> tuple[tuple[str, ...], ...]:
    chains: list[list[str]] = []
    chain_of: dict[str, list[str]] = {}
    for name in (name for level in levels for name in level):
        above = next(graph.predecessors(name)) if graph.in_degree(name) == 1 else None
        if above is not None and graph.out_degree(above) == 1:
            chain_of[name] = chain_of[above]
            chain_of[name].append(name)
        else:
            chain_of[name] = [name]
            chains.append(chain_of[name])
    return tuple(tuple(chain) for chain in chains)


def _components(levels: Sequence[Sequence[str]], system: System) -> tuple[tuple[str, ...], ...]:
    served: dict[int, list[str]] = defaultdict(list)
    for name in (name for level in levels for name in level):
        n: Node = system[name]
        if n.is_random:
            served[id(n.component)].append(name)
    return tuple(tuple(names) for names in served.values())

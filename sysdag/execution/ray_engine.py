"""Runs of a system on Ray: every model in a pool of actors, batches streaming through the nodes.

A model is an actor pool, a node is a stage. The stages are maps of one Ray Data pipeline in topological order, and a
batch is a block. A stage calls the node's function; for a random node it then hands what that returned to the pool of
the node's model, and waits. Ray Data's own actor pools belong to one stage each, so nodes that share a model (the
visits of a loop) would load it once a stage; here they queue at one pool. The stages themselves hold no weights and
reserve no CPU, so Ray may fuse them; as many batches are under way as there are actors, and one more, and while one
batch has its answer refined another's draft is drawn.

Randomness is that of `sysdag.execution.batches`, so neither the order nor the actor matters (see
`sysdag.execution.ray_pools`): the traces are those of the local engine. Nodes whose components put adapters of their
own on one base are models apart: each actor loads a base.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sysdag.components.input_reader import Argument, InputReader
from sysdag.errors import PlanError, RunError, SysdagError
from sysdag.execution.batches import Runs, with_node
from sysdag.execution.ray_pools import Packed, ask, dumps, loads, pack, pools
from sysdag.graph.plan import Plan
from sysdag.graph.system import System
from sysdag.graph.variables import LikelihoodKind, Node
from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace

_MOST_BLOCKS = 2000  # of a pipeline; Ray Data keeps some bookkeeping for each


@dataclass(frozen=True, kw_only=True)
class RayEngine:
    """Runs batches on the Ray that is running, or else on one that it starts and stops.

    Attributes:
        actors: for a node, how many actors hold its model; 1 by default. Nodes that share a model share its actors.
        gpus_per_actor: GPUs (or a part of one) that Ray reserves for each actor; without any, models run on the CPU.
        device: where an actor puts its model; `auto` is its GPU where it has one. None leaves it where it loads.

    Raises:
        PlanError: for numbers out of range.
    """

    actors: Mapping[str, int] = field(default_factory=dict)
    gpus_per_actor: float = 0
    device: str | None = "auto"

    def __post_init__(self) -> None:
        if self.gpus_per_actor < 0 or any(number < 1 for number in self.actors.values()):
            raise PlanError(
                f"actors must be 1 or more and gpus_per_actor 0 or more, got {dict(self.actors)} and "
                f"{self.gpus_per_actor}."
            )

    def pool_sizes(self, plan: Plan) -> list[int]:
        """The number of actors of each model, in the order of `plan.components`.

        Raises:
            PlanError: for a name that is no random node, or two numbers for nodes that share a model.
        """
        for name in self.actors:
            if name not in plan.random_nodes:
                raise PlanError(f"actors: {name!r} is none of the nodes with a model, {list(plan.random_nodes)}.")
        sizes = []
        for names in plan.components:
            given = {name: self.actors[name] for name in names if name in self.actors}
            if len(set(given.values())) > 1:
                raise PlanError(f"actors: {list(given)} share one model, so they have one number, got {given}.")
            sizes.append(next(iter(given.values()), 1))
        return sizes

    def traces(self, plan: Plan, runs: Runs, first: int) -> Iterator[Trace]:
        """See `sysdag.execution.batches.Engine`.

        Raises:
            PlanError: for more GPUs than Ray has, or a node that cannot be sent to another process.
            SysdagError: where ray is not installed.
        """
        sizes = self.pool_sizes(plan)
        if importlib.util.find_spec("ray") is None:
            raise SysdagError('engine="ray" needs Ray: pip install "sysdag[ray]".')
        if first >= runs.batches:
            return iter(())
        return self._traces(plan, runs, first, sizes)

    def _traces(self, plan: Plan, runs: Runs, first: int, sizes: list[int]) -> Iterator[Trace]:
        import ray
        import ray.data
        from ray.data import TaskPoolStrategy

        outline = _outline(plan)
        options: dict[str, Any] = {"gpus_per_actor": self.gpus_per_actor, "device": self.device}
        try:
            with _connected(), pools(plan, sizes, **options) as router, _quiet():
                items = [
                    {"number": number, "outcome": dumps(runs.batch(number))} for number in range(first, runs.batches)
                ]
                stages: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
                for name in plan.order:
                    given = {"outline": outline, "name": name, "seed": runs.seed, "router": router}
                    under_way = TaskPoolStrategy(size=min(sum(sizes) + 1, len(items)))
                    stages = stages.map(_stage, fn_kwargs=given, num_cpus=0, compute=under_way)  # type: ignore[arg-type]
                stages.context.execution_options.preserve_order = True
                for row in stages.iter_rows():
                    outcome = loads(row["outcome"])
                    if isinstance(outcome, SysdagError):
                        raise outcome
                    yield outcome
        except ray.exceptions.RayError as error:
            raise RunError(f"Ray could not go on ({type(error).__name__}): {error}") from error


@dataclass(frozen=True)
class _Pooled:
    """What stands for a component in a stage."""

    model: int
    likelihood: LikelihoodKind
    value_type: type | None
    reader: InputReader

    @property
    def row_options(self) -> tuple[str, ...]:
        return self.reader.row_options

    def with_row_options(self, input: Any, options: Mapping[str, Any]) -> Any:
        return self.reader.with_row_options(input, options)

    def tell_apart(self, input: Any, function: Callable[..., Any], arguments: Mapping[str, Argument]) -> Any:
        return self.reader.tell_apart(input, function, arguments)


def _outline(plan: Plan) -> Packed:
    """The plan without its components. Functions go by value where they cannot be imported by name."""
    model_of = {name: number for number, names in enumerate(plan.components) for name in names}
    of_model: dict[int, _Pooled] = {}  # nodes that share a component share what stands for it
    nodes = []
    for n in plan.system.nodes:
        pooled = None
        if n.is_random:
            number, component = model_of[n.name], n.component
            if number not in of_model:
                reader = component.input_reader()
                of_model[number] = _Pooled(number, component.likelihood, component.value_type, reader)
            pooled = of_model[number]
        nodes.append((pack(n.function, n.name, "function"), pooled, n.base_name, n.visit))
    system = plan.system
    parts = (system.inputs, nodes, system.edges, system.outputs, system.switches)
    return pack(parts, plan.order[0], "system")


@functools.lru_cache(maxsize=4)
def _plan(outline: Packed) -> Plan:
    inputs, nodes, edges, outputs, switches = outline.opened()
    made = [Node(function.opened(), component, base_name, visit) for function, component, base_name, visit in nodes]
    return System.from_parts(inputs, made, edges, outputs, switches).compile()


def _stage(row: dict[str, Any], *, outline: Packed, name: str, seed: int, router: Any) -> dict[str, Any]:
    """One node of one batch. An error goes down the pipeline as the batch's outcome, behind the batches before it."""
    outcome = loads(row["outcome"])
    if isinstance(outcome, SysdagError):
        return row
    plan = _plan(outline)

    def sampler(values: Sequence[Any], seeds: Sequence[int]) -> list[Draw]:
        return ask(router, plan.system[name].component.model, values, seeds, name)

    try:
        outcome = with_node(plan, outcome, name, sampler, seed)
    except SysdagError as error:
        error.add_note(f"In a task of Ray: {traceback.format_exc()}")
        outcome = error.with_traceback(None)
    return {"number": row["number"], "outcome": dumps(outcome)}


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Ray, as it runs already or started here; what was started is stopped."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


_before_quiet: list[tuple[int, bool]] = []  # of the first of the runs that are under way, and one for each other


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data tells errors alone, and draws no progress bars, which it may print on standard output; as before when
    the last of several runs that overlap has ended."""
    from ray.data import DataContext

    logger, context = logging.getLogger("ray.data"), DataContext.get_current()
    _before_quiet.append((logger.level, context.enable_progress_bars))
    logger.setLevel(logging.ERROR)
    context.enable_progress_bars = False
    try:
        yield
    finally:
        first = _before_quiet[0]
        _before_quiet.pop()
        if not _before_quiet:
            level, context.enable_progress_bars = first
            logger.setLevel(level)

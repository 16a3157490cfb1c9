"""Runs of a system on Ray: every model in a pool of actors, batches streaming through the nodes.

A model is an actor pool, a node is a stage. The stages are maps of one Ray Data pipeline in topological order, and a
batch is a block. A stage calls the node's function; for a random node it then hands what that returned to the pool of
the node's model, and waits. Ray Data's own actor pools belong to one stage each, so nodes that share a model (the
visits of a loop) would load it once a stage; here they queue at one pool. The stages themselves hold no weights and
reserve no CPU, so Ray may fuse them; as many batches are under way as there are actors, and one more, and while one
batch has its answer refined another's draft is drawn.

One `_Router` gives each request to an actor that is idle, so that pools of uneven requests stay busy; only references
pass through it, values go from stage to actor and back. Randomness is that of `sysdag.running`, so neither the order
nor the actor matters: the traces are those of the local engine. An actor that dies starts again, and its request is
made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sysdag.errors import PlanError, RunError, SysdagError
from sysdag.graph import LikelihoodKind, Node, System
from sysdag.plan import Plan
from sysdag.trace import Draw, Trace

if TYPE_CHECKING:
    from sysdag.component import Component
    from sysdag.running import Runs

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
        """See `sysdag.running.Engine`.

        Raises:
            PlanError: for more GPUs than Ray has, or a node that cannot be sent to another process.
            SysdagError: where ray is not installed.
        """
        sizes = self.pool_sizes(plan)
        if importlib.util.find_spec("ray") is None:
            raise SysdagError('engine="ray" needs Ray: pip install "sysdag[ray]".')
        if first >= runs.batches:
            return iter(())
        outline = _outline(plan)
        models = [_packed(plan.system[names[0]].component, names[0], "component") for names in plan.components]
        return self._traces(plan, runs, first, sizes, outline, models)

    def _traces(
        self, plan: Plan, runs: Runs, first: int, sizes: list[int], outline: _Packed, models: list[_Packed]
    ) -> Iterator[Trace]:
        import ray
        import ray.data
        from ray.data import TaskPoolStrategy

        try:
            with _connected(), self._pools(plan, sizes, models) as router, _quiet("ray.data"):
                items = [
                    {"number": number, "outcome": _dumps(runs.batch(number))} for number in range(first, runs.batches)
                ]
                stages: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
                for name in plan.order:
                    options = {"outline": outline, "name": name, "seed": runs.seed, "router": router}
                    under_way = TaskPoolStrategy(size=min(sum(sizes) + 1, len(items)))
                    stages = stages.map(_stage, fn_kwargs=options, num_cpus=0, compute=under_way)  # type: ignore[arg-type]
                stages.context.execution_options.preserve_order = True
                stages.context.enable_progress_bars = False
                for row in stages.iter_rows():
                    outcome = _loads(row["outcome"])
                    if isinstance(outcome, SysdagError):
                        raise outcome
                    yield outcome
        except ray.exceptions.RayError as error:
            raise RunError(f"Ray could not go on ({type(error).__name__}): {error}") from error

    @contextlib.contextmanager
    def _pools(self, plan: Plan, sizes: list[int], models: list[_Packed]) -> Iterator[Any]:
        """The router to the actors, which have loaded their models; all of them end with the context."""
        import ray
        import torch

        gpus, there = self.gpus_per_actor, ray.cluster_resources().get("GPU", 0)
        room = math.inf if not gpus else int(there) * int(1 / gpus) if gpus <= 1 else there // gpus
        if sum(sizes) > room:
            raise PlanError(
                f"{sum(sizes)} actors with {gpus:g} GPUs each do not fit: Ray has {there:g} GPUs. Start nodes, "
                "or lower gpus_per_actor or the numbers of actors."
            )
        worker: Any = ray.remote(_Worker).options(
            num_cpus=0, num_gpus=gpus, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=2
        )
        threads = torch.get_num_threads()
        pools = [[worker.remote(self.device, threads) for _ in range(size)] for size in sizes]
        actors: list[Any] = [actor for pool in pools for actor in pool]
        try:
            sent = [[ray.put(model)] for model in models]
            loads = []
            for names, pool, model in zip(plan.components, pools, sent, strict=True):
                loads += [actor.load.remote(names[0], model) for actor in pool]
            _answers(loads)
            actors.append(ray.remote(_Router).options(num_cpus=0).remote(pools, sent))
            yield actors[-1]
        finally:
            for actor in actors:
                ray.kill(actor)


class _Worker:
    """An actor that holds one model."""

    def __init__(self, device: str | None, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)  # as in the process that asks: sums of floats depend on it
        self._device = device
        self._component: Component | None = None

    def load(self, name: str, model: Sequence[Any]) -> None:
        """Gets the component, of which `model` holds a reference, and loads its weights."""
        import ray

        from sysdag.running import load

        component = ray.get(model[0]).opened()
        component.residence = None
        load(name, component, self._device)
        self._component = component

    def sample(
        self, model: Sequence[Any], values: Sequence[Any], seed: int, number: int, name: str
    ) -> tuple[None, list[Draw]]:
        """The draws of a node in a batch, after a None that says that they are there."""
        from sysdag.running import generator_of

        if self._component is None:  # it died and was started again
            self.load(name, model)
        assert self._component is not None
        return None, self._component.sample(values, generator=generator_of(seed, number, name))


class _Router:
    """Gives each request to an idle actor of its model.

    Args:
        pools: the actors of each model.
        models: for each model a list with the reference of its component.
    """

    def __init__(self, pools: Sequence[Sequence[Any]], models: Sequence[Sequence[Any]]) -> None:
        self._models = models
        self._idle: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in pools]
        for idle, pool in zip(self._idle, pools, strict=True):
            for actor in pool:
                idle.put_nowait(actor)

    async def sample(self, model: int, request: Sequence[Any]) -> list[Any]:
        """A reference to the draws, once they are there or have failed; `request` holds references, too."""
        actor = await self._idle[model].get()
        try:
            done, draws = actor.sample.options(num_returns=2).remote(self._models[model], *request)
            with contextlib.suppress(Exception):  # raised again where the draws are read
                await done
            return [draws]
        finally:
            self._idle[model].put_nowait(actor)


@dataclass(frozen=True)
class _Pooled:
    """What stands for a component in a stage."""

    model: int
    likelihood: LikelihoodKind
    value_type: type | None


@dataclass(frozen=True)
class _Packed:
    """A value for another process, with the folders in which its modules are found."""

    data: bytes
    path: tuple[str, ...]

    def opened(self) -> Any:
        sys.path += [folder for folder in self.path if folder not in sys.path]
        return _loads(self.data)


def _packed(value: Any, name: str, what: str) -> _Packed:
    try:
        data = _dumps(value)
    except Exception as error:  # whatever the user's object raises, its node has to be named
        raise PlanError(
            f"Node {name!r}: its {what} {value!r:.100} cannot be sent to Ray's actors ({type(error).__name__}: "
            f"{error}). What it holds must be picklable; open connections and files when they are used."
        ) from error
    return _Packed(data, tuple(os.path.abspath(folder) for folder in sys.path))


def _dumps(value: Any) -> bytes:
    from ray import cloudpickle

    return cloudpickle.dumps(value)


def _loads(data: bytes) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(data)


def _outline(plan: Plan) -> _Packed:
    """The plan without its components. Functions go by value where they cannot be imported by name."""
    model_of = {name: number for number, names in enumerate(plan.components) for name in names}
    nodes = []
    for n in plan.system.nodes:
        pooled = None
        if n.is_random:
            pooled = _Pooled(model_of[n.name], n.component.likelihood, getattr(n.component, "value_type", None))
        nodes.append((_packed(n.function, n.name, "function"), pooled, n.base_name, n.visit))
    system = plan.system
    return _packed((system.inputs, nodes, system.edges, system.outputs), plan.order[0], "system")


@functools.lru_cache(maxsize=4)
def _plan(outline: _Packed) -> Plan:
    inputs, nodes, edges, outputs = outline.opened()
    made = [Node(function.opened(), component, base_name, visit) for function, component, base_name, visit in nodes]
    return System.from_parts(inputs, made, edges, outputs).compile()


def _stage(row: dict[str, Any], *, outline: _Packed, name: str, seed: int, router: Any) -> dict[str, Any]:
    """One node of one batch. An error goes down the pipeline as the batch's outcome, behind the batches before it."""
    from sysdag.running import with_node

    outcome = _loads(row["outcome"])
    if isinstance(outcome, SysdagError):
        return row
    plan = _plan(outline)

    def sampler(values: Sequence[Any]) -> list[Draw]:
        import ray

        model = plan.system[name].component.model
        request = [ray.put(values), seed, row["number"], name]
        [[draws]] = _answers([router.sample.remote(model, request)])
        return _answers([draws])[0]

    try:
        outcome = with_node(plan, outcome, name, sampler)
    except SysdagError as error:
        error.add_note(f"In a task of Ray: {traceback.format_exc()}")
        outcome = error.with_traceback(None)
    return {"number": row["number"], "outcome": _dumps(outcome)}


def _answers(references: Sequence[Any]) -> list[Any]:
    """What the references stand for, or the error that a task raised, as it raised it."""
    import ray

    try:
        return ray.get(list(references))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


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


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger that tells errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

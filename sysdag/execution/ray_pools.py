"""Models as pools of actors on Ray, and what travels to them.

One `_Router` gives each request to an actor of its model that is idle, so that pools stay busy whatever the requests
take; only references pass through it, values go from whoever asks to the actor and back. An actor that dies starts
again, and its request is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sysdag.components import prompt_date
from sysdag.errors import PlanError
from sysdag.execution.batches import load
from sysdag.graph.plan import Plan
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from sysdag.components.component import Component


@contextlib.contextmanager
def pools(plan: Plan, sizes: Sequence[int], *, gpus_per_actor: float, device: str | None) -> Iterator[Any]:
    """The actors of a plan's models on the Ray that runs, for as long as the context lasts.

    Args:
        sizes: actors of each model, in the order of `plan.components`.
        gpus_per_actor, device: see `sysdag.execution.ray_engine.RayEngine`.

    Yields:
        The handle of the `_Router` to the actors, when all have loaded their models.

    Raises:
        PlanError: for more GPUs than Ray has, or a component that cannot be sent to another process.
        RunError: naming the node whose model cannot be loaded.
    """
    import ray
    import torch

    models = [pack(plan.system[names[0]].component, names[0], "component") for names in plan.components]
    gpus, there = gpus_per_actor, ray.cluster_resources().get("GPU", 0)
    room = math.inf if not gpus else int(there) * int(1 / gpus) if gpus <= 1 else there // gpus
    if sum(sizes) > room:
        raise PlanError(
            f"{sum(sizes)} actors with {gpus:g} GPUs each do not fit: Ray has {there:g} GPUs. Start nodes, "
            "or lower gpus_per_actor or the numbers of actors."
        )
    worker: Any = ray.remote(_Worker).options(
        num_cpus=0, num_gpus=gpus, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=2
    )
    threads, date = torch.get_num_threads(), prompt_date.moment().isoformat()
    handles = [[worker.remote(device, threads, date) for _ in range(size)] for size in sizes]
    actors: list[Any] = [actor for pool in handles for actor in pool]
    try:
        sent = [[ray.put(model)] for model in models]
        loads = []
        for names, pool, model in zip(plan.components, handles, sent, strict=True):
            loads += [actor.load.remote(names[0], model) for actor in pool]
        answers(loads)
        actors.append(ray.remote(_Router).options(num_cpus=0).remote(handles, sent))
        yield actors[-1]
    finally:
        for actor in actors:
            ray.kill(actor)


def ask(router: Any, model: int, values: Sequence[Any], seeds: Sequence[int], name: str) -> list[Draw]:
    """The draws of a node for values with these seeds, from an actor of its model; raises what the component raises."""
    import ray

    [[draws]] = answers([router.sample.remote(model, [ray.put(values), list(seeds), name])])
    return answers([draws])[0]


class _Worker:
    """An actor that holds one model."""

    def __init__(self, device: str | None, threads: int, date: str) -> None:
        prompt_date.settle(date)  # the driver's, also where an actor starts again
        import torch

        torch.set_num_threads(threads)  # as in the process that asks: sums of floats depend on it
        self._device = device
        self._component: Component | None = None

    def load(self, name: str, model: Sequence[Any]) -> None:
        """Gets the component, of which `model` holds a reference, and loads its weights."""
        import ray

        component = ray.get(model[0]).opened()
        component.residence = None
        load(name, component, self._device)
        self._component = component

    def sample(
        self, model: Sequence[Any], values: Sequence[Any], seeds: Sequence[int], name: str
    ) -> tuple[None, list[Draw]]:
        """The draws of a node in a batch, after a None that says that they are there."""
        if self._component is None:  # it died and was started again
            self.load(name, model)
        assert self._component is not None
        return None, self._component.sample(values, generator=self._component.generator_for(seeds))


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
class Packed:
    """A value for another process, with the folders in which its modules are found."""

    data: bytes
    path: tuple[str, ...]

    def opened(self) -> Any:
        sys.path += [folder for folder in self.path if folder not in sys.path]
        return loads(self.data)


def pack(value: Any, name: str, what: str) -> Packed:
    """Packs what a node has; functions and classes go by value where they cannot be imported by name.

    Raises:
        PlanError: naming the node, for what cannot be pickled.
    """
    try:
        data = dumps(value)
    except Exception as error:  # whatever the user's object raises, its node has to be named
        raise PlanError(
            f"Node {name!r}: its {what} {value!r:.100} cannot be sent to Ray's actors ({type(error).__name__}: "
            f"{error}). What it holds must be picklable; open connections and files when they are used."
        ) from error
    return Packed(data, tuple(os.path.abspath(folder) for folder in sys.path))


def dumps(value: Any) -> bytes:
    from ray import cloudpickle

    return cloudpickle.dumps(value)


def loads(data: bytes) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(data)


def answers(references: Sequence[Any]) -> list[Any]:
    """What the references stand for, or the error that a task raised, as it raised it."""
    import ray

    try:
        return ray.get(list(references))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None

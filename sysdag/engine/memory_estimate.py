"""What a training needs in memory, node by node, before any weight is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import networkx
import torch

from sysdag.components.component import Component
from sysdag.components.footprint import Footprint
from sysdag.engine.estimated_batch import Elements
from sysdag.engine.kept_work import room_for_gradients
from sysdag.errors import PlanError
from sysdag.graph.plan import Objective, Plan


@dataclass(frozen=True)
class Estimate:
    """Bytes, by the name of the node that a component belongs to (the first, where several share it).

    Attributes:
        footprints: of each component; see `Footprint`.
        graphs: what one step's graphs save for each component: of one micro-batch, or of all in one pass.
        waiting: gradients of single elements that wait for the second pass, all components' together.
        decoding: what drawing the candidates of each component's nodes takes at most, before a step's graphs are there.
        engine: `one_pass` or `two_pass`.
        offload_idle: whether frozen weights are on the device only while their model works.
        bases: the name under which a component's base is counted, where others work on the same one.
    """

    footprints: Mapping[str, Footprint]
    graphs: Mapping[str, int]
    engine: str
    waiting: int = 0
    decoding: Mapping[str, int] = field(default_factory=dict)
    offload_idle: bool = False
    bases: Mapping[str, str] = field(default_factory=dict)

    def weights(self, name: str) -> int:
        """Of one component, without a base that another one counts."""
        found = self.footprints[name]
        return found.weights - (found.base if self.bases.get(name, name) != name else 0)

    @property
    def resident(self) -> int:
        """Weights, references, gradients and the optimizer's state (AdamW).

        Of frozen weights and references those of one component, the largest, where idle ones are offloaded.
        """
        trained = sum(2 * f.trained + f.optimizer for f in self.footprints.values())
        if self.offload_idle:
            return trained + max(f.weights - f.trained + f.reference for f in self.footprints.values())
        return trained + sum(self.weights(name) - f.trained + f.reference for name, f in self.footprints.items())

    @property
    def step(self) -> int:
        """The peak of a step beside what is resident: of the largest micro-batch, or of all in one pass."""
        if self.engine == "one_pass":
            return sum(self.graphs.values()) + max(f.working for f in self.footprints.values())
        return self.waiting + max(graph + self.footprints[name].working for name, graph in self.graphs.items())

    @property
    def host_cache(self) -> int:
        """What may be kept on the host beside (see `Footprint.host_cache`); no part of the total."""
        return sum(each.host_cache for each in self.footprints.values())

    @property
    def total(self) -> int:
        return self.resident + max(self.step, *self.decoding.values(), 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: bytes of each component under its node's name, of what is resident, of a step, and in all."""
        return {
            "nodes": {
                name: {
                    "weights": self.weights(name),
                    "reference": f.reference,
                    "gradients": f.trained,
                    "optimizer": f.optimizer,
                    "graphs": self.graphs[name],
                    "head": f.working,
                    "decoding": self.decoding.get(name, 0),
                }
                for name, f in self.footprints.items()
            },
            "bases": dict(self.bases),
            "engine": self.engine,
            "waiting": self.waiting,
            "offload_idle": self.offload_idle,
            "resident": self.resident,
            "step": self.step,
            "host_cache": self.host_cache,
            "total": self.total,
        }

    def __str__(self) -> str:
        titles = (
            "node",
            "weights",
            "reference",
            "gradients",
            "optimizer",
            "graphs",
            "head",
            "decoding",
        )  # as in to_dict
        lines: list[tuple[str, ...]] = [titles]
        lines += [(name, *map(_shown, row.values())) for name, row in self.to_dict()["nodes"].items()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
        rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        passes = {"one_pass": "one pass", "two_pass": "two passes"}[self.engine]
        where = " (idle models on the host)" if self.offload_idle else ""
        held = f"resident {_shown(self.resident)}{where}, a step in {passes} {_shown(self.step)}"
        rows += [f"{name} is on the base of {other}" for name, other in self.bases.items() if other != name]
        kept = f"; on the host up to {_shown(self.host_cache)} of encoded prompts and images"
        cache = kept if self.host_cache else ""
        return "\n".join([*rows, f"{held}: {_shown(self.total)} in all{cache}"])


def estimate(
    plan: Plan,
    lengths: Mapping[str, Sequence[int]],
    *,
    objective: Objective = "direct",
    pairs: int = 1,
    unpaired: bool = False,
    num_candidates: int = 4,
    engine: Literal["one_pass", "two_pass"] = "two_pass",
    micro_batch_tokens: int = 8192,
    offload_idle: bool = False,
    frozen: Collection[str] = (),
    shares: Mapping[str, float] | None = None,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
    images: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> Estimate:
    """Memory of a training; configs are read, weights are not.

    Args:
        lengths: for each language model's node, tokens of a prompt and of a completion, and optionally how many of the
            prompt's are the same whatever the intermediates are (0 if left out). A diffusion model's node may be left
            out where it draws one image a run; for n images (`.each()`) it is (0, n times the positions of one).
            Of a choice, (tokens of the query and all options, 1), and those of the options as a third number where
            intermediates change the query alone, or where options have a tower of their own; a cross-encoder reads the
            query with each option.
        objective: `direct`, or `sampling` over `num_candidates` paths.
        pairs: preference pairs of a step, or unpaired runs.
        unpaired: whether they are single runs, as losses like `kto` take. What `kto` mismatches is scored in
            micro-batches without graphs, before the step's own, and takes no more than these.
        engine, micro_batch_tokens, offload_idle: see `sysdag.objectives.options.EngineOptions`.
        frozen: nodes that do not train.
        shares: for nodes in branches of a switch, which part of all runs (for Sampling, of all paths) takes them, from
            0 to 1. A node without one counts as if all runs took it; in one pass, where graphs of several nodes are
            there at once, each run then takes the branches that need most.
        gradient_checkpointing: whether activations are recomputed in the backward.
        bf16: whether models compute in bfloat16 by autocast, as with `SysDPOConfig(bf16=True)`.
        images: for each vision-language model's node, the sizes in pixels (width, height) of a prompt's images. Their
            tokens are among those of `lengths`; among the common ones where there are as many of these.
        device: whose kernels are assumed; by default a GPU where torch finds one. A GPU's can be told only there.

    Raises:
        PlanError: for a GPU where there is none, a node without lengths, a name that is no random node, or a component
            whose memory is not known.
    """
    shares, images = shares or {}, images or {}
    for option, names in (("lengths", lengths), ("frozen", frozen), ("shares", shares), ("images", images)):
        for name in names:
            if name not in plan.random_nodes:
                raise PlanError(
                    f"estimate: {option} names {name!r}; the system's random nodes are {list(plan.random_nodes)}."
                )
    for name, share in shares.items():
        if not 0 <= share <= 1 or (share < 1 and not plan.switches_over(name)):
            raise PlanError(
                f"estimate: shares[{name!r}] must be from 0 to 1, and 1 for a node that always runs, got {share!r}."
            )
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            "estimate: device='cuda', but torch finds no GPU here, and which kernels one runs is its own say."
        )
    if offload_idle and engine == "one_pass":
        raise PlanError("estimate: offload_idle=True needs engine='two_pass'.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    read = networkx.DiGraph((e.parent, e.child) for e in plan.system.edges if e.parameter or plan.switch(e.child))
    read.add_nodes_from(plan.order)
    footprints: dict[str, Footprint] = {}
    graphs: dict[str, int] = {}
    decoding: dict[str, int] = {}
    owner: dict[int, str] = {}
    alone: dict[str, int] = {}  # elements of a node that are scored alone
    held: dict[str, int] = {}  # what a node's graphs save
    for name in plan.factors(objective):
        component: Component | None = plan.system[name].component
        assert component is not None  # factors are random nodes
        prompt, completion, *rest = lengths.get(name) or (0, component.tokens_of_any_draw())
        if completion is None:
            raise PlanError(
                f"estimate: lengths has no entry for node {name!r}; give (prompt tokens, completion tokens)."
            )
        varies = any(ancestor in plan.random_nodes for ancestor in networkx.ancestors(read, name))
        is_latent = objective == "sampling" and name in plan.latents("sampling")
        paths = num_candidates if objective == "sampling" and (varies or is_latent) else 1
        sides = 1 if unpaired else 2
        sized = Elements(
            pairs=pairs, prompt=prompt, completion=completion, common=(rest[0] if rest else 0) if varies else prompt,
            options=rest[0] if rest else None,
            prompts=(paths if objective == "sampling" else sides) if varies else 0,
            completions=paths if is_latent else sides * paths, share=shares.get(name, 1.0),
        )  # fmt: skip
        batch = sized.batch(component, micro_batch_tokens, _images_of(name, component, prompt, images))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            found = component.footprint(
                tokens=batch.tokens, labels=batch.labels, trains=name not in frozen,
                checkpoints=gradient_checkpointing, device=device, **batch.more,
            )  # fmt: skip
        if found is None:
            raise PlanError(f"estimate: the memory of node {name!r} ({component!r}) is not known before it runs.")
        key = owner.setdefault(id(component), name)
        if batch.is_one_element:
            alone[name] = math.ceil(sized.share * pairs * sized.completions)
        if is_latent:
            rows = max(1, math.ceil(sized.share * pairs * paths))
            drawn = component.decoding_bytes(rows=rows, tokens=prompt + completion, device=device)
            decoding[key] = max(decoding.get(key, 0), drawn)
        held[name] = found.graph if engine == "two_pass" else found.graph * batch.whole // batch.tokens
        if key not in footprints or found.working > footprints[key].working:
            footprints[key] = found
    at_once = together(plan, held, shares)
    for name in held:
        key = owner[id(plan.system[name].component)]
        if engine == "two_pass":
            graphs[key] = max(graphs.get(key, 0), held[name])
        else:
            graphs[key] = graphs.get(key, 0) + (held[name] if name in at_once else 0)
    elements: dict[str, int] = {}
    for name in together(plan, alone, shares):
        key = owner[id(plan.system[name].component)]
        elements[key] = elements.get(key, 0) + alone[name]
    bases = {
        key: next(owner[id(plan.system[name].component)] for name in names if id(plan.system[name].component) in owner)
        for names in plan.models
        for key in dict.fromkeys(
            owner[id(plan.system[n].component)] for n in names if id(plan.system[n].component) in owner
        )
    }
    told = Estimate(footprints, graphs, engine, decoding=decoding, offload_idle=offload_idle, bases=bases)
    if engine == "one_pass":
        return told
    # Gradients that wait come before those that the resident bytes count.
    trained = sum(each.trained for each in footprints.values())
    wanted = sum(count * footprints[key].trained for key, count in elements.items())
    room = room_for_gradients(sum(told.weights(key) for key in footprints), trained)
    return replace(told, waiting=max(0, min(wanted, room) - trained))


def _images_of(
    name: str, component: Component, prompt: int, images: Mapping[str, Sequence[tuple[int, int]]]
) -> Sequence[tuple[int, int]]:
    """The sizes of the images of one prompt of a node.

    Raises:
        PlanError: for a node that takes images and has no sizes, or the other way round, or images without room.
    """
    takes = component.tokens_of_images(()) is not None
    if name not in images:
        if takes:
            raise PlanError(
                f"estimate: images has no entry for node {name!r} ({component!r}); give the sizes of a prompt's images "
                "in pixels, as [(width, height)], or [] for none."
            )
        return ()
    if not takes:
        raise PlanError(f"estimate: images names {name!r} ({component!r}), whose prompts hold none.")
    for size in images[name]:
        if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
            raise PlanError(
                f"estimate: images[{name!r}] must be sizes in pixels (width, height), whole numbers of 1 or more, got "
                f"{size!r}."
            )
    tokens = component.tokens_of_images(images[name])
    if tokens is not None and tokens > prompt:
        raise PlanError(
            f"estimate: a prompt of node {name!r} has {prompt} tokens by lengths, and its images alone take {tokens}; "
            "count those, too."
        )
    return images[name]


def together(plan: Plan, sizes: Mapping[str, int], stated: Collection[str]) -> set[str]:
    """The nodes of a step in which every run takes those branches whose nodes' sizes have the largest sum.

    Args:
        sizes: of each node.
        stated: nodes whose part of the runs is known; they count whatever the others take.
    """
    over = {name: dict.fromkeys(made.name for made, _ in plan.switches_over(name)) for name in sizes}
    places = {(made.name, name): at for name in sizes for made, at in plan.switches_over(name)}
    entangled = networkx.Graph()
    entangled.add_nodes_from(made.name for made in plan.system.switches)
    entangled.add_edges_from(itertools.chain.from_iterable(itertools.pairwise(switches) for switches in over.values()))
    found = {name for name in sizes if not over[name] or name in stated}
    for group in networkx.connected_components(entangled):
        names = [name for name in sizes if name not in found and group & over[name].keys()]
        ways = itertools.product(
            *([(s.name, at) for at in range(len(s.cases))] for s in plan.system.switches if s.name in group)
        )
        taken = ([n for n in names if all(at in places[s, n] for s, at in way if s in over[n])] for way in ways)
        found |= set(max(taken, key=lambda own: sum(sizes[name] for name in own)))
    return found


def _shown(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

"""`sysdag plan`: what a system's graph implies, and what its training needs in memory, before any weights load."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sysdag.commands.arguments import SystemArgument
from sysdag.commands.files import check_output
from sysdag.commands.given import refuse
from sysdag.errors import SysdagError

if TYPE_CHECKING:
    from sysdag.graph.plan import Plan

PICTURES = (".svg", ".png", ".pdf")
TEXTS = (".mmd", ".dot", ".json", ".txt")
_OF_THE_ESTIMATE = (
    "objective", "pairs", "unpaired", "candidates", "engine", "micro_batch_tokens", "offload_idle",
    "gradient_checkpointing", "frozen", "share", "images", "device",
)  # fmt: skip


class Objective(StrEnum):
    direct = "direct"
    sampling = "sampling"


class Engine(StrEnum):
    two_pass = "two_pass"
    one_pass = "one_pass"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


def plan(
    context: typer.Context,
    system: SystemArgument,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flowchart.")] = False,
    dot: Annotated[bool, typer.Option("--dot", help="Print Graphviz DOT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help=f"Write it to a file, too, by its ending: {' '.join(PICTURES + TEXTS)}.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Estimate the memory of a training, too.")] = False,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE=PROMPT,COMPLETION[,COMMON]",
            help="For --estimate, of each language model's node: tokens of a prompt and of a completion, and how many "
            "of the prompt's are the same whatever the intermediates are. Repeat it for each node.",
        ),
    ] = None,
    objective: Annotated[Objective, typer.Option(help="For --estimate.")] = Objective.direct,
    pairs: Annotated[int, typer.Option(min=1, help="For --estimate: preference pairs of a step.")] = 1,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="For --estimate: --pairs counts single runs with a label (as for KTO).")
    ] = False,
    candidates: Annotated[int, typer.Option(min=2, help="For --estimate with sampling: candidates of a latent.")] = 4,
    engine: Annotated[Engine, typer.Option(help="For --estimate: what keeps graphs.")] = Engine.two_pass,
    micro_batch_tokens: Annotated[
        int, typer.Option(min=1, help="For --estimate: most tokens of a micro-batch.")
    ] = 8192,
    offload_idle: Annotated[
        bool, typer.Option("--offload-idle", help="For --estimate: idle models' frozen weights are on the host.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="For --estimate: activations are recomputed.")
    ] = False,
    frozen: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="For --estimate: a node that does not train. Repeatable.")
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE=PART",
            help="For --estimate: the part of the runs, from 0 to 1, that takes a node's branch; by default all.",
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE=WIDTHxHEIGHT[,...]",
            help="For --estimate, of each vision-language model's node: the sizes in pixels of a prompt's images; "
            "NODE= for none. Their tokens are among those of --lengths. Repeat it for each node.",
        ),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="For --estimate: whose kernels; by default a GPU's where there is one.")
    ] = None,
) -> None:
    """Levels, branches and models of a system, which objectives can align it, and what a training needs in memory.

    No weights are read, so it serves for models that this machine could not hold. A system's lengths ask for the
    estimate by themselves.
    """
    wants_estimate = estimate or bool(lengths)
    _check(context, wants_estimate, output)
    if mermaid + dot + as_json > 1:
        raise typer.BadParameter("--mermaid, --dot and --json exclude each other; --output may name one more form.")
    tokens = dict(_length(given) for given in lengths or ())

    from sysdag.graph import outline
    from sysdag.saving.loading import load_system

    compiled = load_system(system).compile()
    found = None
    if wants_estimate:
        found = compiled.estimate(
            tokens, objective=objective.value, pairs=pairs, unpaired=unpaired, num_candidates=candidates,
            engine=engine.value, micro_batch_tokens=micro_batch_tokens, offload_idle=offload_idle, frozen=frozen or (),
            shares=dict(map(_share, share or ())), images=dict(map(_images, images or ())),
            gradient_checkpointing=gradient_checkpointing, device=None if device is None else device.value,
        )  # fmt: skip
    table = outline.to_text(compiled)
    if found is not None:
        table += f"\n\nmemory of a training, objective={objective.value}:\n{found}"
    data = outline.to_dict(compiled) | {"estimate": None if found is None else found.to_dict()}
    texts = {
        ".mmd": compiled.to_mermaid(),
        ".dot": compiled.to_dot(),
        ".json": json.dumps(data, indent=2),
        ".txt": table,
    }
    if output is not None:
        _write(compiled, output, texts)
    typer.echo(texts[".mmd" if mermaid else ".dot" if dot else ".json" if as_json else ".txt"])


def _check(context: typer.Context, wants_estimate: bool, output: Path | None) -> None:
    if not wants_estimate:
        refuse(context, _OF_THE_ESTIMATE, "belongs to the estimate: add --estimate or --lengths.")
    if output is not None and output.suffix not in PICTURES + TEXTS:
        raise typer.BadParameter(f"--output {output}: its ending must be one of {' '.join(PICTURES + TEXTS)}.")
    check_output("--output", output)
    if output is not None and output.suffix in PICTURES and importlib.util.find_spec("matplotlib") is None:
        raise SysdagError(f'--output {output}: a picture needs matplotlib: pip install "sysdag[report]".')


def _length(given: str) -> tuple[str, Sequence[int]]:
    name, _, numbers = given.rpartition("=")
    tokens = [int(part) for part in numbers.split(",") if part.strip().isdecimal()]
    if not name or len(tokens) != len(numbers.split(",")) or len(tokens) not in (2, 3):
        raise typer.BadParameter(f"--lengths {given}: expected NODE=PROMPT,COMPLETION[,COMMON].")
    return name, tokens


def _share(given: str) -> tuple[str, float]:
    name, _, part = given.rpartition("=")
    try:
        return name, float(part)
    except ValueError as error:
        raise typer.BadParameter(f"--share {given}: expected NODE=PART, a number from 0 to 1.") from error


def _images(given: str) -> tuple[str, list[tuple[int, int]]]:
    name, _, sizes = given.rpartition("=")
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size.strip()) for size in sizes.split(",") if sizes]
    if not name or None in found:
        raise typer.BadParameter(f"--images {given}: expected NODE=WIDTHxHEIGHT[,...] in pixels, as NODE=640x480.")
    return name, [(int(size[1]), int(size[2])) for size in found if size]


def _write(plan: Plan, path: Path, texts: Mapping[str, str]) -> None:
    """Writes the form that the file's ending names; an older file is replaced whole."""
    from sysdag.files.atomic import replacing_file

    with replacing_file(path) as temporary:
        if path.suffix in PICTURES:
            from sysdag.graph.render import draw

            draw(plan, temporary)
        else:
            temporary.write_text(texts[path.suffix] + "\n", encoding="utf-8")

"""The options by which `sysdag sample` chooses what draws the completions of language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysdag.commands.given import refuse

if TYPE_CHECKING:
    from sysdag.graph.plan import Plan

Decoders = Annotated[
    list[str] | None,
    typer.Option(
        "--decoder",
        metavar="[NODE=]DECODER",
        help="What draws the completions of language models, of all or of one: local (sysdag), continuous "
        "(transformers' generate_batch), or the URL of an OpenAI-compatible server that holds the model, as "
        "http://127.0.0.1:8000/v1 (vLLM, SGLang). By default what the system says. Repeatable.",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="[NODE=]NAME",
        help="Of a server: the model, or the adapter, as the server calls it; by default the only one there. "
        "Repeatable.",
    ),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of a server: the environment variable that holds its key."),
]
Concurrency = Annotated[int, typer.Option(min=1, help="Of a server: requests at once.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Of a server: seconds until a request has failed.")]
Retries = Annotated[int, typer.Option(min=0, help="Of a server: tries after a failed one, 429 or 5xx.")]
_OF_SERVERS = ("model", "api_key_env", "concurrency", "timeout", "retries")


def with_decoders(context: typer.Context, plan: Plan) -> Plan:
    """The plan with the decoders that a command's options name for its language models.

    Args:
        context: of a command that has the options of this module under their names in small letters.

    Raises:
        typer.BadParameter: for options that do not fit together, or a node without a language model.
        PlanError: for a decoder that there is not.
    """
    given: dict[str, Any] = context.params
    decoders = given["decoder"] or []
    if not any("://" in each for each in decoders):
        refuse(context, _OF_SERVERS, "belongs to a server: --decoder http://127.0.0.1:8000/v1")
    if not decoders:
        return plan
    from sysdag.components.language.engines.choice import Server, chosen_decoder

    components: dict[str, Any] = {name: plan.system[name].component for name in plan.random_nodes}
    models = {name: component for name, component in components.items() if hasattr(component, "with_decoder")}
    if not models:
        raise typer.BadParameter("--decoder is about language models, and the system has none.")
    chosen, named = _by_node("--decoder", decoders, plan, models), _by_node("--model", given["model"], plan, models)
    options = {
        "api_key_env": given["api_key_env"], "concurrency": given["concurrency"], "timeout": given["timeout"],
        "max_retries": given["retries"],
    }  # fmt: skip
    made: dict[int, tuple[str, Any, Any]] = {}  # of each component: a node, its decoder, the component with that
    for name, component in models.items():
        if name not in chosen:
            if name in named:
                raise typer.BadParameter(f"--model {name}={named[name]}: there is no server of that node; --decoder.")
            continue
        decoder = chosen_decoder(chosen[name])
        if isinstance(decoder, Server):
            decoder = Server(decoder.url, named.get(name), **options)
        elif name in named and any("=" in each for each in given["model"] or ()):
            raise typer.BadParameter(f"--model {name}={named[name]} belongs to a server, not to {decoder}.")
        other, earlier, _ = made.setdefault(id(component), (name, decoder, component.with_decoder(decoder)))
        if earlier != decoder:
            raise typer.BadParameter(f"--decoder: {other} and {name} share one model, so they have one decoder.")
    changed = {name: made[id(component)][2] for name, component in models.items() if id(component) in made}
    return plan.system.with_components(changed).compile()


def _by_node(option: str, given: Sequence[str] | None, plan: Plan, models: Mapping[str, Any]) -> dict[str, str]:
    """What is said of each node; what names none is said of all, but for those that are named."""
    of_all: dict[str, str] = {}
    of_one: dict[str, str] = {}
    for each in given or ():
        node, is_named, value = each.partition("=")
        if is_named and node in models:
            of_one[node] = value
        elif is_named and (node in plan.order or (option == "--decoder" and "://" not in node)):
            raise typer.BadParameter(f"{option} {each}: {node!r} is none of the language models, {list(models)}.")
        else:
            of_all |= dict.fromkeys(models, each)
    return of_all | of_one

"""What one optimisation step asks of its device, counted on a CPU: launches, synchronisations, tokens, head rows.

    python -m bench counts [--peers NAME ...] [--model FOLDER] [--csv]

The systems of `bench step`, and two of 24 layers, with models of hidden size 16: counts do not depend on a model's
width, and kernels of no size leave the host's own time. Every way has its batch in one piece (equal micro-batches).
`bench/counting.py` says what counts as a launch and as a synchronisation. `uploads` are copies to the device. `tokens`
go through a trunk, of the policy or the reference; their floor is each distinct beginning of a text once for both.
`head_rows` have their logits computed; `labels` are the tokens that are scored, by both. `texts` are tokenised in a
step that sees its pairs again. `peak_kib` is what the step's own tensors hold at once, on the device. `host_ms` is the
median processor time of a step that is not counted; all other figures are exact, those of the step after a first one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from bench import measure, step
from bench.counting import Counter
from bench.step_systems import Case, Step
from sysdag.components import CausalLM
from sysdag.engine import SystemModel
from sysdag.execution.likelihood import aligned

HELD = ("launches", "synchronisations", "tokens", "head_rows")


def cases(model: str | None = None) -> list[Case]:
    if model is not None:
        one = [Case("one LLM", 1, lora, nodes=1, pairs=2, size=model) for lora in (True, False)]
        return [Case("two LLMs", candidates=4, lora=True, size=model), *one]
    deep = [Case("two LLMs", candidates=4, lora=True), Case("one LLM", 1, True, nodes=1, pairs=2)]
    narrow = [case._replace(size="narrow") for case in step.cases("cpu")]
    return [*narrow, *(case._replace(size="deep") for case in deep)]


def modules(made: Step) -> list[Any]:
    """The models of a step, its references and TRL's."""
    found = [component.module for component in made.model.components.values()]
    found += [reference.module for reference in made.model.references.values()]
    if made._trl is not None:
        found += [made._trl.trainer.model, made._trl.trainer.ref_model]
    return [module for module in found if isinstance(module, nn.Module)]


@contextlib.contextmanager
def counting_texts() -> Iterator[list[int]]:
    """How many texts each call of a tokenizer encodes while the context lasts."""
    seen: list[int] = []
    plain = PreTrainedTokenizerBase.__call__

    def counted(self: Any, text: Any = None, *arguments: Any, **options: Any) -> Any:
        seen.append(len(text) if isinstance(text, (list, tuple)) else 1)
        return plain(self, text, *arguments, **options)

    PreTrainedTokenizerBase.__call__ = counted
    try:
        yield seen
    finally:
        PreTrainedTokenizerBase.__call__ = plain


def count(made: Step, name: str) -> dict[str, int]:
    """The exact figures of one way to a step, whose first step has decided what there is to decide."""
    made.run(name)
    made.clear()
    every = modules(made)
    counter = Counter(every, [module.get_output_embeddings().weight for module in every])
    with counting_texts() as texts, counter.counting():
        made.run(name)
    found = {what: getattr(counter, what) for what in (*HELD, "uploads")}
    return found | {"texts": sum(texts), "peak_kib": round(counter.peak_bytes / 1024)}


def floors(model: SystemModel, pairs: Sequence[Any]) -> dict[str, int]:
    """Tokens that a step cannot do without, and the tokens that it scores, by policies and references."""
    tokens = labels = 0
    for term in model.compare(pairs, None, None).terms:
        elements, draws = aligned(model.plan, term.trace, term.name)
        component = model.plan.system[term.name].component
        assert isinstance(component, CausalLM)
        texts = [
            (*prompt, *draw.record["token_ids"])
            for prompt, draw in zip(component.prompt_ids(elements.values), draws, strict=True)
        ]
        tokens += 2 * len({text[:end] for text in texts for end in range(1, len(text) + 1)})
        labels += 2 * sum(len(draw.record["token_ids"]) for draw in draws)
    return {"floor_tokens": tokens, "labels": labels}


def layers(made: Step) -> int:
    return modules(made)[0].config.num_hidden_layers


def measured(case: Case, peers: Sequence[str] | None, repeats: int) -> list[dict[str, Any]]:
    """The table's rows for one case."""
    wanted = step.names(case, peers)
    made = Step(case, with_trl="trl" in wanted)
    columns = {"system": case.system, "nodes": case.nodes, "k": case.candidates, "trained": case.trained}
    columns |= {"layers": layers(made)}
    fewest = floors(made.model, made.pairs)
    rows = [{**columns, "name": name, **count(made, name), **fewest} for name in wanted]
    times = measure.interleave(
        {name: lambda name=name: made.run(name) for name in wanted}, repeats, before=made.clear, warmup=1,
        clock=time.process_time,
    )  # fmt: skip
    for row in rows:
        row["host_ms"] = 1e3 * times[row["name"]].median
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    own = {"--model": {"metavar": "FOLDER", "help": "systems of this language model instead, whose time is no host's"}}
    options = measure.options(
        __doc__, "counts", arguments, peers=step.PEERS, devices=("cpu",), threads=1, repeats=15, own=own
    )
    rows = [row for case in cases(options.model) for row in measured(case, options.peers, options.repeats)]
    measure.report("counts", rows, options.csv, [f"trl {measure.version('trl')}"])

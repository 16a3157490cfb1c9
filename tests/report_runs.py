"""Folders of trainings as `sysdag.training.run_record` writes them, with numbers made up by the tests."""

import json
import math
from pathlib import Path

import numpy


def system(nodes, edges, inputs=("question",), outputs=None):
    """The `system` of a run.json. `nodes` maps names to component keys; edges are (parent, child[, each])."""

    def row(name, component):
        base, _, visit = name.partition("[")
        return {
            "base_name": base, "visit": int(visit[:-1]) if visit else None, "function": f"module:{base}",
            "source_sha256": "0" * 64, "component": component,
        }  # fmt: skip

    return {
        "format_version": 1,
        "inputs": [{"name": name, "value_type": None} for name in inputs],
        "nodes": [row(name, component) for name, component in nodes.items()],
        "edges": [
            {"parent": parent, "child": child, "parameter": parent.partition("[")[0], "each": bool(each)}
            for parent, child, *each in edges
        ],
        "outputs": list(outputs or [list(nodes)[-1]]),
    }


TWO_NODES = system(
    {"draft": "draft", "answer": "answer"}, [("question", "draft"), ("question", "answer"), ("draft", "answer")]
)


def record(**changes):
    """The content of a run.json."""
    return {
        "format_version": 1,
        "started": "2026-03-04T10:00:00+00:00",
        "finished": "2026-03-04T11:02:03+00:00",
        "status": "finished",
        "resumed": [],
        "system": TWO_NODES,
        "mermaid": "flowchart TD",
        "config": {"objective": "sampling", "beta": 0.2, "learning_rate": 1e-6, "seed": 42},
        "candidates": {"strategy": "diverse_beam_search", "num_candidates": 4},
        "versions": {"sysdag": "0.1", "torch": "2.13", "triton": None},
        "data": {"train": {"pairs": 800, "sha256": "ab" * 32}, "eval": {"pairs": 100, "sha256": "cd" * 32}},
    } | changes


def preference_line(step, nodes, *, prefix="", chosen_logps=-20.0, accuracy=0.8, loss=None):
    """One line of a log: the rewards (chosen, rejected) of each node, and all that follows from them."""
    chosen, rejected = (sum(rewards[side] for rewards in nodes.values()) for side in (0, 1))
    margin = chosen - rejected
    metrics = {
        "loss": math.log1p(math.exp(-min(margin, 500))) if loss is None else loss,
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margin,
        "rewards/accuracies": accuracy, "logps/chosen": chosen_logps, "logps/rejected": chosen_logps - 10 * margin,
    }  # fmt: skip
    for name, (won, lost) in nodes.items():
        own = {"chosen": won, "rejected": lost, "margins": won - lost}
        metrics |= {f"nodes/{name}/rewards/{kind}": value for kind, value in own.items()}
    return {"step": step, "epoch": step / 100, **{prefix + name: value for name, value in metrics.items()}}


def log(steps=60, every=5, noise=0.05, seed=0):
    """An ordinary training of TWO_NODES that goes well, with an evaluation at every fifth step."""
    generator = numpy.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        gain = 1 - math.exp(-step / 20)

        def rewards(gain=gain):
            wobble = (noise * generator.normal(size=4)).tolist()
            return {
                "draft": (0.4 * gain + wobble[0], -0.6 * gain + wobble[1]),
                "answer": (0.8 * gain + wobble[2], -0.7 * gain + wobble[3]),
            }

        line = preference_line(step, rewards(), chosen_logps=-20 + 2 * gain, accuracy=0.6 + 0.3 * gain)
        line |= {
            "learning_rate": 1e-5 * (1 - step / (steps + 1)), "grad_norm": 3.0 - gain + noise * generator.random(),
            "nodes/draft/grad_norm": 1.0 + noise * generator.random(), "nodes/answer/grad_norm": 2.0 - gain,
            "candidates/effective_sample_size": 2.5, "candidates/responsibility_gap": 0.3,
            "candidates/coverage": 0.4, "candidates/distinct_2": 0.7,
        }  # fmt: skip
        lines.append(line)
        if step % every == 0:
            lines.append(
                preference_line(step, rewards(), prefix="eval_", chosen_logps=-21 + gain, accuracy=0.6 + 0.25 * gain)
            )
    return lines  # fmt: skip


def write_run(folder, lines=None, run=None, traces=None, evaluation=None):
    """Writes what is given; `lines` and `run` may be False to be left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if run is not False:
        (folder / "run.json").write_text(json.dumps(record() if run is None else run))
    if lines is not False:
        (folder / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in (log() if lines is None else lines))
        )
    for name, trace in (traces or {}).items():
        (folder / "traces").mkdir(exist_ok=True)
        trace.to_jsonl(folder / "traces" / f"{name}.jsonl")
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder

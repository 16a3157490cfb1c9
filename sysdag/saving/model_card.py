"""A saved system's model card: its graph, the models in it, how it was aligned, and what came out.

What it says of the training is read from the record in the training's folder (see `sysdag.training.run_record`).
Names and values may hold anything, so they stand in code spans whose fence is longer than any in them, and the YAML at
the top is written by a YAML library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sysdag.files import atomic
from sysdag.files.hub import is_repository
from sysdag.files.run_files import read_log, read_run
from sysdag.graph.system import System
from sysdag.saving.schema import read_json, section_of
from sysdag.saving.serialization import FILE_NAME as SYSTEM_FILE
from sysdag.saving.serialization import component_keys, system_to_dict

FILE_NAME = "README.md"
MARK = "<!-- Written by sysdag, which writes it anew with every save. Remove this line to keep changes of your own. -->"
TAGS = ("sysdag", "sysdpo", "dpo")
_SHOWN_OPTIONS = (
    "objective", "loss_type", "loss_weights", "beta", "label_smoothing", "nodes", "learning_rate", "lr_scheduler_type",
    "optim", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "sync_ref_model", "seed", "bf16", "fp16",
)  # fmt: skip
_MOST_RESULTS = 60
_CITATION = """@inproceedings{wang2025aligning,
    title = {Aligning Compound AI Systems via System-level DPO},
    author = {Wang, Xiangwen and Zhang, Yibo Jacky and Ding, Zhoujie and Tsai, Katherine and Wu, Haolun and
              Koyejo, Sanmi},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2025},
    eprint = {2502.17721},
    archivePrefix = {arXiv}
}"""


def write_card(
    system: System,
    folder: str | Path,
    *,
    run_folder: str | Path | None = None,
    name: str | None = None,
    loads_from: str | None = None,
    datasets: Sequence[str] = (),
    tags: Iterable[str] = (),
    language: str | Sequence[str] | None = None,
    license: str | None = None,
) -> bool:
    """Writes `README.md` into a saved system's folder, unless a card of the user's own is there.

    Args:
        system: the system that is saved there.
        folder: where.
        run_folder: of the training that made it; what it says of the training is left out without one.
        name: the title; the folder's name by default.
        loads_from: what `System.from_pretrained` is shown with; the folder's name by default.
        datasets: names of the data, of which the metadata list those on the Hub.
        tags, language, license: more metadata; tags of an earlier card are kept.

    Returns:
        Whether it was written.
    """
    file = Path(folder) / FILE_NAME
    old = file.read_text(encoding="utf-8") if file.is_file() else None
    if old is not None and MARK not in old:
        return False
    name = name or Path(folder).absolute().name
    metadata = {
        "language": language,
        "license": license,
        "library_name": "sysdag",
        "base_model": _base_models(system),
        "datasets": [each for each in datasets if is_repository(each)],
        "tags": list(dict.fromkeys([*TAGS, *tags, *_old_tags(old)])),
    }
    run = {} if run_folder is None else read_run(run_folder)
    words = "whose models were aligned jointly from preferences about its whole output, with" if run else "saved with"
    parts = [
        f"# {_escaped(name)}\n\nA compound AI system, {words} sysdag.",
        _system_part(system),
        _training_part(run) if run else "",
        _results_part(Path(run_folder), run) if run and run_folder is not None else "",
        _use_part(system, loads_from or name),
        _models_part(system, Path(folder), loads_from or name),
        _table("Versions", ("package", "version"), (run.get("versions") or {}).items()),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    body = "\n\n".join(part for part in parts if part)
    atomic.write_text(file, f"---\n{_yaml(metadata)}---\n\n{MARK}\n\n{body}\n")
    return True


def _system_part(system: System) -> str:
    plan = system.compile()
    keys = {id(component): key for key, component in component_keys(system).items()}
    rows = []
    for node_name in plan.order:
        node = system[node_name]
        base = _shown_base(node.component)
        rows.append(
            (
                node_name + (" (output)" if node_name in system.outputs else ""),
                type(node.component).__name__ if node.is_random else "a function",
                keys[id(node.component)] if node.is_random else "-",
                base or "-",
            )
        )
    table = _table("", ("node", "drawn by", "weights in", "base model"), rows)
    return f"## The system\n\n{_fenced(plan.to_mermaid(), 'mermaid')}\n\n{table}"


def _training_part(run: Mapping[str, Any]) -> str:
    config = run.get("config") or {}
    options = [(name, config[name]) for name in _SHOWN_OPTIONS if config.get(name) not in (None, False)]
    if run.get("candidates"):
        options.append(("candidates", run["candidates"]))
    status = str(run.get("status"))
    ended = "" if status == "finished" else f"The training's status when this was written: {_code(status)}.\n\n"
    data = [
        (which, facts.get("pairs"), facts.get("sha256"))
        for which, part in (run.get("data") or {}).items()
        for which, facts in _parts(which, part)
    ]
    return "\n\n".join(
        [
            f"## Training\n\n{ended}Started {_code(run.get('started'))}.",
            _table("", ("option", "value"), options),
            _table("", ("data", "preference pairs", "SHA-256"), data),
        ]
    )


def _parts(name: str, part: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """One entry for a dataset, several for a dict of them."""
    if not isinstance(part, Mapping):
        return []
    if "pairs" in part and not isinstance(part["pairs"], Mapping):
        return [(name, part)]
    return [(f"{name}: {each}", facts) for each, facts in part.items() if isinstance(facts, Mapping)]


def _results_part(folder: Path, run: Mapping[str, Any]) -> str:
    last: dict[str, Any] = {}
    step = None
    for line in read_log(folder):
        found = {key: value for key, value in line.items() if key.startswith("eval_")}
        if found:
            last, step = found, line["step"]
    parts = []
    if last:
        parts.append(_table(f"Evaluation at step {step}", ("metric", "value"), last.items()))
    parts.append(_table("Evaluation of the system's runs", ("metric", "value"), _evaluation(folder, run)))
    return "\n\n".join(part for part in parts if part)


def _evaluation(folder: Path, run: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The numbers in `eval.json`, unless it is of an earlier training in the folder."""
    file = folder / "eval.json"
    try:
        started = datetime.fromisoformat(str(run.get("started"))).timestamp()
        if file.stat().st_mtime < started:
            return []
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    return list(_leaves(content))[:_MOST_RESULTS]


def _leaves(content: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{path}/{key}" if path else str(key))
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        yield path, content


def _use_part(system: System, source: str) -> str:
    functions = [row["function"] for row in system_to_dict(system)["nodes"]]
    modules = sorted({path.partition(":")[0] for path in functions if path})
    inputs = {given.name: ["..."] for given in system.inputs}
    if None in functions or "__main__" in modules:
        load = f"system = system.load({source!r})  # on a system of the same node functions"
        words = "Its node functions are no part of this folder; build the system from them and load the weights."
    else:
        load = f"system = System.from_pretrained({source!r})"
        words = f"Its node functions are imported from {', '.join(map(_code, modules))}, which must be importable."
    run = f"trace = system.compile().sample({inputs!r})\nprint(trace[{system.outputs[0]!r}])"
    code = f"from sysdag import System\n\n{load}\n{run}"
    return f"## Use\n\n{words}\n\n{_fenced(code, 'python')}"


def _models_part(system: System, folder: Path, source: str) -> str:
    """How other libraries load the models that are saved in the folder."""
    rows = section_of(read_json(folder / SYSTEM_FILE), "components", dict) if (folder / SYSTEM_FILE).is_file() else {}
    parts = []
    for key, component in component_keys(system).items():
        row = rows.get(key, {"folder": None})
        if row["folder"] is None or not (ways := component.usage(folder / key, row["options"])):
            continue
        if is_repository(source):
            where = (
                f"from huggingface_hub import snapshot_download\nfolder = snapshot_download({source!r}) + {'/' + key!r}"
            )
        else:
            where = f"folder = {f'{source}/{key}'!r}"
        shown = [f"{words}\n\n{_fenced(f'{where}{chr(10)}{code}', 'python')}" for words, code in ways]
        parts.append("\n\n".join([f"### {_escaped(key)}", *shown]))
    return "\n\n".join(["## The models by themselves", *parts]) if parts else ""


def _base_models(system: System) -> list[str]:
    plan = system.compile()
    found = [system[name].component.base_model for name in plan.random_nodes]
    return list(dict.fromkeys(name for name in found if name and is_repository(name)))


def _shown_base(component: Any) -> str | None:
    """The name of a model on the Hub, or the last part of a folder's: where it lies is nobody's business."""
    name = None if component is None else component.base_model
    return name if name is None or is_repository(name) else Path(name).name


def _old_tags(text: str | None) -> list[str]:
    from huggingface_hub import ModelCard

    tags = [] if text is None else ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("tags")
    return [tag for tag in tags or [] if isinstance(tag, str)]


def _yaml(metadata: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(
        {key: value for key, value in metadata.items() if value}, sort_keys=False, allow_unicode=True, width=1000
    )


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(_code(value) for value in row) + " |" for row in rows]
    if not lines:
        return ""
    top = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*([f"## {title}", ""] if title else []), *top, *lines])


def _code(value: Any) -> str:
    """A code span of one line, whatever the value holds, also inside a table."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split()).replace("|", "\\|") or " "
    fence = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))

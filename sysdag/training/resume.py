"""What a checkpoint of training holds beside weights, optimizer and random state, and what must be the same to go on.

`sysdag_state.json` holds `run` (the facts that make it the same training: options, data, models, references), `files`
(what belongs to the checkpoint, with sizes), and `engine`, `candidates`, `groups` and `means`, which continue.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sysdag.components import prompt_date
from sysdag.data.preferences import Feedback, UnpairedRun
from sysdag.engine.step import SystemModel
from sysdag.errors import SerializationError
from sysdag.files.run_files import read_run
from sysdag.objectives.options import ObjectiveOptions
from sysdag.traces.cells import Draw

_SAMPLED = 64  # numbers of each of a reference's tensors that its hash is made of
_LATER = (
    "discopop_tau", "simpo_gamma", "cpo_alpha", "desirable_weight", "undesirable_weight", "reference_free", "ld_alpha",
    "use_weighting", "group_dro", "group_dro_step_size",
)  # fmt: skip
_SHOWN = 4  # differences that an error names


def model_facts(model: SystemModel) -> dict[str, Any]:
    """What makes a training the one it is, apart from its data, each under the words that an error names it by.

    Taken before training, when references and trained tensors are whole and as they start.
    """
    facts: dict[str, Any] = {
        f"option {name}": value
        for name, value in asdict(model.options).items()
        if name not in _LATER or value != getattr(ObjectiveOptions, name)  # that checkpoints of before do not name
    }
    for name, options in model.nodes.items():
        for option in ("beta", "scale", "trainable"):
            facts[f"node {name!r}, option {option}"] = getattr(options, option)
    strategy = None if model.candidates is None else model.candidates.strategy
    facts["candidates"] = None if strategy is None else _described(strategy)
    for key, component in model.components.items():
        for name, parameter in component.own_parameters().items():
            if parameter.requires_grad:
                facts[f"node {key!r}, shape of the trained tensor {name!r}"] = str(tuple(parameter.shape))
    for key, reference in model.references.items():
        if reference.module is not None:
            facts[f"node {key!r}, hash of its reference's weights"] = hash_of_weights(reference.module)
    return json.loads(json.dumps(facts))


def data_facts(pairs: Sequence[Feedback]) -> dict[str, Any]:
    """The training data's part of the same."""
    return {"number of training pairs": len(pairs), "sha256 of the training pairs": pairs_hash(pairs)}


def pairs_hash(pairs: Iterable[Feedback]) -> str:
    """SHA-256 of the content of pairs or unpaired runs, in their order: inputs, values, records, labels, and what is
    said of the pairs themselves. Images count by their pixels."""
    digest = hashlib.sha256()
    for pair in pairs:
        _feed(digest, [dict(pair.inputs), *map(dict, pair.sides.values())])
        if isinstance(pair, UnpairedRun):
            _feed(digest, ["label", pair.label])
        beside = (pair.weight, pair.margin, pair.group)
        if beside != (1.0, 0.0, None):
            _feed(digest, list(beside))
    return digest.hexdigest()


def hash_of_weights(module: nn.Module) -> str:
    """A hash of names, types, shapes and some numbers of each frozen tensor: fast, and enough to tell models apart."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or parameter.is_meta:
            continue
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        numbers = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].contiguous().cpu()
        digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(strategy: Any) -> dict[str, Any]:
    own = fields(strategy) if is_dataclass(strategy) else ()
    values = {field.name: getattr(strategy, field.name) for field in own}
    plain = {
        name: value for name, value in values.items() if value is None or isinstance(value, (bool, int, float, str))
    }
    return {"strategy": type(strategy).__qualname__, **plain}


def _feed(digest: Any, value: Any) -> None:
    """Adds a value to a hash such that different values give different bytes."""
    if isinstance(value, Draw):
        _feed(digest, [value.value, dict(value.record)])
    elif isinstance(value, (list, tuple)) and value and all(type(element) is int for element in value):
        ids = " ".join(map(str, value)).encode()  # token ids: one by one they would take most of the time
        digest.update(b"#" + struct.pack("<Q", len(ids)) + ids)
    elif isinstance(value, (list, tuple)):
        digest.update(b"[" + struct.pack("<Q", len(value)))
        for element in value:
            _feed(digest, element)
    elif isinstance(value, Mapping):
        _feed(digest, [[name, value[name]] for name in sorted(value, key=str)])
    elif isinstance(value, torch.Tensor):
        _feed(digest, [str(value.dtype), value.detach().cpu().float().numpy()])
    elif isinstance(value, (numpy.ndarray, numpy.generic)):
        _feed(digest, [str(value.dtype), list(value.shape), value.tobytes()])
    elif hasattr(value, "tobytes"):  # an image of Pillow
        _feed(digest, [value.mode, list(value.size), value.tobytes()])
    elif isinstance(value, bytes):
        digest.update(b"=" + struct.pack("<Q", len(value)) + value)
    else:
        plain = value is None or isinstance(value, (bool, int, float, str))  # the repr of others may hold an address
        text = f"{type(value).__qualname__} {value!r}" if plain else type(value).__qualname__
        _feed(digest, text.encode("utf-8", "surrogatepass"))


def checkpoint_to_resume(output_dir: Path, wanted: str | bool) -> Path:
    """The checkpoint that a training goes on from.

    Args:
        output_dir: of the training.
        wanted: a checkpoint's folder; or True for the last one of the training that `output_dir` records. Those that an
            earlier training left there are no part of it.

    Raises:
        SerializationError: if there is none.
    """
    here = checkpoints_in(output_dir)
    if isinstance(wanted, str):
        if (Path(wanted) / TRAINER_STATE_NAME).is_file():
            return Path(wanted)
        known = f"{output_dir} has {[path.name for path in here]}" if here else f"{output_dir} has none either"
        raise SerializationError(f"resume_from_checkpoint: {wanted} is no checkpoint of a training; {known}.")
    run_id = read_run(output_dir).get("id")
    own = [path for path in here if run_id is None or run_of(path) in (run_id, None)]  # what says nothing is told later
    if own:
        return own[-1]
    others = f" {[path.name for path in here]} are of an earlier one; name one to go on from it." if here else ""
    raise SerializationError(
        f"resume_from_checkpoint: {output_dir} has no checkpoint of its training yet.{others} Leave the option out to "
        "start from the beginning; save_steps says how often a checkpoint is made."
    )


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, by their steps."""
    found = {}
    for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal() and path.is_dir():
            found[int(number)] = path
    return [found[number] for number in sorted(found)]


def run_of(checkpoint: Path) -> str | None:
    """The id of the training that made a checkpoint; None where it does not say."""
    for file in sorted(checkpoint.glob("sysdag_state*.json")):
        try:
            state = read_state(file)
        except SerializationError:  # a damaged file is told where the checkpoint is read
            continue
        if state is not None and state.get("run_id") is not None:
            return state["run_id"]
    return None


def write_state(
    file: Path, model: SystemModel, run: Mapping[str, Any], folder: Path | None, run_id: str, means: Mapping[str, Any]
) -> None:
    """Writes a process's state.

    Args:
        file: `sysdag_state.json`, or with the process's number; candidates go beside it.
        run: `model_facts`, `data_facts` and what else must not differ.
        folder: the checkpoint, for the process that lists its files; None for the others.
        run_id: of the training.
        means: see `sysdag.training.step_means`.
    """
    kept = None if model.candidates is None else model.candidates.save(_candidates_file(file))
    listed = [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
    state = {
        "format_version": 1,
        "run_id": run_id,
        "run": dict(run),
        "engine": model.engine_state(),
        "candidates": kept,
        "means": dict(means),
        "prompt_date": prompt_date.moment().isoformat(),
        "groups": None if model.groups is None else model.groups.state(),
        "shift": model.shift.state() if model.options.needs_shift else None,
        "files": {str(path.relative_to(folder).as_posix()): path.stat().st_size for path in listed} if folder else None,
    }
    file.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def read_state(file: Path) -> dict[str, Any] | None:
    """What `write_state` wrote; None where there is no such file.

    Raises:
        SerializationError: for a file that is damaged.
    """
    if not file.exists():
        return None
    try:
        state = json.loads(file.read_bytes())
        if state["format_version"] != 1:
            raise ValueError(f"format_version is {state['format_version']!r}, expected 1")
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise SerializationError(f"{file} is damaged: {error}") from error


def check_state(state: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> None:
    """Compares a checkpoint with the run that wants to go on from it.

    Raises:
        SerializationError: naming the files that are missing or cut off, or the facts that differ.
    """
    for name, size in (state["files"] or {}).items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            key = name.partition("/")[0]
            whose = f"node {key!r}" if "/" in name else "the trainer"
            problem = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise SerializationError(
                f"{folder} is incomplete: the file {name} of {whose} {problem}. Resume from another checkpoint."
            )
    saved = state["run"]
    different = [
        f"{what}: {_shown(saved, what)} in the checkpoint, {_shown(run, what)} now"
        for what in dict.fromkeys([*saved, *run])
        if what not in saved or what not in run or saved[what] != run[what]
    ]
    if different:
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise SerializationError(
            f"{folder} was made by another training. {'; '.join(different[:_SHOWN])}{more}. Resume with the same, or "
            "set check_resume=False to go on all the same."
        )


def _shown(facts: Mapping[str, Any], what: str) -> str:
    return repr(facts[what]) if what in facts else "absent"


def restore_state(state: Mapping[str, Any], model: SystemModel, file: Path) -> None:
    """Lets the model's engine and candidates go on from a state that was read from `file`."""
    model.load_engine_state(state["engine"])
    if model.groups is not None:
        model.groups.load(state.get("groups"))
    if model.options.needs_shift:
        model.shift.load(state.get("shift"))
    if model.candidates is not None and state["candidates"] is not None:
        model.candidates.load(_candidates_file(file), state["candidates"])


def _candidates_file(file: Path) -> Path:
    return file.with_name(file.name.replace("sysdag_state", "candidates").replace(".json", ".jsonl"))

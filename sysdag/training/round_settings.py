"""The file of rounds: YAML with options at its top, and a section for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdag.errors import OptionError
from sysdag.evaluation.judge_choice import JudgeChoice
from sysdag.files.config_file import Setting, read_settings
from sysdag.traces.shapes import SHAPES
from sysdag.training.round_people import People
from sysdag.training.rounds import Rounds
from sysdag.training.train_options import TrainJob, nearest, parse

SECTIONS = ("sample", "judge", "train", "eval")
_TOP: dict[str, type] = {
    "system": str, "inputs": str, "heldout": str, "output_dir": str, "rounds": int, "reference": str,
    "earlier_share": float, "inputs_per_round": int, "seed": int, "early_stopping_patience": int,
    "early_stopping_threshold": float, "split": str, "heldout_split": str, "rename": dict, "shape": str,
}  # fmt: skip
_SAMPLE: dict[str, type] = {"runs": int, "batch_size": int, "device": str}
_CHOICE: dict[str, type] = {
    "by": str, "lower_is_better": bool, "model": str, "api_key_env": str, "criteria": str, "template": Path,
    "request": dict, "concurrency": int, "timeout": float, "retries": int, "cache": Path,
}  # fmt: skip
_PAIRING: dict[str, type] = {
    "node": list, "pairs_per_prompt": int, "margin": float, "comparisons": int, "threshold": float,
}  # fmt: skip
_PEOPLE: dict[str, type] = {"annotator": str, "port": int, "pairs_per_input": int, "browser": bool}
_EVAL: dict[str, type] = {"runs": int, "threshold": float, "margin": float, "confidence": float}
_NEEDED = ("system", "inputs", "heldout", "output_dir")
_OF_ROUNDS = {
    "system": "it is at the top of the file", "dataset": "each round trains on its own pairs",
    "eval_dataset": "rounds are evaluated on heldout", "eval_split": "rounds are evaluated on heldout",
    "output_dir": "it is at the top of the file", "split": "each round trains on its own pairs",
    "rename": "each round trains on its own pairs", "shape": "each round trains on its own pairs",
    "sweep": "a round trains once", "dry_run": "sysdag rounds has one of its own",
    "resume_from_checkpoint": "rounds go on by themselves where they were cut off",
}  # fmt: skip
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Path: "a path", dict: "a mapping",
          list: "a list"}  # fmt: skip


def rounds_from(
    file: str | Path, *, output_dir: str | None = None, rounds: int | None = None, seed: int | None = None
) -> Rounds:
    """What a file asks for.

    Args:
        output_dir, rounds, seed: in place of the file's.

    Raises:
        OptionError: naming the file's line and the option that is unknown (with the nearest known one), missing, of
            another type, or contradicts another.
    """
    settings = {setting.key: setting for setting in read_settings(file, SECTIONS)}
    parts: dict[str, list[Setting]] = {name: settings.pop(name).value if name in settings else [] for name in SECTIONS}
    top = _typed(list(settings.values()), _TOP, (*_TOP, *SECTIONS))
    given = {"output_dir": output_dir, "rounds": rounds, "seed": seed}
    top |= {name: value for name, value in given.items() if value is not None}
    if missing := [name for name in _NEEDED if name not in top]:
        raise OptionError(f"{file}: {missing[0]} is missing; a file of rounds needs {', '.join(_NEEDED)} and judge.")
    if top.get("shape") not in (None, *SHAPES):
        raise settings["shape"].error(f"{top['shape']!r} is unknown; those that are known: {', '.join(SHAPES)}.")
    job = _job(parts["train"], top, str(file))
    judge, pairing = _judge(parts["judge"], str(file))
    evaluated = _typed(parts["eval"], _CHOICE | _EVAL)
    chosen = {name: evaluated.pop(name) for name in _CHOICE if name in evaluated}
    if chosen and "by" not in chosen:
        raise parts["eval"][0].error(f"eval: {next(iter(chosen))} is of a judge; name it (by).")
    named = {"runs": "eval_runs", "margin": "eval_margin"}
    nodes, threshold = pairing.pop("node", None), pairing.pop("threshold", None)
    try:
        return Rounds(
            **{name: value for name, value in top.items() if name != "output_dir"},
            **_typed(parts["sample"], _SAMPLE),
            **pairing,
            **{named.get(name, name): value for name, value in evaluated.items()},
            nodes=nodes,
            label_threshold=threshold,
            judge=judge,
            eval_judge=JudgeChoice(**chosen, spelling="eval: {}") if chosen else None,
            args=job.args,
            candidates=job.candidates,
        )
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from error


def _judge(settings: Sequence[Setting], file: str) -> tuple[JudgeChoice | People, dict[str, Any]]:
    """The judge of the pairs, and what else its section says."""
    found = _typed(settings, _CHOICE | _PAIRING | _PEOPLE)
    if "by" not in found:
        raise OptionError(f"{file}: judge: by is missing: a function, an endpoint's URL, a column, or people.")
    place = {setting.key: setting for setting in settings}
    people = {name: found.pop(name) for name in _PEOPLE if name in found}
    if found["by"] == "people":
        for name in found:
            if name != "by":
                raise place[name].error(f"belongs to another judge; people have {', '.join(_PEOPLE)}.")
        return People(**people), {}
    for name in people:
        raise place[name].error("belongs to people: by: people.")
    chosen = {name: found.pop(name) for name in _CHOICE if name in found}
    try:
        return JudgeChoice(**chosen, spelling="judge: {}"), found
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from error


def _job(settings: Sequence[Setting], top: Mapping[str, Any], file: str) -> TrainJob:
    """The training of each round, its options checked as those of `sysdag train`."""
    for setting in settings:
        if setting.key in _OF_ROUNDS:
            raise setting.error(f"has no place here: {_OF_ROUNDS[setting.key]}.")
    own = [Setting(name, file, str(top[name])) for name in ("system", "output_dir")]
    own.append(Setting("dataset", file, "pairs.jsonl"))
    if not any(setting.key == "seed" for setting in settings):
        own.append(Setting("seed", file, str(top.get("seed", 0))))
    return parse([], [*own, *settings])


def _typed(settings: Sequence[Setting], kinds: Mapping[str, type], known: Sequence[str] = ()) -> dict[str, Any]:
    """The values of settings by key; those that are null are left out, which means the default."""
    found = {}
    for setting in settings:
        if setting.key not in kinds:
            raise setting.error(f"no such option{nearest(setting.key, known or tuple(kinds), last='')}")
        if setting.value is not None:
            found[setting.key] = _value(setting, kinds[setting.key])
    return found


def _value(setting: Setting, kind: type) -> Any:
    value = setting.value
    if kind is list and isinstance(value, str):
        return [value]
    if kind in (list, dict):
        if isinstance(value, kind):
            return value
    elif isinstance(value, str):
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind is not bool:
            try:
                return kind(value)
            except ValueError:
                pass
    raise setting.error(f"expected {_KINDS[kind]}, got {value!r}.")

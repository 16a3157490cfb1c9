"""The options of `sysdag train`: all fields of `SysDPOConfig` as flags and as keys of a YAML file, and its own.

Flags, their types and their help are made from the configuration's fields by transformers' `HfArgumentParser`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from sysdag.errors import OptionError
from sysdag.files.config_file import Setting, read_settings
from sysdag.graph.system import System
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.objectives.strategies import DiverseBeamSearch
from sysdag.objectives.strategy_options import STRATEGIES, strategy_from
from sysdag.traces.reshaping import rename_from
from sysdag.traces.shapes import SHAPES
from sysdag.training.config import ELSEWHERE, SysDPOConfig

_FIELDS = tuple(field.name for field in fields(SysDPOConfig) if field.init)
_INHERITED = {field.name for field in fields(TrainingArguments)}
_POSITIONAL = ("system", "dataset")
_STRUCTURED = ("candidates", "rename", "sweep")  # which the file writes in another way than the flag
_OWN = (*_POSITIONAL, "eval_dataset", "split", "eval_split", "shape", "strict", *_STRUCTURED)


NOT_SWEPT = {
    "output_dir": "each training has a folder of its own below it",
    "resume_from_checkpoint": "a sweep goes on by itself where it was cut off",
    "push_to_hub": "all trainings would be pushed to one place",
    **dict.fromkeys(
        ("system", "dataset", "eval_dataset", "split", "eval_split", "shape", "rename", "strict"),
        "trainings on other data or systems do not compare; options of the training do",
    ),
}
SWEPT = tuple(name for name in ("candidates", *_FIELDS) if name not in NOT_SWEPT)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What `sysdag train` was asked for.

    Attributes:
        system: what `sysdag.saving.loading.load_system` takes, or a system.
        weights: a folder that a system of the same graph was saved to, from whose weights training starts; the
            reference is `system` all the same. None starts from `system`.
        dataset, eval_dataset: what `sysdag.traces.readers.read_rows` takes; the second may be None.
        split, eval_split: of a dataset that has several; the second is `test` by default.
        rename, shape: of the columns of both; see `sysdag.traces.readers.read_rows`.
        strict: whether a row that should not be trained on is an error, and not dropped.
        dry_run: whether to stop before weights load.
        candidates: for Sampling.
        args: the configuration.
        sweep: options with the values that are to be tried, each as it stands on a command line; see
            `sysdag.training.sweep`. `args` and `candidates` are those without.
    """

    system: str | System
    weights: Path | None = None
    dataset: str
    eval_dataset: str | None = None
    split: str = "train"
    eval_split: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    shape: str | None = None
    strict: bool = False
    dry_run: bool = False
    candidates: CandidateStrategy | None = None
    args: SysDPOConfig
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class TrainParser(HfArgumentParser):
    """The parser of `sysdag train`; `print_help` lists its options in groups, SysDPO's own before the Trainer's."""

    def __init__(self) -> None:
        super().__init__(
            [],
            prog="sysdag train",
            usage="sysdag train SYSTEM [DATA] [--config FILE] [OPTION ...]",
            description="Aligns all models of a system jointly from preferences about its outputs. Options may also "
            "stand in a YAML file (--config), under the same names; a flag wins. Names take hyphens, too.",
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        own = self.add_argument_group("system and data")
        own.add_argument("system", nargs="?", metavar="SYSTEM", help="SYSTEM.py:name, package.module:name, or a saved "
                         "system's folder; key `system` of the file.")  # fmt: skip
        own.add_argument("dataset", nargs="?", metavar="DATA", help="Preferences: JSON lines, JSON, CSV, Parquet, a "
                         "folder of `datasets`, or a name on the Hub; key `dataset` of the file.")  # fmt: skip
        own.add_argument("--eval_dataset", "--eval-dataset", "--eval-data", metavar="DATA", help="Preferences to "
                         "evaluate on; at the end of training in any case.")  # fmt: skip
        own.add_argument("--split", default="train", help="Of a dataset that has several, the one to train on.")
        own.add_argument("--eval_split", "--eval-split", help="The one to evaluate on; `test` by default.")
        own.add_argument("--rename", action="append", metavar="OLD=NEW", help="Give a column another name, as "
                         "question=prompt; repeatable. In the file: {question: prompt}.")  # fmt: skip
        own.add_argument("--shape", metavar="NAME", help="Make prompt, chosen and rejected of the columns of a known "
                         f"data set: {', '.join(SHAPES)}.")  # fmt: skip
        own.add_argument("--strict", action="store_true", help="End with an error where rows would be dropped.")
        known = ", ".join([*STRATEGIES, "FILE.py:Class"])
        own.add_argument("--candidates", metavar="NAME|JSON", help=f"For --objective sampling: {known}; "
                         'with options: {"strategy": "diverse_beam_search", "num_candidates": 4}. '
                         "diverse_beam_search by default.")  # fmt: skip
        own.add_argument("--sweep", action="append", metavar="KEY=V1,V2", help="Train once for each value of an "
                         "option, from untrained weights and into a folder of its own below output_dir; repeatable, "
                         "for all combinations. A JSON list holds values with commas. In the file: "
                         "{beta: [0.1, 0.3]}.")  # fmt: skip
        own.add_argument("--config", metavar="FILE", help="A YAML file of options.")
        own.add_argument("--dry_run", "--dry-run", action="store_true", help="Check options, system and data, print "
                         "what would be done, and stop before weights load.")  # fmt: skip
        own.add_argument("-h", "--help", action="help", help="Show this and exit.")
        self._of_sysdpo = self.add_argument_group("SysDPO (sysdag.SysDPOConfig)")
        self._of_trainer = self.add_argument_group("training (transformers.TrainingArguments)")
        self._add_dataclass_arguments(SysDPOConfig)  # type: ignore[arg-type]
        resume = next(action for action in self._actions if action.dest == "resume_from_checkpoint")
        resume.nargs, resume.const = "?", "last"

    def _parse_dataclass_field(self, parser: Any, field: Field) -> None:  # type: ignore[override]
        group = self._of_trainer if field.name in _INHERITED else self._of_sysdpo
        HfArgumentParser._parse_dataclass_field(group, field)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, argparse.SUPPRESS) and action.nargs != 0
        return super()._get_help_string(action) if has_default and action.option_strings else action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """One of the spellings is enough."""
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next((each for each in action.option_strings if each.startswith("--")), action.option_strings[0])
        name = _hyphened(name)
        if action.nargs == 0:
            return name
        kind = "BOOL" if action.const is True else getattr(action.type, "__name__", "text").upper()
        return f"{name} {self._format_args(action, 'TEXT' if kind in ('STR', '<LAMBDA>') else kind)}"


def parse(
    arguments: Sequence[str], settings: Sequence[Setting] = (), swept: Mapping[str, Any] | None = None
) -> TrainJob:
    """What a command line asks for, with what its configuration file says.

    Args:
        settings: as if they stood in the file.
        swept: options in place of all others, one combination of a sweep, which is left out then.

    Raises:
        OptionError: naming the option (and the file's line) that is unknown, has a value of another type, or cannot go
            with the others.
        SystemExit: after `--help`.
    """
    parser = TrainParser()
    config, _ = _parsed(parser, arguments)
    from_file = {
        setting.key: setting for setting in [*settings, *(read_settings(config.config) if config.config else [])]
    }
    namespace = argparse.Namespace()
    for setting in from_file.values():
        _apply(parser, setting, namespace)
    flags = [
        flag for key, value in (swept or {}).items() for flag in Setting(key, "--sweep", value).flags((list, dict))
    ]
    given, rest = _parsed(parser, [*arguments, *flags], namespace)
    if rest:
        raise OptionError(_unexpected(rest[0]))
    for name in _POSITIONAL:
        if getattr(given, name) is None:
            value = from_file[name].value if name in from_file else None
            setattr(given, name, value)
    if not given.system or not given.dataset:
        missing = "SYSTEM" if not given.system else "DATA"
        raise OptionError(f"{missing} is missing: sysdag train SYSTEM DATA, or give it in the file of --config.")
    options = {name: getattr(given, name) for name in _FIELDS}
    try:
        args = SysDPOConfig(**options)
        candidates = _strategy(given, from_file.get("candidates"))
    except (ValueError, ImportError, TypeError) as error:  # PlanError is a ValueError, as TrainingArguments raises
        raise OptionError(str(error)) from error
    _check(args, given.eval_dataset)
    rename = _renamed(given, from_file.get("rename"))
    if given.shape is not None and given.shape not in SHAPES:
        raise OptionError(f"shape {given.shape!r} is unknown; those that are known: {', '.join(SHAPES)}.")
    if args.objective == "sampling" and candidates is None:
        candidates = DiverseBeamSearch()
    if args.objective == "direct" and candidates is not None:
        raise OptionError("candidates have no use with objective direct, which observes the intermediates; drop them.")
    return TrainJob(
        system=given.system, dataset=given.dataset, eval_dataset=given.eval_dataset, split=given.split,
        eval_split=given.eval_split, rename=rename, shape=given.shape, strict=given.strict, dry_run=given.dry_run,
        candidates=candidates, args=args, sweep={} if swept else _swept(given, from_file.get("sweep")),
    )  # fmt: skip


def _check(args: SysDPOConfig, eval_dataset: str | None) -> None:
    """Refuses what the Trainer would fail on, or silently not train with, after the weights are loaded."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise OptionError(f"{name} must be 1 or more, got {getattr(args, name)}.")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise OptionError(f"num_train_epochs must be above 0 where max_steps is not, got {args.num_train_epochs}.")
    if args.learning_rate is not None and args.learning_rate < 0:
        raise OptionError(f"learning_rate must be 0 or more, got {args.learning_rate}.")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise OptionError(
            f"eval_strategy is '{getattr(args.eval_strategy, 'value', args.eval_strategy)}', but there is nothing to "
            "evaluate on; give --eval-dataset, or leave --eval-strategy out."
        )
    if args.output_dir is not None and Path(args.output_dir).is_file():
        raise OptionError(f"output_dir {args.output_dir} is a file; name a folder.")


def _parsed(
    parser: TrainParser, arguments: Sequence[str], namespace: argparse.Namespace | None = None
) -> tuple[argparse.Namespace, list[str]]:
    # SYSTEM and DATA may stand before, between and after the options.
    return parser.parse_known_intermixed_args(list(arguments), namespace)


def _apply(parser: TrainParser, setting: Setting, namespace: argparse.Namespace) -> None:
    """Puts a setting of the file into the namespace, checked like a flag."""
    if setting.key not in (*_OWN, *_FIELDS):
        elsewhere = f": {ELSEWHERE[setting.key]}." if setting.key in ELSEWHERE else None
        raise setting.error(f"no such option{elsewhere or nearest(setting.key, (*_OWN, *_FIELDS))}")
    if setting.key in (*_POSITIONAL, *_STRUCTURED):
        if setting.key in _POSITIONAL and not isinstance(setting.value, str):
            raise setting.error(f"expected a text, got {setting.value!r}.")
        return
    declared = typing.get_type_hints(SysDPOConfig).get(setting.key, bool if setting.key == "strict" else str | None)
    if setting.value is None:
        if type(None) not in _members(declared):
            raise setting.error("must have a value, got null.")
        setattr(namespace, setting.key, None)
        return
    if setting.key == "strict":
        if str(setting.value).lower() not in ("true", "false"):
            raise setting.error(f"expected true or false, got {setting.value!r}.")
        namespace.strict = str(setting.value).lower() == "true"
        return
    kinds = [kind for kind in (list, dict) if kind in _members(declared)]
    flags = setting.flags(kinds)
    action = next(a for a in parser._actions if a.dest == setting.key and f"--{setting.key}" in a.option_strings)
    if isinstance(setting.value, list) and action.nargs != "+":  # the parser knows a single value, the field a list
        setattr(namespace, setting.key, setting.value)
        return
    try:
        found, _ = parser.parse_known_args(flags)
    except OptionError as error:
        raise setting.error(str(error).removeprefix(f"argument {'/'.join(action.option_strings)}: ")) from error
    setattr(namespace, setting.key, getattr(found, setting.key))


def _members(declared: Any) -> set[Any]:
    """The types of a union, without their parameters."""
    is_union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return {typing.get_origin(each) or each for each in (typing.get_args(declared) if is_union else (declared,))}


def _strategy(given: argparse.Namespace, setting: Setting | None) -> CandidateStrategy | None:
    if given.candidates is not None:
        text = given.candidates
        return strategy_from(json.loads(text) if text.lstrip().startswith("{") else text)
    if setting is None or setting.value is None:
        return None
    try:
        return strategy_from(setting.value)
    except ValueError as error:
        raise setting.error(str(error).removeprefix("candidates: ")) from error


def _renamed(given: argparse.Namespace, setting: Setting | None) -> dict[str, str]:
    """The new names of columns, by the old ones."""
    try:
        if given.rename is not None:
            return rename_from(given.rename)
    except ValueError as error:
        raise OptionError(str(error)) from error
    names = {} if setting is None or setting.value is None else setting.value
    if not isinstance(names, dict) or not all(isinstance(each, str) for pair in names.items() for each in pair):
        assert setting is not None
        raise setting.error(f"expected old and new names of columns, as {{question: prompt}}, got {names!r}.")
    return names


def _swept(given: argparse.Namespace, setting: Setting | None) -> dict[str, list[Any]]:
    """The options of a sweep with their values, as flags take them."""
    found: dict[str, list[Any]] = {}
    if given.sweep is None:
        values = {} if setting is None or setting.value is None else setting.value
        if not isinstance(values, dict) or not all(isinstance(each, list) for each in values.values()):
            assert setting is not None
            raise setting.error(f"expected options with lists of values, as {{beta: [0.1, 0.3]}}, got {values!r}.")
        found = {str(key).replace("-", "_"): list(each) for key, each in values.items()}
    for text in given.sweep or ():
        key, equals, values = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not key:
            raise OptionError(f"--sweep {text}: expected an option and its values, as beta=0.1,0.3.")
        if key in found:
            raise OptionError(f"--sweep {text}: {key} is swept already; give all its values at once.")
        found[key] = _values(text, values)
    for key, each in found.items():
        where = f"--sweep {key}" if given.sweep is not None or setting is None else f"{setting.place}: sweep: {key}"
        if key in NOT_SWEPT:
            raise OptionError(f"{where}: {NOT_SWEPT[key]}.")
        if key not in SWEPT:
            raise OptionError(f"{where}: no such option{nearest(key, SWEPT)}")
        if not each:
            raise OptionError(f"{where}: there is no value to try.")
    return found


def _values(text: str, values: str) -> list[Any]:
    if not values.lstrip().startswith("["):
        return [value.strip() for value in values.split(",") if value.strip()]
    try:
        return list(json.loads(values))
    except ValueError as error:
        raise OptionError(f"--sweep {text}: not a JSON list ({error}).") from error


def _unexpected(argument: str) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; SYSTEM and DATA are the only ones without a flag."
    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    if name in ELSEWHERE:
        return f"no such option: {argument.partition('=')[0]}: {ELSEWHERE[name]}."
    known = (*_OWN[2:], "config", "dry_run", "help", *_FIELDS)
    return f"no such option: {argument.partition('=')[0]}{_hyphened(nearest(name, known, '--'))}"


def _hyphened(text: str) -> str:
    """A flag as the help spells it."""
    return re.sub(r"(?<!\w)--\w+", lambda flag: flag.group().replace("_", "-"), text)


def nearest(
    name: str, known: Sequence[str], dashes: str = "", *, last: str = "; `sysdag train --help` lists all."
) -> str:
    """The end of a message about an unknown name: the known one that is most like it, or else what to do."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {dashes}{close[0]}?"
    return last or f"; those there are: {', '.join(known)}."

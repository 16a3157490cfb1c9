"""What lies in the folder of a saved system, looked through before a library reads it.

A folder may be from elsewhere. It holds data alone: no code, no pickles, no links that lead out, no JSON that is read
in two ways. What a library raises about the rest is told with the file and the component.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdag.errors import SerializationError, SysdagError, shown

MAX_DEPTH = 100
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".joblib", ".npy", ".npz")
_CODE = ("auto_map", "custom_pipelines", "custom_pipeline", "custom_generate", "trust_remote_code")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_OWN_KERNEL = re.compile(r"(paged\|)?[a-z0-9_]+")
_COUNTS = re.compile(r"(layers?|blocks?)$")
_WIDTHS = re.compile(r"(_size|_dim|_heads?|channels|_width|n_embd)$")
_FEW_TENSORS, _FEW_NUMBERS = 1000, 10**6  # what a config may ask for whatever the weights beside it hold


def read_strict_json(file: Path, *, plain: bool = False) -> Any:
    """The content of a JSON file in which every key stands once.

    Args:
        plain: refuses the numbers that JSON has not (NaN, Infinity), too; configs of transformers hold them.

    Raises:
        SerializationError: naming the file that is missing, no JSON, or nested too deep.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise SerializationError(f"{file} cannot be read: {error}") from error

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise SerializationError(f"{file}: {shown(twice)} stands there a second time.")
        return found

    def no_number(name: str) -> float:
        if plain:
            raise SerializationError(f"{file} is not valid JSON: {name} is no number.")
        return float(name)

    try:
        found = json.loads(raw, object_pairs_hook=once, parse_constant=no_number)
    except ValueError as error:
        if isinstance(error, SerializationError):
            raise
        raise SerializationError(f"{file} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise SerializationError(f"{file} is nested more than {MAX_DEPTH} deep.") from error
    level = [found]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
    if level:
        raise SerializationError(f"{file} is nested more than {MAX_DEPTH} deep.")
    return found


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def check_links(folder: Path, *names: str) -> None:
    """Refuses a folder in which a link leads out of it.

    Args:
        names: what of the folder is read.

    The Hub's cache is a folder of links to the repository's own `blobs`, which may be.

    Raises:
        SerializationError: naming the link.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    read = [folder / name for name in names]
    for path in [*read, *(inner for each in read for inner in _below(each))]:
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise SerializationError(
                f"{path} is a link that leads out of {folder}, to {os.readlink(path)}. A saved system holds its files "
                "itself; put a copy in the link's place if you know what it is."
            )


def _below(folder: Path) -> Iterator[Path]:
    """Everything in a folder; links are not followed."""
    for at, folders, files in os.walk(folder, followlinks=False):
        yield from (Path(at) / name for name in sorted([*folders, *files]))


def check_component(folder: Path, *, trust_remote_code: bool, any_format: bool = False) -> None:
    """Looks through a component's folder; no weights are read but the headers of their files.

    Args:
        trust_remote_code: lets its configs name code.
        any_format: lets it hold weights in other formats, as of a user's class, which reads them itself.

    Raises:
        SerializationError: naming the file with weights that are pickled or damaged, that is no JSON, that asks for
            code, or that asks for a model which the weights beside it cannot be of.
    """
    shapes_of = functools.cache(safetensors_shapes)
    for path in _below(folder):
        if path.suffix in _PICKLES and not any_format:
            raise SerializationError(f"{path}: weights are read from safetensors only.")
        if path.suffix == ".json":
            content = read_strict_json(path)
            if path.name.endswith(("config.json", "index.json")):
                _check_config(content, path, trust_remote_code=trust_remote_code)
            if path.name.endswith("config.json"):
                weights = [shapes_of(beside) for beside in path.parent.glob("*.safetensors")]
                _check_sizes(content, path, weights)
        elif path.suffix == ".safetensors":
            shapes_of(path)


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors.

    Raises:
        SerializationError: naming the file that is none, or not whole.
    """
    from safetensors import safe_open

    with reading(file), safe_open(file, "np") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no mapping


def _check_config(content: Any, file: Path, *, trust_remote_code: bool) -> None:
    if not isinstance(content, dict):
        raise SerializationError(f"{file} must hold an object, got {shown(content)}.")
    for name, value in _fields(content):
        if not trust_remote_code:
            _check_no_code(name, value, file)


def _check_sizes(content: Any, file: Path, weights: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Refuses a model of more layers or of greater widths than the weights beside its config can be of."""
    tensors = sum(map(len, weights))
    numbers = sum(math.prod(shape) for each in weights for shape in each.values())
    for name, value in _fields(content):
        if weights and isinstance(value, int):
            most = max(tensors, _FEW_TENSORS) if _COUNTS.search(name) else max(numbers, _FEW_NUMBERS)
            if value > most and (_COUNTS.search(name) or _WIDTHS.search(name)):
                raise SerializationError(
                    f"{file}: {name} is {value}, and the weights beside it are {tensors} tensors of {numbers} numbers."
                )


def _fields(content: Any) -> Iterator[tuple[str, Any]]:
    """The names and values of every object in a config, however deep in lists and objects it stands."""
    waiting = [content]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from each.items()
        waiting += _inside(each)


def _check_no_code(name: str, value: Any, file: Path) -> None:
    foreign = name in _KERNELS and isinstance(value, str) and not _OWN_KERNEL.fullmatch(value)
    listed = name == "_class_name" and not isinstance(value, str)
    if (name in _CODE and value not in (None, False)) or foreign or listed:
        raise SerializationError(
            f"{file}: {name}={shown(value)} asks for code that is not the library's own, which a saved system does not "
            "choose. If you trust it, System.from_pretrained(folder, trust_remote_code=True)."
        )


@contextlib.contextmanager
def reading(place: Path | None, *, leaving: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Tells whatever a library raises about saved files as a `SerializationError` that names them.

    Args:
        place: the file, or a component's folder, whose name is the component's; None for files that were not saved by
            sysdag, about which nothing is said.
        leaving: errors that are the caller's to tell.
    """
    try:
        yield
    except leaving:
        raise
    except BaseException as error:
        # A panic of the Rust libraries (safetensors, tokenizers) is no Exception.
        if place is None or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        said = str(error).strip()
        component = "" if place.is_file() or place.suffix else f"Component {place.name!r}"
        what = f"{component}: " if component and component not in said else ""
        if isinstance(error, SysdagError):
            if isinstance(error, SerializationError) and not what:
                raise
            where = "" if str(place) in said or not place.exists() else f"{place}: "
            raise SerializationError(f"{what}{where}{said}") from error
        told = " ".join(said.split())[:600]
        moved = "" if place.exists() else " Another save has replaced it since; load the system again."
        raise SerializationError(
            f"{what}{_file_meant(place, said)} cannot be loaded ({type(error).__name__}: {told}).{moved}"
        ) from error


def _file_meant(place: Path, said: str) -> Path:
    """The file in a folder that an error names; the folder where it names none."""
    files = [path for path in _below(place) if path.is_file() and path.name in said] if place.is_dir() else []
    return max(files, key=lambda path: len(path.name), default=place)


def only(
    options: Any, kinds: Mapping[str, tuple[type, ...]], owner: str, *, required: Iterable[str] = ()
) -> dict[str, Any]:
    """Options that a component saved, each of them known and of its type; a missing one has the default.

    Args:
        kinds: of JSON: int is also a float's, bool is no int.
        required: names of those that have no default.

    Raises:
        SerializationError: naming the option that no component of the class saves, or its type, or that is missing.
    """
    options = options if isinstance(options, Mapping) else {"": options}
    for name, value in options.items():
        if name not in kinds:
            raise SerializationError(f"{owner}: no saved {owner} has the option {shown(name)}, only {sorted(kinds)}.")
        if not is_a(value, kinds[name]):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds[name])
            raise SerializationError(f"{owner}: {name} must be of type {expected}, got {shown(value)}.")
    if missing := sorted(set(required) - options.keys()):
        raise SerializationError(f"{owner}: the saved options have no {missing[0]!r}.")
    return dict(options)


def is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value of JSON has one of the types: an int is a float, too, and a bool is no number."""
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds and abs(value) < 2**1000)

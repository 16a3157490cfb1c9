"""An explicit probability table: the exact oracle of tests, and a way to study a system on paper."""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.discrete.values import Discrete
from sysdag.errors import DataError, PlanError, SerializationError
from sysdag.files.encoding import decode_value, encode_value
from sysdag.files.saved_files import only, read_strict_json, reading, safetensors_shapes


class Tabular(Discrete):
    """p(value | key) given as a table; trainable through its logits.

    The node's function returns the key: any hashable value, a tuple of the parents' values for instance.

    Args:
        table: for each key, the probability of each value; a value that is left out has probability 0.
        dtype: of the logits.

    Raises:
        PlanError: if a row is negative or does not sum to 1 (to 1e-6), naming it.
    """

    def __init__(
        self, table: Mapping[Hashable, Mapping[Hashable, float]], *, dtype: torch.dtype = torch.float64
    ) -> None:
        if not table:
            raise PlanError("Tabular needs at least one row: {key: {value: probability}}.")
        self.keys = tuple(table)
        self.values = tuple(dict.fromkeys(value for row in table.values() for value in row))
        for key, row in table.items():
            total = sum(row.values())
            if min(row.values(), default=-1) < 0 or abs(total - 1) > 1e-6:
                raise PlanError(f"Tabular row {key!r}: probabilities must be >= 0 and sum to 1, got sum {total}.")
        probabilities = [[row.get(value, 0.0) for value in self.values] for row in table.values()]
        table_logits = torch.tensor(probabilities, dtype=torch.float64).log().to(dtype)
        self._module = nn.ParameterDict({"logits": nn.Parameter(table_logits.clone())})
        self._row = {key: row for row, key in enumerate(self.keys)}
        self._start = table_logits

    def __repr__(self) -> str:
        return f"Tabular({len(self.keys)} keys, {len(self.values)} values)"

    @property
    def module(self) -> nn.Module:
        return self._module

    def logits(self, inputs: Sequence[Any]) -> Float[Tensor, "n values"]:
        for element, key in enumerate(inputs):
            if not isinstance(key, Hashable) or key not in self._row:
                raise DataError(f"{self!r}: no row for {key!r}; its keys are {list(self.keys)}.", element=element)
        return self._module["logits"][[self._row[key] for key in inputs]]

    def reference(self) -> Tabular:
        frozen = copy.copy(self)
        frozen._module = copy.deepcopy(self._module).requires_grad_(False)
        return frozen

    def fresh(self) -> Tabular:
        made = copy.copy(self)
        made._module = nn.ParameterDict({"logits": nn.Parameter(self._start.clone())})
        return made

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        from safetensors.torch import save_file

        save_file({"logits": self._module["logits"].detach().contiguous()}, folder / "model.safetensors")
        names = {
            "keys": [encode_value(key, "key") for key in self.keys],
            "values": [encode_value(value, "value") for value in self.values],
        }
        (folder / "table.json").write_text(json.dumps(names), encoding="utf-8")
        return {}

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        only(options, {}, cls.__name__)
        file = folder / "table.json"
        names = only(read_strict_json(file), {"keys": (list,), "values": (list,)}, str(file))
        with reading(file):
            keys, values = ([decode_value(name) for name in names[kind]] for kind in ("keys", "values"))
            if len(set(keys)) < len(keys) or len(set(values)) < len(values):
                raise ValueError("its keys and its values must differ among themselves")
        shape = safetensors_shapes(folder / "model.safetensors").get("logits")
        if shape != (len(keys), len(values)) or not keys:
            raise SerializationError(f"{folder}: the table is {len(keys)} x {len(values)}, its logits are {shape}.")
        made = cls({key: {value: 1 / len(values) for value in values} for key in keys})
        made.load_weights(folder)
        made._start = made._module["logits"].detach().clone()
        return made

    def load_weights(self, folder: Path) -> None:
        from safetensors.torch import load_file

        saved = load_file(folder / "model.safetensors")["logits"]
        with torch.no_grad():
            self._module["logits"].data = self._module["logits"].data.to(saved.dtype).copy_(saved)

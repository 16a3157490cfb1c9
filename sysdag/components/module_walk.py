"""What a module is made of, several times sooner than torch's own walks, which write every name: for each step's use.

A model of 24 layers with LoRA has two thousand modules, and a step asks for them some ten times.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules_of(module: nn.Module) -> list[nn.Module]:
    """As `module.modules()`: the module and all inside it, each once, in the same order."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            waiting.extend(reversed(part._modules.values()))
    return list(found.values())


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """As `module.parameters()`: each once, in the same order."""
    seen: set[int] = set()
    for part in modules_of(module):
        for parameter in part._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
